"""Tensors and facts in a safetensors file, with a format version and a checksum over both."""

import hashlib
import json
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """What a file says it holds.

    Attributes:
        name: `"attnlab.<what>"`.
        version: of the facts and the tensors; no other is read.
        facts: the entry of the metadata that has the facts, as JSON.
    """

    name: str
    version: str
    facts: str


def metadata(form: Format, facts: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, str]:
    """Of a file of contiguous CPU `tensors`, checksum included."""
    meta = {"format": form.name, "version": form.version, form.facts: json.dumps(facts, sort_keys=True)}
    return meta | {"sha256": _digest(form, tensors, meta)}


def read(
    fn: str, path: str | os.PathLike[str], form: Format, place: Callable[[Tensor], Tensor], *, verify: bool = True
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of a file of format `form`.

    `place` takes a tensor that is mapped from the file to where it shall live; what it returns is what `verify` holds
    against the checksum. Raises the system's error for a file that cannot be opened, and ValueError, with the path, for
    one that is truncated, of another format or version, or altered.
    """
    mapped, meta = _open(fn, path, form)
    tensors = {name: place(x) for name, x in mapped.items()}
    if verify and meta["sha256"] != _digest(form, tensors, meta):
        raise ValueError(f"{fn}: {path} was altered: its checksum does not fit")
    return tensors, json.loads(meta[form.facts])


def facts(fn: str, path: str | os.PathLike[str], form: Format) -> dict[str, Any]:
    """The facts of a file of format `form`, whose tensors are not read, nor the checksum held against them."""
    return json.loads(_open(fn, path, form)[1][form.facts])


def library() -> ModuleType:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("saving and loading need safetensors (pip install attnlab[hf])") from error
    return safetensors


def _open(fn: str, path: str | os.PathLike[str], form: Format) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors mapped from the file, and its metadata."""
    safetensors = library()
    # The library opens a name twice; through the descriptor it finds one file, whatever becomes of the name.
    with open(path, "rb") as held:
        try:
            with safetensors.safe_open(f"/dev/fd/{held.fileno()}", framework="pt", device="cpu") as file:
                mapped, meta = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except Exception as error:  # safetensors' own class, and others for what its header can be made to say
            raise ValueError(f"{fn}: {path} is truncated or no safetensors file: {error}") from error
    if meta.get("format") != form.name or not {"version", form.facts, "sha256"} <= meta.keys():
        raise ValueError(f"{fn}: {path} is no saved {form.name.removeprefix('attnlab.')}")
    if meta["version"] != form.version:
        raise ValueError(f"{fn}: {path} has version {meta['version']!r}, this one reads {form.version!r}")
    return mapped, meta


def _digest(form: Format, tensors: dict[str, Tensor], meta: dict[str, str]) -> str:
    """SHA-256 of everything in the file but itself: against damage, not against an author of false files."""
    found = hashlib.sha256(json.dumps([meta[name] for name in ("format", "version", form.facts)]).encode())
    for name in sorted(tensors):
        x = tensors[name]
        found.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        found.update(x.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
