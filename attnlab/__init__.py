"""Sparse and hybrid attention for long contexts, with references, kernels and evals."""

from .append import append_token
from .dispatch import BackendError, Explanation, explain
from .full import full_attention
from .fusionrag import selective_attention
from .lamina import SplitPlan, shared_prefix_decode, split_attention, split_decode
from .moba import MoBASelection, moba_attention, moba_select
from .moba_cache import MoBACache
from .moba_decoding import moba_decode
from .moba_tools import KeyConv, MoBADiagnostics
from .retroinfer import ErrorBound, wave_attention
from .states import merge_states
from .wave_buffer import WaveBuffer, WaveStats
from .wave_config import WaveConfig
from .wave_index import WaveIndex

__all__ = [
    "BackendError",
    "ErrorBound",
    "Explanation",
    "KeyConv",
    "MoBACache",
    "MoBADiagnostics",
    "MoBASelection",
    "SplitPlan",
    "WaveBuffer",
    "WaveConfig",
    "WaveIndex",
    "WaveStats",
    "append_token",
    "explain",
    "full_attention",
    "merge_states",
    "moba_attention",
    "moba_decode",
    "moba_select",
    "selective_attention",
    "shared_prefix_decode",
    "split_attention",
    "split_decode",
    "wave_attention",
]
