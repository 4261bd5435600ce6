"""Rotary positions (RoFormer, arXiv 2104.09864): apply them, and move keys that already carry them.

Angles are float32 products of a position and a float32 frequency, as models are trained and served with, so a key moved
here is the key the model itself would have computed. Float64 inputs get float64 throughout.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .kernels.fusionrag.portable_keys import turn

INTERLEAVED_MODELS = frozenset(
    {"cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "helium"}
)


@dataclass(frozen=True)
class LinearScaling:
    """Every position divided by `factor` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Dynamic NTK: theta grows with the sequence once it is longer than `max_position_embeddings`."""

    factor: float
    max_position_embeddings: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071, section 3.2): slow pairs interpolated, fast ones kept, a temperature in the rotation.

    `attention_factor=None` takes the paper's `0.1 ln(factor) + 1`, or DeepSeek's ratio where both `mscale` are given.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: slow pairs interpolated, fast ones kept, a blend in wavelength between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


Scaling = LinearScaling | DynamicScaling | YarnScaling | Llama3Scaling


@dataclass(frozen=True)
class RopeConfig:
    """A model's rotary positions.

    `rotary_dim` (default: all of `head_dim`) leading dimensions are rotated. `interleaved` pairs dimensions
    `(2i, 2i + 1)` (GPT-J, Cohere, GLM) instead of `(i, i + rotary_dim // 2)` (Llama, and most). Raises ValueError or
    TypeError on values that make no rotation.
    """

    theta: float
    head_dim: int
    rotary_dim: int | None = None
    interleaved: bool = False
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        _positive("theta", self.theta)
        _positive("head_dim", self.head_dim, integer=True)
        if self.rotary_dim is not None:
            _positive("rotary_dim", self.rotary_dim, integer=True)
        if self.dim % 2 or self.dim > self.head_dim:
            raise ValueError(
                f"RopeConfig: rotary_dim must be even and at most head_dim={self.head_dim}, got {self.dim}"
            )
        if self.scaling is not None:
            _check_scaling(self.scaling, self.dim, self.theta)

    @property
    def dim(self) -> int:
        """How many leading dimensions are rotated."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    @property
    def attention_factor(self) -> float:
        """What the rotation multiplies keys and queries with: YaRN's temperature, else 1."""
        s = self.scaling
        if not isinstance(s, YarnScaling):
            return 1.0
        if s.attention_factor is not None:
            return s.attention_factor
        if s.mscale and s.mscale_all_dim:
            return _mscale(s.factor, s.mscale) / _mscale(s.factor, s.mscale_all_dim)
        return _mscale(s.factor, 1.0)

    def inverse_frequencies(
        self, *, seq_len: int | None = None, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Radians per position of each pair, `[rotary_dim // 2]`; `seq_len` is needed under `DynamicScaling` alone."""
        s = self.scaling
        theta = self.theta
        if isinstance(s, DynamicScaling):
            if seq_len is None:
                raise ValueError("RopeConfig: dynamic scaling needs seq_len, the length of the sequence so far")
            stretch = s.factor * max(seq_len, s.max_position_embeddings) / s.max_position_embeddings - (s.factor - 1)
            theta = theta * stretch ** (self.dim / (self.dim - 2))
        exponents = torch.arange(0, self.dim, 2, device=device).to(dtype) / self.dim
        inverse = 1.0 / theta**exponents
        if isinstance(s, LinearScaling):
            return inverse / s.factor
        if isinstance(s, YarnScaling):
            kept = 1 - _yarn_ramp(s, self.dim, self.theta, inverse)
            return 1.0 / (s.factor * theta**exponents) * (1 - kept) + inverse * kept
        if isinstance(s, Llama3Scaling):
            return _llama3(s, inverse)
        return inverse

    @classmethod
    def from_transformers(
        cls, config: Any, *, layer_type: str | None = None, interleaved: bool | None = None
    ) -> "RopeConfig":
        """Read a transformers configuration, or its dict: `rope_parameters` (5.x) or `rope_scaling` (4.x).

        `layer_type` chooses among per-layer parameters. Configurations rarely say whether a model interleaves:
        `interleaved=None` knows the models in `INTERLEAVED_MODELS`. Raises ValueError on a kind of scaling this
        library does not have and on missing keys.
        """
        top = config if isinstance(config, Mapping) else config.to_dict()
        rope = dict(top.get("rope_parameters") or top.get("rope_scaling") or {})
        if layer_type is not None:
            if not isinstance(rope.get(layer_type), Mapping):
                raise ValueError(f"RopeConfig: rope_parameters has no layer_type {layer_type!r}, only {sorted(rope)}")
            rope = dict(rope[layer_type])
        nested = sorted(name for name, value in rope.items() if isinstance(value, Mapping))
        if nested:
            raise ValueError(f"RopeConfig: rope_parameters differ by layer: give layer_type, one of {nested}")
        theta = _need({**top, **rope}, "rope_theta")
        head_dim = top.get("head_dim") or _need(top, "hidden_size") // _need(top, "num_attention_heads")
        partial = rope.get("partial_rotary_factor", top.get("partial_rotary_factor"))
        if interleaved is None:
            interleaved = bool(top.get("rope_interleave", top.get("model_type") in INTERLEAVED_MODELS))
        rotary_dim = top.get("rotary_dim") if partial is None else int(head_dim * partial)
        return cls(float(theta), head_dim, rotary_dim, interleaved, _read_scaling(rope, top))


def apply_rope(x: Tensor, positions: Tensor, config: RopeConfig, *, seq_len: int | None = None) -> Tensor:
    """Rotate queries or keys for their positions.

    `x [B, T, H, D]` of any float dtype, `positions [T]` or `[B, T]` of an integer dtype on the same device; returns
    `x`'s shape and dtype, computed in float32 (float64 for float64) and rounded once. `seq_len`: see
    `RopeConfig.inverse_frequencies`. Differentiable in `x`. Raises TypeError or ValueError on other shapes or dtypes.
    """
    _check_x("apply_rope", x, config)
    angles = _angles("apply_rope", "positions", positions, x, config, seq_len)
    return _rotate(x, angles, config, config.attention_factor)


def shift_rope(
    k: Tensor, shift: int | Tensor | tuple[Tensor, Tensor], config: RopeConfig, *, seq_len: int | None = None
) -> Tensor:
    """Move rotated keys to new positions.

    `k [B, T, H, D]` as `apply_rope` left it. `shift` is how far to move: an int, an integer tensor `[T]` or `[B, T]`,
    or the pair `(from, to)` of such tensors, which also undoes the rounding of the old angle and is exact to float32 at
    any distance. Computed in float32 (float64 for float64), rounded once; the attention factor is not applied again.
    Under dynamic scaling both positions are read at one `seq_len`. Raises TypeError or ValueError as `apply_rope` does.
    """
    return _rotate(k, shift_angles("shift_rope", k, shift, config, seq_len), config, 1.0)


def shift_angles(
    fn: str, k: Tensor, shift: int | Tensor | tuple[Tensor, Tensor], config: RopeConfig, seq_len: int | None
) -> Tensor:
    """How far `shift_rope` turns each pair: `[1, n]`, `[T, n]` or `[B, T, n]`; float64 of a pair `(from, to)`."""
    _check_x(fn, k, config)
    if isinstance(shift, tuple):
        if len(shift) != 2:
            raise ValueError(f"{fn}: shift must be a number, a tensor or (from, to), got {len(shift)} items")
        old, new = (
            _angles(fn, name, value, k, config, seq_len) for name, value in zip(("from", "to"), shift, strict=True)
        )
        return new.double() - old.double()
    if isinstance(shift, int) and not isinstance(shift, bool):
        return _products(torch.full((1,), shift, device=k.device), k, config, seq_len)
    return _angles(fn, "shift", shift, k, config, seq_len)


def cos_sin(angles: Tensor, x: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """`factor` times the cosines and sines of `angles`, in the dtype that `x` is turned in."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def _rotate(x: Tensor, angles: Tensor, config: RopeConfig, factor: float) -> Tensor:
    return turn(x, *cos_sin(angles, x, factor), config.interleaved)


def _angles(fn: str, name: str, positions: Any, x: Tensor, config: RopeConfig, seq_len: int | None) -> Tensor:
    """`[T, rotary_dim // 2]` or `[B, T, rotary_dim // 2]`."""
    if not isinstance(positions, Tensor):
        raise TypeError(f"{fn}: {name} must be an integer Tensor, got {type(positions).__name__}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"{fn}: {name} must have an integer dtype, got {positions.dtype}")
    batch, length = x.shape[:2]
    if positions.shape not in ((length,), (batch, length)):
        raise ValueError(f"{fn}: {name} must have shape [{length}] or [{batch}, {length}], got {list(positions.shape)}")
    if positions.device != x.device:
        raise ValueError(f"{fn}: {name} must be on {x.device}, got {positions.device}")
    return _products(positions, x, config, seq_len)


def _products(positions: Tensor, x: Tensor, config: RopeConfig, seq_len: int | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return positions.to(dtype)[..., None] * config.inverse_frequencies(seq_len=seq_len, device=x.device, dtype=dtype)


def _check_x(fn: str, x: Tensor, config: RopeConfig) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{fn}: expected a Tensor [B, T, H, D], got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{fn}: expected a floating-point Tensor, got {x.dtype}")
    if x.ndim != 4 or x.shape[-1] != config.head_dim:
        raise ValueError(f"{fn}: expected shape [B, T, H, {config.head_dim}], got {list(x.shape)}")


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_ramp(s: YarnScaling, dim: int, theta: float, like: Tensor) -> Tensor:
    """0 where a pair turns too often to be touched, 1 where it is interpolated."""

    def index(turns: float) -> float:
        return dim * math.log(s.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = index(s.beta_fast), index(s.beta_slow)
    if s.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(dim // 2, device=like.device).to(like.dtype) - low) / (high - low)).clamp(0, 1)


def _llama3(s: Llama3Scaling, inverse: Tensor) -> Tensor:
    length = s.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    kept = (length / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    blend = (1 - kept) * inverse / s.factor + kept * inverse
    slow, fast = wavelength > length / s.low_freq_factor, wavelength < length / s.high_freq_factor
    return torch.where(slow, inverse / s.factor, torch.where(fast, inverse, blend))


def _read_scaling(rope: Mapping[str, Any], top: Mapping[str, Any]) -> Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(_need(rope, "factor"))
    if kind == "dynamic":
        return DynamicScaling(_need(rope, "factor"), _need(top, "max_position_embeddings"))
    if kind not in ("yarn", "llama3"):
        raise ValueError(f"RopeConfig: rope_type must be default, linear, dynamic, yarn or llama3, got {kind!r}")
    length = top.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    length = length or _need(top, "max_position_embeddings")
    if kind == "llama3":
        return Llama3Scaling(
            _need(rope, "factor"), _need(rope, "low_freq_factor"), _need(rope, "high_freq_factor"), length
        )
    factor = rope.get("factor")
    return YarnScaling(
        factor if factor is not None else _need(top, "max_position_embeddings") / length,
        length,
        rope.get("beta_fast") or 32.0,
        rope.get("beta_slow") or 1.0,
        rope.get("attention_factor"),
        rope.get("mscale"),
        rope.get("mscale_all_dim"),
        rope.get("truncate", True),
    )


def _need(source: Mapping[str, Any], key: str) -> Any:
    if source.get(key) is None:
        raise ValueError(f"RopeConfig: the configuration has no {key}")
    return source[key]


def _positive(name: str, value: Any, integer: bool = False) -> None:
    kind = "int" if integer else "number"
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        raise TypeError(f"RopeConfig: {name} must be a positive {kind}, got {value!r}")
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"RopeConfig: {name} must be a positive {kind}, got {value!r}")


def _check_scaling(s: Scaling, dim: int, theta: float) -> None:
    if not isinstance(s, Scaling):
        raise TypeError(
            f"RopeConfig: scaling must be a LinearScaling, DynamicScaling, YarnScaling or Llama3Scaling, got {s!r}"
        )
    _positive("factor", s.factor)
    if isinstance(s, DynamicScaling):
        _positive("max_position_embeddings", s.max_position_embeddings, integer=True)
        if dim == 2:
            raise ValueError("RopeConfig: dynamic scaling needs rotary_dim > 2, got 2")
    if isinstance(s, YarnScaling | Llama3Scaling):
        _positive("original_max_position_embeddings", s.original_max_position_embeddings, integer=True)
    if isinstance(s, YarnScaling):
        _positive("beta_fast", s.beta_fast)
        _positive("beta_slow", s.beta_slow)
        if theta == 1:
            raise ValueError("RopeConfig: YaRN needs theta other than 1")
    if isinstance(s, Llama3Scaling) and not 0 < s.low_freq_factor < s.high_freq_factor:
        raise ValueError(
            "RopeConfig: llama3 scaling needs 0 < low_freq_factor < high_freq_factor, "
            f"got {s.low_freq_factor} and {s.high_freq_factor}"
        )
