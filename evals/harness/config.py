"""`config.yaml`, what the results depend on: flat `key: value` lines whose values are JSON, which YAML reads too."""

import json
from collections.abc import Mapping
from typing import Any

from .errors import UsageError

VERSION = 1
KEYS = (
    "schema_version",
    "suite",
    "model",
    "fingerprint",
    "device",
    "dtype",
    "data_dir",
    "seed",
    "samples",
    "lengths",
    "tasks",
    "methods",
    "skips",
)
# Told, not compared: the same files may lie elsewhere, and the fingerprint and the prompts' hashes say what they are.
PLACES = ("model", "data_dir")
Config = dict[str, Any]


def dumps(config: Mapping[str, Any]) -> str:
    return "".join(f"{key}: {json.dumps(config[key])}\n" for key in KEYS)


def loads(text: str) -> Config:
    """ValueError where a line is no key with a JSON value, a key is missing, or the format is another version's."""
    lines = [line.split(": ", 1) for line in text.splitlines()]
    config = {key: json.loads(value) for key, value in lines}
    if config.get("schema_version") != VERSION:
        raise ValueError(f"schema_version {config.get('schema_version')!r}, this one reads {VERSION}")
    if missing := [key for key in KEYS if key not in config]:
        raise ValueError(f"{', '.join(missing)} missing")
    kinds = {"samples": int, "lengths": list, "tasks": list, "methods": dict, "skips": dict}
    if wrong := [key for key, kind in kinds.items() if not isinstance(config[key], kind)]:
        raise ValueError(f"{wrong[0]} {config[wrong[0]]!r}")
    return config


def resumed(held: Config, asked: Config, where: str) -> Config:
    """`held` with the methods that `asked` adds. UsageError lists the keys in which they differ otherwise."""
    differ = [key for key in KEYS if key not in (*PLACES, "methods", "skips") and held[key] != asked[key]]
    texts = [f"{key} ({held[key]!r} there, now {asked[key]!r})" for key in differ]
    for spec, options in held["methods"].items():
        if spec not in asked["methods"]:
            texts.append(f"methods (without {spec!r} now)")
        elif asked["methods"][spec] != options:
            texts.append(f"methods ({spec!r} meant {options!r} there, now {asked['methods'][spec]!r})")
        elif _skipping(held, spec) != _skipping(asked, spec):
            texts.append(f"skips (of {spec!r}: {_skipping(held, spec)} there, now {_skipping(asked, spec)})")
    if texts:
        raise UsageError(f"{where} is a run of another configuration, in {', '.join(texts)}")
    return held | {"methods": held["methods"] | asked["methods"], "skips": asked["skips"]}


def _skipping(config: Config, spec: str) -> list[str]:
    """Tasks that a method is left out of."""
    return sorted(task for task, specs in config["skips"].items() if spec in specs)
