"""Sparse and hybrid attention for long contexts, with references, kernels and evals."""

from .dispatch import BackendError, Explanation, explain
from .moba import MoBASelection, moba_attention, moba_select
from .moba_cache import MoBACache
from .moba_decoding import moba_decode
from .moba_tools import KeyConv, MoBADiagnostics
from .states import full_attention, merge_states

__all__ = [
    "BackendError",
    "Explanation",
    "KeyConv",
    "MoBACache",
    "MoBADiagnostics",
    "MoBASelection",
    "explain",
    "full_attention",
    "merge_states",
    "moba_attention",
    "moba_decode",
    "moba_select",
]
