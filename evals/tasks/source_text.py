"""Real text that every machine has: the running Python's standard-library sources, one file in eight held out."""

import pathlib
import sysconfig
import zlib
from functools import cache
from typing import NamedTuple

import numpy as np

from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Subject

LEFT_OUT = ("site-packages", "dist-packages", "test")  # of others, and not everywhere installed
HELD_OUT = 8
LEAST = 1 << 20  # bytes
WIDEST = 16  # bytes that a token may have on average


class Sources(NamedTuple):
    """Files joined in the order of their names; a file is in one of the two."""

    training: bytes
    held_out: bytes


@cache
def sources() -> Sources:
    """UsageError where the library has no sources, as in some packaged Pythons."""
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py")):
        name = path.relative_to(folder).as_posix()
        if name.split("/")[0] not in LEFT_OUT:
            parts[is_held_out(name)].append(path.read_bytes())
    found = Sources(*map(b"".join, parts))
    if min(map(len, found)) < LEAST // HELD_OUT:
        raise UsageError(f"Python's library in {folder} has too little source: {sum(map(len, found))} bytes")
    return found


def is_held_out(name: str) -> bool:
    """Whether a file, by its path within the library, is kept from training."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def held_out_bytes(n: int, rng: np.random.Generator) -> bytes:
    text = sources().held_out
    if len(text) < n:
        raise UsageError(f"Python's library has {len(text)} bytes of held-out source, {n} are needed")
    start = int(rng.integers(len(text) - n + 1))
    return text[start : start + n]


def held_out_tokens(subject: Subject, n: int, rng: np.random.Generator) -> list[int]:
    """The first `n` tokens of a stretch, the sequence's first special token among them."""
    text = held_out_bytes(WIDEST * n, rng)
    ids = [*subject.start, *subject.ids(text.decode("utf-8", "replace"))]
    if len(ids) < n:
        raise UsageError(f"the tokenizer of {subject.name!r} makes {len(ids)} tokens of {len(text)} bytes, {n} wanted")
    return ids[:n]
