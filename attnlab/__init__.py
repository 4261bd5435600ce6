"""Sparse and hybrid attention for long contexts, with references, kernels and evals."""

from .dispatch import BackendError, Explanation, explain
from .moba import MoBASelection, moba_attention, moba_select
from .states import full_attention, merge_states

__all__ = [
    "BackendError",
    "Explanation",
    "MoBASelection",
    "explain",
    "full_attention",
    "merge_states",
    "moba_attention",
    "moba_select",
]
