"""Methods as they are written on a command line: `moba:block=64+topk=8`, a name and its options."""

import dataclasses
import hashlib
import json
import types
import typing
from typing import Any

from attnlab.evals.harness.errors import UsageError, unknown
from attnlab.evals.harness.method import Method


def parse_method(text: str, methods: dict[str, type[Method]]) -> Method:
    """The method that a text names, with `spec` and `options` set. UsageError, one line, where it means none."""
    spec = "".join(text.split())
    name, colon, rest = spec.partition(":")
    if name not in methods:
        raise unknown("method", name, methods)
    kind: Any = methods[name]
    known, given = declared(kind), {}
    for part in rest.split("+") if colon else ():
        key, equals, value = part.partition("=")
        if not equals:
            raise UsageError(f"method {spec!r}: options are written name=value and joined by '+', got {part!r}")
        if key not in known:
            raise unknown(f"option of method {name!r}", key, known) if known else _none(spec, key)
        if key in given:
            raise UsageError(f"method {spec!r}: option {key!r} is given twice")
        given[key] = _value(spec, key, value, known[key])
    try:
        method = kind(**given)
    except (ValueError, TypeError) as e:
        raise UsageError(f"method {spec!r}: {e}") from None
    method.spec, method.options = spec, {key: getattr(method, key) for key in known}
    return method


def declared(kind: Any) -> dict[str, Any]:
    """The options of a method's class and their types: the fields of its dataclass."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def describe(kind: Any) -> str:
    """`block=64 topk=8`: the options and their defaults; choices after a colon."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    shown = []
    for key, hint in declared(kind).items():
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        value = "none" if defaults[key] is None else str(defaults[key])
        shown.append(f"{key}={value}" + (f" ({'|'.join(choices)})" if choices else ""))
    return ", ".join(shown)


def method_hash(method: Method) -> str:
    """Of a method's name and all of its options: one that spells a default out is the same method."""
    name = method.spec.partition(":")[0]
    return hashlib.sha256(json.dumps([name, method.options], sort_keys=True).encode()).hexdigest()


def _value(spec: str, key: str, text: str, hint: Any) -> Any:
    """A text as what the option takes: a type, one or None, or one of some choices."""
    if isinstance(hint, types.UnionType):
        if text == "none":
            return None
        return _value(spec, key, text, next(x for x in typing.get_args(hint) if x is not type(None)))
    if typing.get_origin(hint) is typing.Literal:
        if text not in typing.get_args(hint):
            raise UsageError(
                f"method {spec!r}: option {key!r} must be one of {', '.join(typing.get_args(hint))}, got {text!r}"
            )
        return text
    try:
        return hint(text)
    except ValueError:
        kind = {int: "a whole number", float: "a number"}.get(hint, hint.__name__)
        raise UsageError(f"method {spec!r}: option {key!r} must be {kind}, got {text!r}") from None


def _none(spec: str, key: str) -> UsageError:
    return UsageError(f"method {spec!r}: it has no options, got {key!r}")
