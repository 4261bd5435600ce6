"""FusionRAG: reuse of retrieved chunks' keys and values, with exact recompute of the few tokens that matter.

From "From Prefix Cache to Fusion RAG Cache" (arXiv 2601.12904).
"""

from .attention import future_share, selective_attention
from .importance import token_importance
from .neighbours import embed, nearest
from .pipeline import FusionAnswers, FusionRAG
from .preprocess import preprocess
from .report import FusionReport, RequestReport
from .rotate import rotate_keys
from .selectors import SELECTORS
from .slots import SlotTable, scatter_kv
from .store import ChunkKey, ChunkKV, ChunkStore, StoreStats, TierStats, fingerprint

__all__ = [
    "SELECTORS",
    "ChunkKV",
    "ChunkKey",
    "ChunkStore",
    "FusionAnswers",
    "FusionRAG",
    "FusionReport",
    "RequestReport",
    "SlotTable",
    "StoreStats",
    "TierStats",
    "embed",
    "fingerprint",
    "future_share",
    "nearest",
    "preprocess",
    "rotate_keys",
    "scatter_kv",
    "selective_attention",
    "token_importance",
]
