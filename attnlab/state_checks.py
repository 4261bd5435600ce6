"""What `merge_states` and `append_token` ask of their arguments."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .packs import capturing, remember, unchanged
from .views import overlap, same

State = tuple[Tensor, Tensor]

FN = "merge_states"
FP8 = torch.float8_e4m3fn
RESULTS = (torch.float32, torch.float16, torch.bfloat16, FP8)


def stacked(name: str, x: Any) -> Tensor:
    if isinstance(x, Tensor) or not isinstance(x, Sequence) or not all(isinstance(y, Tensor) for y in x):
        return x
    for i, y in enumerate(x):
        for what in ("shape", "dtype", "device"):
            first, came = getattr(x[0], what), getattr(y, what)
            if came != first:
                error = TypeError if what == "dtype" else ValueError
                raise error(f"{FN}: {name}[{i}] must have the {what} {first} of {name}[0], got {came}")
    if not x:
        raise ValueError(f"{FN}: {name} must hold at least one tensor, got none")
    return torch.stack(list(x))


def check_floats(fn: str, **named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point or x.dtype.itemsize < 2:
            came = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"{fn}: {name} must be a floating-point Tensor of 16 bits or more, got {came}")


def check_base(fn: str, lse_base: Any) -> bool:
    """Whether lses are in log2."""
    if lse_base not in ("e", "2"):
        raise ValueError(f"{fn}: lse_base must be 'e' or '2', got {lse_base!r}")
    return bool(lse_base == "2")


def check_indptr(indptr: Any, outs: Tensor) -> int | None:
    if indptr is None:
        return None
    if not isinstance(indptr, Tensor) or indptr.dtype not in (torch.int32, torch.int64):
        came = getattr(indptr, "dtype", type(indptr).__name__)
        raise TypeError(f"{FN}: indptr must be an int32 or int64 Tensor, got {came}")
    if indptr.ndim != 1 or not len(indptr):
        raise ValueError(f"{FN}: indptr must have shape [rows + 1], got {list(indptr.shape)}")
    if indptr.device != outs.device:
        raise ValueError(f"{FN}: indptr must be on the device of outs {outs.device}, got {indptr.device}")
    return len(indptr) - 1


def check_factor(name: str, x: Any, outs: Tensor) -> tuple[float, Tensor | None]:
    """A number and a tensor whose product the factor is."""
    if x is None:
        return 1.0, None
    if not isinstance(x, Tensor):
        return _check_positive(name, x), None
    if not x.dtype.is_floating_point:
        raise TypeError(f"{FN}: {name} must be a floating-point Tensor, got {x.dtype}")
    if x.shape != outs.shape[:1]:
        raise ValueError(f"{FN}: {name} must have shape [{outs.shape[0]}] (one per shard), got {list(x.shape)}")
    if x.device != outs.device:
        raise ValueError(f"{FN}: {name} must be on the device of outs {outs.device}, got {x.device}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{FN}: {name} must not require gradients: it gets none")
    return 1.0, x


def _check_positive(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymFloat):
        raise TypeError(f"{FN}: {name} must be a number, a Tensor or None, got {type(x).__name__}")
    if not 0 < x < math.inf:
        raise ValueError(f"{FN}: {name} must be positive and finite, got {x}")
    return float(x)


def check_target(fn: str, out: Any, shape: Sequence[int], like: Tensor, lse_dtype: torch.dtype, graded: bool) -> None:
    """`out=`: shapes, the lse's dtype and devices. Memory is looked at inside the ops."""
    if not isinstance(out, Sequence) or len(out) != 2 or not all(isinstance(x, Tensor) for x in out):
        raise TypeError(f"{fn}: out must be two Tensors (out, lse), got {type(out).__name__}")
    for name, x, wanted in (("out[0]", out[0], shape), ("out[1]", out[1], shape[:-1])):
        if x.shape != torch.Size(wanted):
            raise ValueError(f"{fn}: {name} must have shape {list(wanted)}, got {list(x.shape)}")
        if x.device != like.device:
            raise ValueError(f"{fn}: {name} must be on the device {like.device}, got {x.device}")
    if out[1].dtype != lse_dtype:
        raise TypeError(f"{fn}: out[1] must be {lse_dtype}, got {out[1].dtype}")
    if out[0].stride(-1) != 1 and out[0].shape[-1] > 1:
        raise ValueError(f"{fn}: out[0] must have a dense last dimension, got strides {list(out[0].stride())}")
    if graded or (torch.is_grad_enabled() and any(x.requires_grad for x in out)):
        raise ValueError(f"{fn}: with out there are no gradients: call it under torch.no_grad()")


def check_dtype(dtype: Any, out: State | None, outs: Tensor, graded: bool) -> torch.dtype:
    given = out[0].dtype if out is not None else outs.dtype
    dtype = given if dtype is None else dtype
    allowed = (torch.float64,) if outs.dtype == torch.float64 else RESULTS
    if dtype not in allowed:
        names = ", ".join(str(x).removeprefix("torch.") for x in allowed)
        raise TypeError(f"{FN}: out_dtype must be one of {names} for {outs.dtype} outs, got {dtype}")
    if out is not None and given != dtype:
        raise TypeError(f"{FN}: out[0] must be out_dtype {dtype}, got {given}")
    if dtype == FP8 and graded:
        raise ValueError(f"{FN}: {dtype} results have no gradients: call it under torch.no_grad()")
    return dtype


def check_out_scale(scale: Any, dtype: torch.dtype, outs: Tensor) -> Tensor | None:
    if (scale is None) == (dtype == FP8):
        raise ValueError(f"{FN}: out_scale goes with float8_e4m3fn results and no others, got {scale} for {dtype}")
    if scale is None:
        return None
    if not isinstance(scale, Tensor):
        return torch.full((1,), _check_positive("out_scale", scale), dtype=torch.float32, device=outs.device)
    if scale.dtype != torch.float32 or scale.numel() != 1:
        raise ValueError(
            f"{FN}: out_scale must be a number or a float32 Tensor of one element, "
            f"got {scale.dtype} {list(scale.shape)}"
        )
    if scale.device != outs.device:
        raise ValueError(f"{FN}: out_scale must be on the device of outs {outs.device}, got {scale.device}")
    return scale.detach().view(1)


def check_values(indptr: Tensor | None, lse_scale: Tensor | None, temperature: Tensor | None, entries: int) -> None:
    """What tensors hold. Runs inside the ops, so compiled callers are checked too; once until one of them changes."""
    if indptr is not None and not capturing(indptr) and not unchanged(indptr, (), (FN, entries)):
        values = indptr.tolist()
        if values[0] != 0 or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{FN}: indptr must start at 0 and never fall, got {values}")
        if values[-1] != entries:
            raise ValueError(f"{FN}: indptr must end at {entries} (the number of entries), got {values[-1]}")
        remember(indptr, (), (FN, entries))
    for name, x in (("lse_scale", lse_scale), ("temperature", temperature)):
        if x is None or capturing(x) or unchanged(x, (), (FN,)):
            continue
        wrong = ~((x > 0) & (x < math.inf))
        if bool(wrong.any()):
            n = int(wrong.int().argmax())
            raise ValueError(f"{FN}: {name}[{n}] must be positive and finite, got {float(x[n])}")
        remember(x, (), (FN,))


def check_memory(fn: str, target: State, inputs: dict[str, Tensor], places: tuple[str, ...]) -> None:
    """What is written lies in memory of its own, or each is one `x[n]` of the input that `places` names for it."""
    if overlap(*target) or any(n > 1 and not step for x in target for n, step in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"{fn}: out must not have two elements in one place")
    for i, x in enumerate(target):
        for name, y in inputs.items():
            if overlap(x, y) and not (name in places[i : i + 1] and _is_one_of(x, y)):
                raise ValueError(f"{fn}: out[{i}] overlaps {name}, and not as a whole state of it")


def _is_one_of(x: Tensor, xs: Tensor) -> bool:
    return any(same(x, y) and not overlap(x, xs[:n]) and not overlap(x, xs[n + 1 :]) for n, y in enumerate(xs))
