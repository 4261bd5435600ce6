"""Queries, keys and values that a user saved: safetensors files with `q`, `k` and `v`."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnlab.evals.harness.errors import UsageError

WHERE = "safetensors with q [B, T, Hq, D] and k, v [B, Tk, Hkv, D] go into the folder of --data-dir"


class Row(NamedTuple):
    """Row `row` of a file's batch."""

    path: Path
    row: int
    queries: int
    keys: int


def rows(folder: Path | None) -> list[Row]:
    """All rows of all `*.safetensors` of a folder, by file name. UsageError for a missing folder or a wrong file."""
    if folder is None:
        raise UsageError(f"attn_dump needs --data-dir: {WHERE}")
    if not folder.is_dir():
        raise UsageError(f"attn_dump: folder {folder} does not exist: {WHERE}")
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise UsageError(f"attn_dump: {folder} has no *.safetensors: {WHERE}")
    found = []
    for path in paths:
        with _opened(path) as file:
            shapes = _shapes(path, file)
        found += [Row(path, row, shapes["q"][1], shapes["k"][1]) for row in range(shapes["q"][0])]
    return found


def read(row: Row) -> tuple[Tensor, Tensor, Tensor, float]:
    """`q [1, T, Hq, D]`, `k, v [1, Tk, Hkv, D]` and the scale: the metadata's `scale`, or `D ** -0.5`."""
    with _opened(row.path) as file:
        q, k, v = (file.get_slice(name)[row.row : row.row + 1] for name in "qkv")
        scale = _scale(row.path, file.metadata() or {}, q.shape[3])
    for name, x in zip("qkv", (q, k, v), strict=True):
        if not x.is_floating_point() or not torch.isfinite(x).all():
            raise UsageError(f"attn_dump: {row.path}: {name} must hold finite floating-point numbers, row {row.row}")
    return q, k, v, scale


def _opened(path: Path) -> Any:
    try:
        from safetensors import safe_open
    except ImportError:
        raise UsageError("attn_dump needs safetensors: pip install attnlab[evals]") from None
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as e:  # safetensors' own class
        raise UsageError(f"attn_dump: {path} cannot be read: {e}") from None


def _shapes(path: Path, file: Any) -> dict[str, list[int]]:
    if missing := {"q", "k", "v"} - set(file.keys()):
        raise UsageError(f"attn_dump: {path} lacks {', '.join(sorted(missing))}: {WHERE}")
    shapes = {name: list(file.get_slice(name).get_shape()) for name in "qkv"}
    q, k, v = shapes.values()
    fits = len(q) == len(k) == 4 and k == v and (q[0], q[3]) == (k[0], k[3]) and min(q + k) > 0
    if not fits or q[1] > k[1] or q[2] % k[2]:
        raise UsageError(
            f"attn_dump: {path}: q must be [B, T, Hq, D], k and v [B, Tk, Hkv, D] with T <= Tk and Hq a multiple of "
            f"Hkv, got {q}, {k}, {v}"
        )
    return shapes


def _scale(path: Path, metadata: dict[str, str], head_dim: int) -> float:
    given = metadata.get("scale")
    if given is None:
        return head_dim**-0.5
    try:
        return float(given)
    except ValueError:
        raise UsageError(f"attn_dump: {path}: scale in its metadata must be a number, got {given!r}") from None
