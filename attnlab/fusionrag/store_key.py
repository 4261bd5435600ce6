"""What is stored: a chunk's keys and values, under the hash of all that they were computed from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..dispatch import check_ints
from ..rope import RopeConfig


@dataclass(frozen=True, eq=False)
class ChunkKey:
    """What a chunk's keys and values depend on; made by `ChunkKey.of`, equal where the digests are.

    Attributes:
        content: hash of the chunk's token ids.
        tokens: how many there are.
        model: the model's `fingerprint`.
        system: hash of the system prompt's token ids.
        base: how many there are: the position of the chunk's first key.
        rope: the model's rotary positions.
    """

    content: str
    tokens: int
    model: str
    system: str
    base: int
    rope: RopeConfig

    @classmethod
    def of(
        cls, tokens: Sequence[int] | Tensor, *, model: str, rope: RopeConfig, system: Sequence[int] | Tensor = ()
    ) -> "ChunkKey":
        """Key of a chunk of `tokens` behind the `system` prompt: token ids, as ints or an integer tensor `[T]`.

        Raises:
            ValueError: the chunk is empty, an id is negative, or `model` is no fingerprint.
            TypeError: what should be token ids or a `RopeConfig` is not.
        """
        fn = "ChunkKey.of"
        if not isinstance(model, str) or not model:
            raise ValueError(f"{fn}: model must be what fingerprint(model) returns, got {model!r}")
        if not isinstance(rope, RopeConfig):
            raise TypeError(f"{fn}: rope must be a RopeConfig, got {type(rope).__name__}")
        chunk, before = _ids(fn, "tokens", tokens), _ids(fn, "system", system)
        if not chunk:
            raise ValueError(f"{fn}: tokens must hold at least one id")
        return cls(_hash(chunk), len(chunk), model, _hash(before), len(before), rope)

    @cached_property
    def facts(self) -> dict[str, str]:
        """What is hashed, as it is written into a chunk's file."""
        return {
            "tokens": f"{self.tokens}:{self.content}",
            "model": self.model,
            "system": f"{self.base}:{self.system}",
            "rope": _canonical(self.rope),
        }

    @cached_property
    def digest(self) -> str:
        """The key as 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, ChunkKey) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        return f"{self.digest[:12]} ({self.tokens} tokens behind {self.base} of model {self.model[:12]})"


@dataclass(frozen=True, eq=False, repr=False)
class ChunkKV:
    """Keys and values of one chunk.

    Attributes:
        key: what they were computed from.
        k, v: `[layers, tokens, Hkv, D]` of one floating-point dtype on one device; keys are rotated for the positions
            `key.base, key.base + 1, ...`.
        neighbours: digests of the chunks that stood before it when it was computed, in order; none: it stood right
            behind the system prompt.

    Raises:
        ValueError, TypeError: naming the field, what was expected and what came.
    """

    key: ChunkKey
    k: Tensor
    v: Tensor
    neighbours: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        fn, key, k, v = "ChunkKV", self.key, self.k, self.v
        if not isinstance(key, ChunkKey):
            raise TypeError(f"{fn}: key must be a ChunkKey, got {type(key).__name__}")
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                came = x.dtype if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"{fn}: {name} must be a floating-point Tensor, got {came}")
        tokens, size = key.tokens, key.rope.head_dim
        if k.ndim != 4 or k.shape[1] != tokens or k.shape[3] != size or not k.numel():
            raise ValueError(f"{fn}: k must have shape [layers, {tokens}, Hkv, {size}], got {list(k.shape)}")
        for name in ("shape", "dtype", "device"):
            if getattr(k, name) != getattr(v, name):
                raise ValueError(f"{fn}: v must have k's {name} {getattr(k, name)}, got {getattr(v, name)}")
        if not isinstance(self.neighbours, tuple) or not all(isinstance(n, str) for n in self.neighbours):
            raise TypeError(f"{fn}: neighbours must be a tuple of digests, got {self.neighbours!r}")

    @property
    def nbytes(self) -> int:
        """Of keys and values."""
        return self.k.nbytes + self.v.nbytes

    def __repr__(self) -> str:
        return f"ChunkKV({self.key}, {list(self.k.shape)}, {self.k.dtype}, {len(self.neighbours)} neighbours)"


def _ids(fn: str, name: str, ids: Any) -> list[int]:
    found = check_ints(fn, name, ids)
    if found and min(found) < 0:
        raise ValueError(f"{fn}: {name} must hold ids of at least 0, got {min(found)}")
    return found


def _hash(ids: list[int]) -> str:
    return hashlib.sha256(torch.tensor(ids, dtype=torch.int64).numpy().tobytes()).hexdigest()


def _canonical(rope: RopeConfig) -> str:
    """Equal for equal rotations, however their numbers are spelled."""
    scaling = {name: _number(value) for name, value in asdict(rope.scaling).items()} if rope.scaling else {}
    kind = type(rope.scaling).__name__ if rope.scaling else None
    return json.dumps([float(rope.theta), rope.head_dim, rope.dim, bool(rope.interleaved), kind, scaling])


def _number(value: Any) -> Any:
    return value if value is None or isinstance(value, bool) else float(value)
