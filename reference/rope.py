"""Rotary positions from their definitions: scalar arithmetic for the frequencies, complex numbers for the turn."""

import math

import torch
from einops import rearrange
from torch import Tensor


def default_frequencies(theta: float, dim: int) -> list[float]:
    """RoFormer (arXiv 2104.09864), section 3.2.2: pair `i` turns by `theta^(-2i / dim)` per position."""
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def linear_frequencies(theta: float, dim: int, factor: float) -> list[float]:
    """Position interpolation (arXiv 2306.15595): every position is divided by `factor`."""
    return [f / factor for f in default_frequencies(theta, dim)]


def dynamic_frequencies(theta: float, dim: int, factor: float, trained: int, length: int) -> list[float]:
    """Dynamic NTK: past the trained length theta grows, so that slow pairs are interpolated and the fastest is kept."""
    stretch = factor * max(length, trained) / trained - (factor - 1)
    return default_frequencies(theta * stretch ** (dim / (dim - 2)), dim)


def yarn_frequencies(
    theta: float, dim: int, factor: float, trained: int, fast: float = 32, slow: float = 1, truncate: bool = True
) -> list[float]:
    """YaRN (arXiv 2309.00071), section 3.2: pairs that turn fewer than `slow` times within the trained length are
    interpolated, those that turn more than `fast` times are kept, with a ramp over the pair's index between."""

    def pair_turning(times: float) -> float:
        return dim * math.log(trained / (2 * math.pi * times)) / (2 * math.log(theta))

    low, high = pair_turning(fast), pair_turning(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    mixed = []
    for i, f in enumerate(default_frequencies(theta, dim)):
        interpolated = min(max((i - low) / (high - low), 0.0), 1.0)
        mixed.append(f / factor * interpolated + f * (1 - interpolated))
    return mixed


def llama3_frequencies(theta: float, dim: int, factor: float, trained: int, low: float, high: float) -> list[float]:
    """Llama 3.1: pairs that turn fewer than `low` times within the trained length are interpolated, those that turn
    more than `high` times are kept, and the rest are blended by how often they turn."""
    mixed = []
    for f in default_frequencies(theta, dim):
        turns = trained * f / (2 * math.pi)
        kept = min(max((turns - low) / (high - low), 0.0), 1.0)
        mixed.append(f / factor * (1 - kept) + f * kept)
    return mixed


def apply_rope(
    x: Tensor, positions: Tensor, frequencies: list[float], attention_factor: float = 1.0, interleaved: bool = False
) -> Tensor:
    """Turn the first `2 * len(frequencies)` dimensions of `x [b, t, h, d]` for `positions [t]` or `[b, t]`, in float64.

    Pair `i` is dimensions `(2i, 2i + 1)` when interleaved, else `(i, i + len(frequencies))`; the rest is left alone.
    """
    angle = positions.to(torch.float64)[..., None] * torch.tensor(frequencies, dtype=torch.float64, device=x.device)
    return turn(x, angle, attention_factor, interleaved)


def turn(x: Tensor, angle: Tensor, attention_factor: float = 1.0, interleaved: bool = False) -> Tensor:
    """Turn pair `i` of `x [b, t, h, d]` by `angle [t, i]` or `[b, t, i]` radians, in float64."""
    angle = angle.to(torch.float64)
    by = torch.polar(torch.full_like(angle, attention_factor), angle)
    rotary, rest = x.to(torch.float64).split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], -1)
    pairs = "(p two)" if interleaved else "(two p)"
    point = torch.complex(*rearrange(rotary, f"b t h {pairs} -> two b t h p", two=2))
    turned = point * (by[:, None] if by.ndim == 2 else by[:, :, None])
    rotary = rearrange([turned.real, turned.imag], f"two b t h p -> b t h {pairs}")
    return torch.cat([rotary, rest], -1).to(x.dtype)


def shift_rope(x: Tensor, delta: Tensor, frequencies: list[float], interleaved: bool = False) -> Tensor:
    """Move keys that were rotated for one position to another, `delta [t]` or `[b, t]` further on."""
    return apply_rope(x, delta, frequencies, 1.0, interleaved)
