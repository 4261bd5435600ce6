"""A new token's key joins the state of the previous ones: the end of a decode step that began before its key came."""

import torch
from torch import Tensor

from .dispatch import Call, check_qkv, check_scale, kernels, pick
from .packs import without_autocast
from .reference import states as reference
from .state_checks import State, check_base, check_floats, check_memory, check_target
from .states import BACKENDS, MODULES, dense, into
from .views import folded

FN = "append_token"


def append_token(
    state: State,
    q: Tensor,
    k_new: Tensor,
    v_new: Tensor,
    *,
    scale: float | None = None,
    lse_base: str = "e",
    out: State | None = None,
    backend: str = "auto",
) -> State:
    """The state of each query over the previous keys and its own new one (arXiv 2405.01814, section 4.2), in one pass.

    Args:
        state: `out [B, Tq, Hq, D]` in q's dtype or float32, `lse [B, Tq, Hq]` float32 (both float64 with float64 q), of
            scores with the same `scale`. `-inf` or `+inf`: no previous keys, and the `out` there is not read.
        q: `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only).
        k_new, v_new: `[B, Tq, Hkv, D]`, `Hq % Hkv == 0`: one key and value for each query.
        scale: multiplies the scores; `D ** -0.5` by default.
        lse_base: `"e"`, or `"2"` for a state whose lse is in log2; so is the one returned.
        out: `(out, lse)` to write to, `out` in q's dtype or float32, of any strides but with a dense last dimension.
            May be the state itself, and may share no other memory with the inputs. Not with gradients.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` (C), `"triton"` or `"cuda"` (C++). Gradients are the
            portable backend's.

    Returns:
        `out [B, Tq, Hq, D]` in the dtype of the state's and `lse [B, Tq, Hq]`; those given as `out` if there are any.
        Differentiable in the state, `q`, `k_new` and `v_new`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.
    """
    if not isinstance(state, tuple | list) or len(state) != 2:
        raise TypeError(f"{FN}: state must be two Tensors (out, lse), got {type(state).__name__}")
    check_qkv(FN, q, k_new, v_new, kv=("k_new", "v_new"))
    if k_new.shape[1] != q.shape[1]:
        raise ValueError(f"{FN}: k_new must hold one key per query, {q.shape[1]}, got {k_new.shape[1]}")
    check_floats(FN, **{"state[0]": state[0], "state[1]": state[1]})
    before, lse = state
    acc = torch.promote_types(q.dtype, torch.float32)
    for name, x, shape, dtypes in (
        ("state[0]", before, q.shape, (q.dtype, acc)),
        ("state[1]", lse, q.shape[:3], (acc,)),
    ):
        if x.shape != shape:
            raise ValueError(f"{FN}: {name} must have shape {list(shape)}, got {list(x.shape)}")
        if x.dtype not in dtypes:
            raise TypeError(f"{FN}: {name} must be {' or '.join(map(str, dict.fromkeys(dtypes)))}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{FN}: {name} must be on q's device {q.device}, got {x.device}")
    scale, base2 = check_scale(FN, scale, q.shape[3]), check_base(FN, lse_base)
    if out is not None:
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in (before, lse, q, k_new, v_new))
        check_target(FN, out, q.shape, q, acc, graded)
        if out[0].dtype not in (q.dtype, acc):
            raise TypeError(f"{FN}: out[0] must be {q.dtype} or {acc}, got {out[0].dtype}")
    name = pick(Call(FN, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    if name == "reference":
        found = without_autocast(reference.append_token)(before, lse, q, k_new, v_new, scale, base2)
        if out is None:
            return found
        _check_memory(out, before, lse, q, k_new, v_new)
        return into(out, found)
    if out is None:
        return _append(before, lse, q, k_new, v_new, scale, base2, name)
    _append_out(before, lse, q, k_new, v_new, *out, scale, base2, name)
    return out[0], out[1]


def _check_memory(out: State, before: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    inputs = {"state[0]": before[None], "state[1]": lse[None], "q": q, "k_new": k, "v_new": v}
    check_memory(FN, out, inputs, ("state[0]", "state[1]"))


def _launch(
    before: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    base2: bool,
    out: Tensor,
    to_lse: Tensor,
    backend: str,
) -> None:
    if out.numel():
        given = (*map(dense, (before, q, k, v)), lse, out, to_lse)
        for o, some_q, some_k, some_v, x, to, to_x in folded(q.shape[:2], 1, *((x, 0) for x in given)):
            kernels(MODULES[backend]).append(o, x, some_q, some_k, some_v, scale, base2, to, to_x)


@torch.library.custom_op("attnlab::append_token", mutates_args=())
@without_autocast
def _append(
    before: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, base2: bool, backend: str
) -> tuple[Tensor, Tensor]:
    out, joint = before.new_empty(before.shape), lse.new_empty(lse.shape)
    _launch(before, lse, q, k, v, scale, base2, out, joint, backend)
    return out, joint


@_append.register_fake
def _(before: Tensor, lse: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return before.new_empty(before.shape), lse.new_empty(lse.shape)


@torch.library.custom_op("attnlab::append_token_out", mutates_args=("out", "joint"))
@without_autocast
def _append_out(
    before: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    joint: Tensor,
    scale: float,
    base2: bool,
    backend: str,
) -> None:
    _check_memory((out, joint), before, lse, q, k, v)
    _launch(before, lse, q, k, v, scale, base2, out, joint, backend)


@_append_out.register_fake
def _(before: Tensor, *_: object) -> None:
    return None


@torch.library.custom_op("attnlab::append_token_backward", mutates_args=())
@without_autocast
def _append_backward(
    dout: Tensor,
    dlse: Tensor | None,
    before: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    scale: float,
    base2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = (x if x is None else x.flatten(0, 1) for x in (dout, dlse, before, lse, q, k, v))
    grads = kernels(MODULES["portable"]).append_backward(*rows, scale, base2, out.flatten(0, 1))
    return tuple(g.contiguous().view(x.shape) for g, x in zip(grads, (before, lse, q, k, v), strict=True))


@_append_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, before: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (before, lse, q, k, v))


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, ctx.scale, ctx.base2, _ = inputs
    ctx.save_for_backward(*tensors, output[0])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    dout = torch.zeros_like(ctx.saved_tensors[0]) if dout is None else dout
    return *_append_backward(dout, dlse, *ctx.saved_tensors, ctx.scale, ctx.base2), None, None, None


_append.register_autograd(_autograd, setup_context=_setup)
