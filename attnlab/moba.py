"""MoBA: block attention with a parameter-free top-k gate (arXiv 2502.13189)."""

import torch
from torch import Tensor

from .dispatch import (
    Call,
    Reasons,
    check_bool,
    check_int,
    check_qkv,
    check_scale,
    check_sinks,
    cpu_reasons,
    cuda_reasons,
    kernels,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from .full import fake_gradients, full_attention
from .kernels.moba.spec import Spec, cdiv, slots
from .moba_selection import MoBASelection, check_choices, check_selection
from .packs import check_values, pack, without_autocast
from .reference import moba as reference

BACKENDS: dict[str, Reasons] = {
    "cuda": cuda_reasons,
    "triton": triton_reasons,
    "cpu": cpu_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}
MODULES = {"cuda": "moba.launch", "triton": "moba.launch", "cpu": "cpu.moba", "portable": "moba.portable"}
# Who computes dense attention (all of it, once topk names every block) for backends that do not.
DENSE = {"cuda": "triton", "cpu": "portable"}
WORKSPACE_BYTES = 2 << 30


def moba_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    block_size: int,
    topk: int,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    routing: str = "head",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    sinks: Tensor | None = None,
    selection: MoBASelection | None = None,
    return_lse: bool = False,
    deterministic: bool = True,
    workspace_bytes: int = WORKSPACE_BYTES,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention over the blocks a parameter-free gate chooses for each query.

    Keys of a sequence are cut in blocks of `block_size`; a block's centroid is the float32 mean of its keys. A query
    attends its own block (causally) and the `topk - 1` earlier blocks with the largest `q . centroid`, ties to the
    lowest index, in one softmax. `topk=1` is the own block alone; `topk` of at least the number of blocks is full
    attention. No gradient flows through the choice.

    Args:
        q: `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only). Autocast casts nothing.
        k, v: `[B, Tk, Hkv, D]`, `Hq % Hkv == 0`. With `Tq < Tk` queries sit at the end, and route as those rows of the
            full computation would.
        block_size: keys per block, any positive int.
        topk: blocks per query, the own block included.
        causal: `False` drops the causal mask and the own block's privilege: the `topk` best of all blocks.
        scale: multiplies the softmax scores, not the gate's; `D ** -0.5` by default.
        cu_seqlens_q, cu_seqlens_k: `[S + 1]` int32, for `S` sequences packed along `T` with `B == 1`.
        routing: `"head"`, each query head chooses; `"group"`, the heads of a KV group sum their scores and share.
        sink_blocks, local_blocks: the first blocks, and the blocks before the own one, that every query attends on top
            of `topk`; they are no candidates of the gate.
        sinks: `[Hq]`, one logit per head in the softmax's denominator, and so in the lse, without a value.
        selection: a `MoBASelection` to replay in place of the gate, of the shape `moba_select` returns. A row names its
            own block first (causal only), then blocks before it (any, where not causal), in any order and each once, or
            -1. Its values are checked once per tensor, which on a GPU waits for it.
        return_lse: also return the `lse`, differentiable.
        deterministic: `True` promises bitwise equal reruns. `False` permits a backend to order sums freely; none does.
        workspace_bytes: bound on the partial results that the kernels hold at once.
        backend: `"auto"`, `"reference"`, `"portable"`, `"cpu"` (C, compiled on first use, with the portable gradients),
            `"triton"` or `"cuda"`.

    Returns:
        `out [B, Tq, Hq, D]` in q's dtype, and `lse [B, Tq, Hq]` float32 (natural log, of scaled scores) if asked for.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.

    A NaN in a query makes that row's output NaN. A NaN in a key makes its block's centroid NaN, which ranks above every
    number, so the rows that choose the block are NaN too: nothing is masked in silence.
    """
    fn = "moba_attention"
    check_qkv(fn, q, k, v)
    scale = check_scale(fn, scale, q.shape[3])
    spec = _spec(fn, block_size, topk, causal, scale, routing, sink_blocks, local_blocks, workspace_bytes)
    check_sinks(fn, sinks, q)
    check_bool(fn, "return_lse", return_lse)
    check_bool(fn, "deterministic", deterministic)
    cu = pack(fn, q, k, cu_seqlens_q, cu_seqlens_k, causal)
    spec = _within(spec, cu.max_k)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    replay = None if selection is None else check_selection(fn, selection, q, k, spec, cu)
    if name == "reference":
        if cu.given:
            check_values(fn, cu.cu_q, cu.cu_k, q.shape[1], k.shape[1], causal)
        if replay is not None:
            check_choices(fn, replay, cu.cu_q, cu.cu_k, k.shape[1], spec, cu.given)
        out, lse = without_autocast(reference.moba_attention)(
            q, k, v, block_size=block_size, topk=topk, causal=causal, scale=scale, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, routing=routing, sink_blocks=sink_blocks, local_blocks=local_blocks,
            sinks=sinks, indices=replay,
        )  # fmt: skip
        return (out, lse) if return_lse else out
    if replay is None and name != "cuda" and topk + sink_blocks + local_blocks >= cdiv(cu.max_k, block_size):
        return full_attention(
            q, k, v, causal=causal, scale=scale, sinks=sinks, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
            return_lse=return_lse, backend=DENSE.get(name, name),
        )  # fmt: skip
    packed = tuple(x.flatten(0, 1) for x in (q, k, v))
    indices = replay
    if indices is None:
        indices, _ = _select(
            packed[0].detach(), packed[1].detach(), cu.cu_q, cu.cu_k, *spec, cu.max_k, cu.given, False, name
        )
    replayed = replay is not None
    out, lse = _attention(*packed, sinks, indices, cu.cu_q, cu.cu_k, *spec, cu.max_k, cu.given, replayed, name)
    out, lse = out.view(q.shape), lse.view(q.shape[:3])
    return (out, lse) if return_lse else out


def moba_select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int,
    topk: int,
    causal: bool = True,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    routing: str = "head",
    sink_blocks: int = 0,
    local_blocks: int = 0,
    backend: str = "auto",
) -> MoBASelection:
    """The gate of `moba_attention` alone: same arguments, same errors. The result replays through `selection=`."""
    fn = "moba_select"
    check_qkv(fn, q, k)
    spec = _spec(fn, block_size, topk, causal, 1.0, routing, sink_blocks, local_blocks, WORKSPACE_BYTES)
    cu = pack(fn, q, k, cu_seqlens_q, cu_seqlens_k, causal)
    spec = _within(spec, cu.max_k)
    name = pick(Call(fn, q.device, q.dtype, q.shape[3]), backend, BACKENDS)
    q, k = q.detach(), k.detach()
    if name == "reference":
        if cu.given:
            check_values(fn, cu.cu_q, cu.cu_k, q.shape[1], k.shape[1], causal)
        found = without_autocast(reference.moba_select)(
            q, k, block_size=block_size, topk=topk, causal=causal, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, routing=routing, sink_blocks=sink_blocks, local_blocks=local_blocks,
        )  # fmt: skip
        return MoBASelection(found[0], found[1].float())
    packed = (x.flatten(0, 1) for x in (q, k))
    indices, scores = _select(*packed, cu.cu_q, cu.cu_k, *spec, cu.max_k, cu.given, True, name)
    shape = (*q.shape[:2], *indices.shape[1:])
    return MoBASelection(indices.view(shape), scores.view(shape))


def _spec(
    fn: str,
    block_size: int,
    topk: int,
    causal: bool,
    scale: float,
    routing: str,
    sink_blocks: int,
    local_blocks: int,
    workspace_bytes: int,
) -> Spec:
    check_int(fn, "block_size", block_size, 1)
    check_int(fn, "topk", topk, 1)
    check_bool(fn, "causal", causal)
    if routing not in ("head", "group"):
        raise ValueError(f"{fn}: routing must be 'head' or 'group', got {routing!r}")
    check_int(fn, "sink_blocks", sink_blocks, 0)
    check_int(fn, "local_blocks", local_blocks, 0)
    if local_blocks and not causal:
        raise ValueError(f"{fn}: local_blocks needs causal=True, got local_blocks={local_blocks}")
    check_int(fn, "workspace_bytes", workspace_bytes, 1)
    return Spec(block_size, topk, causal, scale, routing == "group", sink_blocks, local_blocks, workspace_bytes)


def _within(spec: Spec, max_k: int) -> Spec:
    """A block as long as the longest sequence is as good as a longer one, and its bounds fit kernels' integers."""
    return spec._replace(block_size=min(spec.block_size, max(max_k, 1)))


def _gpu(backend: str) -> tuple[str, ...]:
    return (backend,) if backend in ("triton", "cuda") else ()


@torch.library.custom_op("attnlab::moba_select", mutates_args=())
@without_autocast
def _select(
    q: Tensor,
    k: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block_size: int,
    topk: int,
    causal: bool,
    scale: float,
    group: bool,
    sink_blocks: int,
    local_blocks: int,
    workspace_bytes: int,
    max_k: int,
    given: bool,
    want_scores: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if given:
        check_values("moba_select" if want_scores else "moba_attention", cu_q, cu_k, len(q), len(k), causal)
    spec = Spec(block_size, topk, causal, scale, group, sink_blocks, local_blocks, workspace_bytes)
    n = slots(spec, max_k)
    indices, scores = kernels(MODULES[backend]).select(
        q, k, cu_q, cu_k, spec, n, *_gpu(backend), want_scores=want_scores
    )
    return indices, q.new_empty(0, dtype=torch.float32) if scores is None else scores


@_select.register_fake
def _(q, k, cu_q, cu_k, *options):  # type: ignore[no-untyped-def]
    *fields, max_k, _, want_scores, _ = options
    spec = Spec(*fields)
    shape = (q.shape[0], k.shape[1] if spec.group else q.shape[1], slots(spec, max_k).total)
    scores = q.new_empty(shape if want_scores else 0, dtype=torch.float32)
    return q.new_empty(shape, dtype=torch.int32), scores


@torch.library.custom_op("attnlab::moba_attention", mutates_args=())
@without_autocast
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block_size: int,
    topk: int,
    causal: bool,
    scale: float,
    group: bool,
    sink_blocks: int,
    local_blocks: int,
    workspace_bytes: int,
    max_k: int,
    given: bool,
    replayed: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if given:
        check_values("moba_attention", cu_q, cu_k, len(q), len(k), causal)
    spec = Spec(block_size, topk, causal, scale, group, sink_blocks, local_blocks, workspace_bytes)
    if replayed:
        check_choices("moba_attention", indices, cu_q, cu_k, len(k), spec, given)
    n, indices = slots(spec, max_k), indices.flatten(0, -3)
    return kernels(MODULES[backend]).forward(q, k, v, sinks, indices, cu_q, cu_k, spec, n, *_gpu(backend))[:2]


@_attention.register_fake
def _(q, k, v, *options):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.custom_op("attnlab::moba_attention_backward", mutates_args=())
@without_autocast
def _attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    indices: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    block_size: int,
    topk: int,
    causal: bool,
    scale: float,
    group: bool,
    sink_blocks: int,
    local_blocks: int,
    workspace_bytes: int,
    max_k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    spec = Spec(block_size, topk, causal, scale, group, sink_blocks, local_blocks, workspace_bytes)
    n, indices = slots(spec, max_k), indices.flatten(0, -3)
    dq, dk, dv, dsinks = kernels(MODULES[backend]).backward(
        dout, dlse, q, k, v, sinks, out, lse, indices, cu_q, cu_k, spec, n, *_gpu(backend)
    )
    return dq, dk, dv, lse.new_empty(0) if dsinks is None else dsinks


@_attention_backward.register_fake
def _(dout, dlse, q, k, v, sinks, out, lse, *_):  # type: ignore[no-untyped-def]
    return fake_gradients(q, k, v, sinks, lse)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, sinks, indices, cu_q, cu_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, sinks, indices, cu_q, cu_k, *output)
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dlse):  # type: ignore[no-untyped-def]
    q, k, v, sinks, indices, cu_q, cu_k, out, lse = ctx.saved_tensors
    *options, _, _, backend = ctx.options
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = _attention_backward(
        dout, dlse, q, k, v, sinks, out, lse, indices, cu_q, cu_k, *options, backend
    )
    return dq, dk, dv, None if sinks is None else dsinks.to(sinks.dtype), *[None] * 15


_attention.register_autograd(_autograd, setup_context=_setup)
