"""Named entries from TOML files: the library's own data and users' files of the same form."""

import difflib
import math
import os
import re
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DATA = Path(__file__).parent / "data"
Entry = TypeVar("Entry")


def load(fn: str, kind: type[Entry], file: str, name: str, path: str | os.PathLike[str] | None) -> Entry:
    """The entry `name` of `file` under `data/`, or of the TOML file at `path`, as a dataclass `kind`.

    Case and punctuation of the name do not count. Raises ValueError on an unknown name, naming near ones, and on a
    field that is missing, unknown or out of range.
    """
    if not isinstance(name, str):
        raise TypeError(f"{fn}: name must be a string, got {type(name).__name__}")
    entries = read(fn, DATA / file if path is None else Path(path))
    known = {_plain(key): key for key in entries}
    if _plain(name) not in known:
        near = [known[key] for key in difflib.get_close_matches(_plain(name), known, n=3)]
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(entries)}"
        raise ValueError(f"{fn}: unknown name {name!r}; {hint}")
    key = known[_plain(name)]
    return build(fn, kind, key, entries[key])


def build(fn: str, kind: type[Entry], name: str, values: Any) -> Entry:
    """`kind(name=name, **values)` of a TOML table's values. ValueError naming fields that are missing or unknown."""
    if not isinstance(values, dict):
        raise ValueError(f"{fn}: [{name}] must be a table, got {type(values).__name__}")
    wanted = {f.name: f.default is MISSING for f in fields(kind) if f.name != "name"}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(wanted)):
        raise ValueError(f"{fn}: [{name}] has unknown fields: {', '.join(unknown)}; known: {', '.join(wanted)}")
    if missing := [field for field, needed in wanted.items() if needed and field not in values]:
        raise ValueError(f"{fn}: [{name}] lacks: {', '.join(missing)}")
    return kind(**{**values, "name": name})


def read(fn: str, path: Path) -> dict[str, Any]:
    """A TOML file's tables. ValueError where it cannot be read as one."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise ValueError(f"{fn}: cannot read {path}: {e}") from e


def check_number(fn: str, name: str, value: Any, *, zero: bool = False, most: float = math.inf) -> float:
    """`value` as a float. ValueError unless it is a finite number over 0 (or 0 with `zero`) and at most `most`."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero) or value > most:
        span = f"in {'[' if zero else '('}0, {most:g}]" if most < math.inf else f"{'0 or more' if zero else 'over 0'}"
        raise ValueError(f"{fn}: {name} must be a finite number {span}, got {value!r}")
    return float(value)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
