"""Which backend serves a call, and why the others cannot."""

import functools
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256


class Call(NamedTuple):
    """What a backend needs to know about a call in order to refuse it."""

    fn: str
    device: torch.device
    dtype: torch.dtype
    head_dim: int


class BackendError(ValueError):
    """No backend can serve the call. The message lists every backend's reasons."""


class Explanation(NamedTuple):
    """Which backend a call would use (`None`: no backend can) and why each other one would not serve it."""

    fn: str
    requested: str
    chosen: str | None
    reasons: dict[str, list[str]]

    def __str__(self) -> str:
        head = f"{self.fn}: backend={self.requested!r} -> {self.chosen or 'none'}"
        return "\n".join(
            [head, *(f"  {name}: {'; '.join(why) or 'can serve this call'}" for name, why in self.reasons.items())]
        )


class _Explained(Exception):
    def __init__(self, explanation: Explanation):
        self.explanation = explanation


_explaining = False


def reference_reasons(call: Call) -> list[str]:
    return []


def portable_reasons(call: Call) -> list[str]:
    return []


def cpu_reasons(call: Call) -> list[str]:
    if call.device.type != "cpu":
        return [f"tensors are on {call.device.type}, the C kernels need cpu"]
    if call.dtype not in KERNEL_DTYPES:
        return [f"dtype {_short(call.dtype)} is not one of float16, bfloat16, float32"]
    return [why] if (why := _no_c_kernels()) else []


def triton_reasons(call: Call) -> list[str]:
    reasons = missing("triton", "triton")
    if not reasons and call.device.type != "cuda" and not _interpreting():
        reasons.append(f"tensors are on {call.device.type}, Triton needs cuda")
    return reasons + _gpu_reasons(call)


def cuda_reasons(call: Call) -> list[str]:
    """Of CUDA C++ stages between Triton ones."""
    return cuda_alone_reasons(call) + missing("triton", "triton")


def cuda_alone_reasons(call: Call) -> list[str]:
    """Of CUDA C++ kernels that need no Triton."""
    reasons = [] if call.device.type == "cuda" else [f"tensors are on {call.device.type}, CUDA kernels need cuda"]
    return reasons + missing("cuda.core", "cuda") + _gpu_reasons(call)


def _gpu_reasons(call: Call) -> list[str]:
    reasons = []
    if call.device.type == "cuda" and torch.cuda.get_device_capability(call.device) < (8, 0):
        reasons.append("needs compute capability 8.0 or later")
    if call.dtype not in KERNEL_DTYPES:
        reasons.append(f"dtype {_short(call.dtype)} is not one of float16, bfloat16, float32")
    if call.head_dim > MAX_HEAD_DIM:
        reasons.append(f"head size {call.head_dim} is over {MAX_HEAD_DIM}")
    return reasons


def kernels(path: str) -> ModuleType:
    """`attnlab.kernels.<path>`, looked up by name, so that importing attnlab never needs Triton."""
    return importlib.import_module("attnlab.kernels." + path)


Reasons = Callable[[Call], list[str]]


def pick(call: Call, requested: str, backends: Mapping[str, Reasons]) -> str:
    """The backend that serves `call`.

    `backends` maps each backend of this function to its reasons, in the order `"auto"` tries them. An explicit
    request is served by that backend or refused with `BackendError`; it never falls back. `"auto"` takes a GPU
    backend only where `kernels/verified.json` lists it as passing on the GPU at hand.
    """
    if requested != "auto" and requested not in backends:
        options = ", ".join(repr(name) for name in ("auto", *backends))
        raise ValueError(f"{call.fn}: backend must be one of {options}, got {requested!r}")
    if not _explaining:
        if requested == "auto":
            for name, reasons in backends.items():
                if not _unverified(call, name) and not reasons(call):
                    return name
        elif not backends[requested](call):
            return requested
    return _explain_or_raise(call, requested, backends)


def _explain_or_raise(call: Call, requested: str, backends: Mapping[str, Reasons]) -> str:
    why = {name: reasons(call) for name, reasons in backends.items()}
    if requested == "auto":
        why = {name: reasons or _unverified(call, name) for name, reasons in why.items()}
    able = [name for name, reasons in why.items() if not reasons]
    chosen = next(iter(able), None) if requested == "auto" else (requested if requested in able else None)
    explanation = Explanation(call.fn, requested, chosen, why)
    if _explaining:
        raise _Explained(explanation)
    raise BackendError(
        f"{call.fn}: backend={requested!r} cannot serve this call\n" + str(explanation).split("\n", 1)[1]
    )


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `fn(*args, **kwargs)` would use, and why the others would not serve it.

    `fn` is any public function of this library with a `backend` argument; its arguments are validated as in a
    real call, and nothing is computed.
    """
    global _explaining
    _explaining = True
    try:
        fn(*args, **kwargs)
    except _Explained as e:
        return e.explanation
    finally:
        _explaining = False
    raise TypeError(f"explain: {getattr(fn, '__name__', fn)!r} does not choose a backend")


def _constant(fn: Callable[..., Any]) -> Callable[..., Any]:
    """What `torch.compiler.assume_constant_result` does, without its import of all of torch._dynamo."""
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def missing(module: str, extra: str) -> list[str]:
    """The reason that an optional package is not there, if it is not."""
    return [] if _installed(module) else [f"{module} is not installed (pip install attnlab[{extra}])"]


@functools.cache
def _find(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@_constant
def _installed(module: str) -> bool:
    return _find(module)


@_constant
def _no_c_kernels() -> str:
    from .kernels.cpu import module

    return module.missing()


@_constant
def _interpreting() -> bool:
    """Whether Triton runs on the CPU (`TRITON_INTERPRET=1` set before the kernels are imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def _verified() -> frozenset[tuple[str, str, str]]:
    data = json.loads(resources.files("attnlab.kernels").joinpath("verified.json").read_text())
    return frozenset((row["kernel"], row["backend"], row["gpu"]) for row in data["verified"])


@_constant
def _verified_on(fn: str, backend: str, device: torch.device) -> bool:
    return (fn, backend, torch.cuda.get_device_name(device)) in _verified()


def _unverified(call: Call, backend: str) -> list[str]:
    if backend in ("reference", "portable", "cpu", "flash"):
        return []
    if call.device.type != "cuda":
        return [f"Triton's interpreter is for tests; backend={backend!r} asks for it by name"]
    if _verified_on(call.fn, backend, call.device):
        return []
    return [f"not verified on this GPU (kernels/verified.json); backend={backend!r} asks for it by name"]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_qkv(
    fn: str, q: Tensor, k: Tensor, v: Tensor | None = None, *, paged: bool = False, kv: tuple[str, str] = ("k", "v")
) -> None:
    """Ranks, shapes, dtypes, devices of `q [B, Tq, Hq, D]`, `k, v [B, Tk, Hkv, D]`; paged: `[pages, size, Hkv, D]`.

    `kv` are the names that keys and values have in messages.
    """
    named = [("q", q), (kv[0], k)] + ([(kv[1], v)] if v is not None else [])
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{fn}: {name} must be a Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            shape = "[pages, page_size, H, D]" if paged and x is not q else "[B, T, H, D]"
            raise ValueError(f"{fn}: {name} must have shape {shape}, got {list(x.shape)}")
        if not x.dtype.is_floating_point or x.dtype.itemsize < 2:
            raise TypeError(f"{fn}: {name} must be float16, bfloat16, float32 or float64, got {_short(x.dtype)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{fn}: {name} must have q's dtype {_short(q.dtype)}, got {_short(x.dtype)}")
        if x.device != q.device:
            raise ValueError(f"{fn}: {name} must be on q's device {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0] and not paged:
            raise ValueError(f"{fn}: {name} must have q's batch size {q.shape[0]}, got {x.shape[0]}")
        if x.shape[3] != q.shape[3]:
            raise ValueError(f"{fn}: {name} must have q's head size {q.shape[3]}, got {x.shape[3]}")
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(
                f"{fn}: {name} must have at least one head and a head size of at least 1, got {list(x.shape)}"
            )
    if v is not None and v.shape != k.shape:
        raise ValueError(f"{fn}: {kv[1]} must have {kv[0]}'s shape {list(k.shape)}, got {list(v.shape)}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{fn}: q's heads must be a multiple of {kv[0]}'s heads {k.shape[2]}, got {q.shape[2]}")


def check_int(fn: str, name: str, value: Any, least: int) -> None:
    kind = {0: "a non-negative int", 1: "a positive int"}[least]
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt) or value < least:
        raise ValueError(f"{fn}: {name} must be {kind}, got {value!r}")


def check_ints(fn: str, name: str, values: Any) -> list[int]:
    """A sequence of ints, or an integer tensor of one dimension, as a list."""
    found = values.tolist() if isinstance(values, Tensor) else values
    if not isinstance(found, Sequence) or any(isinstance(n, bool) or not isinstance(n, int) for n in found):
        came = f"a {values.dtype} tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else repr(values)
        raise TypeError(f"{fn}: {name} must be a sequence of ints or an integer tensor of one dimension, got {came}")
    return list(found)


def check_integers(
    fn: str, name: str, x: Any, q: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]
) -> None:
    """An integer tensor of one of `dtypes` and of `shape`, on q's device."""
    kinds = " or ".join(_short(dtype) for dtype in dtypes)
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        raise TypeError(f"{fn}: {name} must be an {kinds} Tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.shape != shape:
        raise ValueError(f"{fn}: {name} must have shape {list(shape)}, got {list(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"{fn}: {name} must be on q's device {q.device}, got {x.device}")


def check_bool(fn: str, name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{fn}: {name} must be a bool, got {value!r}")


def check_scale(fn: str, scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, int | float | torch.SymFloat):
        raise TypeError(f"{fn}: scale must be a number or None, got {type(scale).__name__}")
    return float(scale)


def check_sinks(fn: str, sinks: Tensor | None, q: Tensor) -> None:
    if sinks is None:
        return
    if not isinstance(sinks, Tensor) or not sinks.dtype.is_floating_point:
        raise TypeError(
            f"{fn}: sinks must be a floating-point Tensor, got {getattr(sinks, 'dtype', type(sinks).__name__)}"
        )
    if sinks.shape != (q.shape[2],):
        raise ValueError(f"{fn}: sinks must have shape [{q.shape[2]}] (one per query head), got {list(sinks.shape)}")
    if sinks.device != q.device:
        raise ValueError(f"{fn}: sinks must be on q's device {q.device}, got {sinks.device}")
