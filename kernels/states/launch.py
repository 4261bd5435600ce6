"""Dense attention and the merge of attention states on Triton, under the names every backend of `states` has."""

from .append import append
from .attention import attention
from .attention_backward import attention_backward
from .merge import merge, merge_backward

__all__ = ["append", "attention", "attention_backward", "merge", "merge_backward"]
