"""How much a question attends each token of its context: what FusionRAG recomputes first."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dispatch import (
    Call,
    Reasons,
    check_ints,
    check_qkv,
    check_scale,
    pick,
    portable_reasons,
    reference_reasons,
    triton_reasons,
)
from ..kernels.fusionrag import portable_importance
from ..packs import capturing, remember, unchanged, without_autocast
from ..reference import fusionrag as reference

_BACKENDS: dict[str, Reasons] = {
    "triton": triton_reasons,
    "portable": portable_reasons,
    "reference": reference_reasons,
}
NORMALIZE = ("chunk", "context")


def token_importance(
    q: Tensor | Sequence[Tensor],
    k: Tensor | Sequence[Tensor],
    chunks: Sequence[int] | Tensor,
    *,
    q_lengths: Sequence[int] | Tensor | None = None,
    normalize: str = "chunk",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Column sums of the softmax of a question's queries over cached chunks (arXiv 2601.12904), never held whole.

    Args:
        q: the question's queries `[B, Tq, Hq, D]`, float16, bfloat16, float32 (float64: reference and portable only);
            or a sequence of them, one per layer, whose scores are summed.
        k: the context's keys `[B, Tk, Hkv, D]`, `Hq % Hkv == 0`; or as many of them. All positions must be rotated.
        chunks: where chunks begin and end, never falling: `C + 1` ints, or an int32 tensor `[C + 1]` or `[B, C + 1]`.
            Keys outside `[chunks[0], chunks[-1])` are not read and get 0; a chunk may be empty. A tensor's values are
            read once per tensor.
        q_lengths: `[B]` ints or int32: how many of the queries of each row are a question's; the rest are not read.
        normalize: the softmax runs over each `"chunk"` (FusionRAG) or over the whole `"context"` (ProphetKV).
        scale: multiplies the scores; `D ** -0.5` by default.
        backend: `"auto"`, `"reference"`, `"portable"` or `"triton"`.

    Returns:
        `[B, Tk]` float32 (float64 for float64), summed over queries, heads and layers. Scores carry no gradient.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
        BackendError: an explicit backend cannot serve this call.
    """
    fn = "token_importance"
    qs, ks = _layers(fn, "q", q), _layers(fn, "k", k)
    _check_layers(fn, qs, ks)
    if normalize not in NORMALIZE:
        raise ValueError(f"{fn}: normalize must be 'chunk' or 'context', got {normalize!r}")
    scale = check_scale(fn, scale, qs[0].shape[3])
    device = qs[0].device
    chunks = _offsets(fn, chunks, ks[0])
    if q_lengths is not None:
        q_lengths = _lengths(fn, q_lengths, qs[0])
    name = pick(Call(fn, device, qs[0].dtype, qs[0].shape[3]), backend, _BACKENDS)
    return _importance(chunks, qs, ks, q_lengths, normalize == "chunk", scale, name)


def _layers(fn: str, name: str, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
    found = [x] if isinstance(x, Tensor) else list(x) if isinstance(x, Sequence) else [x]
    for layer in found:
        if not isinstance(layer, Tensor):
            raise TypeError(f"{fn}: {name} must be a Tensor or a sequence of them, got {type(layer).__name__}")
    if not found:
        raise ValueError(f"{fn}: {name} must have at least one layer, got none")
    return [layer.detach() for layer in found]


def _check_layers(fn: str, q: list[Tensor], k: list[Tensor]) -> None:
    if len(q) != len(k):
        raise ValueError(f"{fn}: k must have as many layers as q {len(q)}, got {len(k)}")
    for ql, kl in zip(q, k, strict=True):
        check_qkv(fn, ql, kl)
        for name, x, first in (("q", ql, q[0]), ("k", kl, k[0])):
            if x.shape != first.shape:
                raise ValueError(f"{fn}: every layer's {name} must have shape {list(first.shape)}, got {list(x.shape)}")
            if x.dtype != first.dtype or x.device != first.device:
                raise TypeError(f"{fn}: every layer's {name} must be {first.dtype} on {first.device}, got {x.dtype} on "
                                f"{x.device}")  # fmt: skip


def _offsets(fn: str, chunks: Sequence[int] | Tensor, k: Tensor) -> Tensor:
    batch, tk = k.shape[:2]
    if isinstance(chunks, Tensor):
        _check_int32(fn, "chunks", chunks, k)
        if chunks.ndim not in (1, 2) or chunks.shape[-1] < 2 or chunks.shape[:-1] not in ((), (batch,)):
            raise ValueError(f"{fn}: chunks must have shape [C + 1] or [{batch}, C + 1], got {list(chunks.shape)}")
        return chunks
    values = check_ints(fn, "chunks", chunks)
    if len(values) < 2:
        raise ValueError(f"{fn}: chunks must be C + 1 offsets of at least one chunk, got {values}")
    _check_rising(fn, [values], tk)
    return _known(values, k, ("chunks", tk))


def _lengths(fn: str, lengths: Sequence[int] | Tensor, q: Tensor) -> Tensor:
    batch, tq = q.shape[:2]
    if isinstance(lengths, Tensor):
        _check_int32(fn, "q_lengths", lengths, q)
        if lengths.shape != (batch,):
            raise ValueError(f"{fn}: q_lengths must have shape [{batch}], got {list(lengths.shape)}")
        return lengths
    values = check_ints(fn, "q_lengths", lengths)
    if len(values) != batch:
        raise ValueError(f"{fn}: q_lengths must be {batch} ints, got {values}")
    _check_within(fn, values, tq)
    return _known(values, q, ("q_lengths", tq))


def _check_int32(fn: str, name: str, x: Tensor, like: Tensor) -> None:
    if x.dtype != torch.int32:
        raise TypeError(f"{fn}: {name} must be a sequence of ints or an int32 Tensor, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{fn}: {name} must be on q's device {like.device}, got {x.device}")


def _check_rising(fn: str, rows: list[list[int]], tk: int) -> None:
    for values in rows:
        if values[0] < 0 or values[-1] > tk or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{fn}: chunks must never fall, from 0 or later to at most {tk}, got {values}")


def _check_within(fn: str, values: list[int], tq: int) -> None:
    if any(not 0 <= n <= tq for n in values):
        raise ValueError(f"{fn}: q_lengths must be in 0..{tq}, got {values}")


def _known(values: list[int], like: Tensor, facts: tuple[str, int]) -> Tensor:
    """An int32 tensor of values that were checked."""
    if torch.compiler.is_compiling():  # the op looks again
        return torch.tensor(values, dtype=torch.int32, device=like.device)
    with torch.inference_mode(False):
        x = torch.tensor(values, dtype=torch.int32, device=like.device)
    remember(x, (), facts)
    return x


def _check_values(chunks: Tensor, q_lengths: Tensor | None, tq: int, tk: int) -> None:
    """Runs inside the op; reads back once per tensor, and under graph capture not at all."""
    fn = "token_importance"
    if not capturing(chunks) and not unchanged(chunks, (), ("chunks", tk)):
        _check_rising(fn, chunks.view(-1, chunks.shape[-1]).tolist(), tk)
        remember(chunks, (), ("chunks", tk))
    if q_lengths is not None and not capturing(q_lengths) and not unchanged(q_lengths, (), ("q_lengths", tq)):
        _check_within(fn, q_lengths.tolist(), tq)
        remember(q_lengths, (), ("q_lengths", tq))


def _backend(name: str) -> Callable[..., Tensor]:
    if name == "triton":
        from ..kernels.fusionrag.importance import token_importance

        return token_importance
    return portable_importance.token_importance if name == "portable" else _reference


def _reference(
    q: Sequence[Tensor], k: Sequence[Tensor], chunks: Tensor, q_lengths: Tensor, per_chunk: bool, scale: float
) -> Tensor:
    options = (chunks, q_lengths, per_chunk, scale)
    return torch.stack([reference.token_importance(ql, kl, *options) for ql, kl in zip(q, k, strict=True)]).sum(0)


@torch.library.custom_op("attnlab::token_importance", mutates_args=())
@without_autocast
def _importance(
    chunks: Tensor,
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    q_lengths: Tensor | None,
    per_chunk: bool,
    scale: float,
    backend: str,
) -> Tensor:
    batch, tq = q[0].shape[:2]
    _check_values(chunks, q_lengths, tq, k[0].shape[1])
    if q_lengths is None:
        q_lengths = torch.full((batch,), tq, dtype=torch.int32, device=chunks.device)
    return _backend(backend)(q, k, chunks.expand(batch, -1), q_lengths, per_chunk, scale)


@_importance.register_fake
def _(chunks, q, k, *options):  # type: ignore[no-untyped-def]
    return q[0].new_empty(k[0].shape[:2], dtype=torch.promote_types(q[0].dtype, torch.float32))
