"""A batch's prompts: built and tokenised once, the same for every method, and told apart by a hash."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .errors import UsageError
from .method import Batch, Subject
from .task import Prompt, Task, sample_rng


def build(task: Task, subject: Subject, length: int, indices: Sequence[int], seed: int) -> Batch:
    """Samples `indices` of a task. UsageError where a prompt and its answer are longer than the model takes."""
    items = [task.build(subject, length, i, sample_rng(seed, task.name, length, i)) for i in indices]
    batch = Batch(subject, items, seed)
    for i, item in zip(indices, items):
        if isinstance(item, Prompt):
            batch.context_ids.append([*subject.start, *subject.ids(item.context)])
            batch.question_ids.append(subject.ids(item.question))
            tokens = len(batch.context_ids[-1]) + len(batch.question_ids[-1]) + item.max_new_tokens
            if tokens > subject.max_length:
                what = f"{task.name}, length {length}, sample {i} has {tokens} tokens with its answer"
                raise UsageError(f"{what}: {subject.name} takes {subject.max_length}")
    return batch


def hashes(batch: Batch) -> list[str]:
    """SHA-256 of each prompt's tokens; of what an item holds, where it is no prompt."""
    if not batch.context_ids:
        return [_digest(item) for item in batch.items]
    pairs = zip(batch.context_ids, batch.question_ids)
    return [hashlib.sha256(np.array([len(c), *c, *q], "<i8").tobytes()).hexdigest() for c, q in pairs]


def _digest(item: Any) -> str:
    found = hashlib.sha256()
    _feed(found, item)
    return found.hexdigest()


def _feed(found: Any, value: Any) -> None:
    """Its type's kind and size before its content, so that no two values read alike."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().contiguous()
        found.update(f"tensor {value.dtype} {list(value.shape)};".encode())
        found.update(value.flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray):
        found.update(f"array {value.dtype.str} {value.shape};".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value):
        _feed(found, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)};".encode())
        for key in sorted(value):
            _feed(found, key)
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(f"sequence {len(value)};".encode())
        for part in value:
            _feed(found, part)
    else:
        if not isinstance(value, str | bytes | bool | int | float | np.generic | None):
            raise TypeError(f"an item's parts must be tensors, arrays or plain values, got {type(value).__name__}")
        text = repr(value).encode()
        found.update(f"{type(value).__name__} {len(text)};".encode() + text)
