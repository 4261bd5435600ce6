"""The shape of a model as far as its cost goes: weights, key-value bytes, bytes sent per token."""

import os
from dataclasses import dataclass
from typing import Any

from ..decoder_models import MODELS
from ..dispatch import check_int
from .catalogue import DATA, check_number, load, read


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder model.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: as in its configuration; `heads` is a multiple of `kv_heads`.
        weights: bytes of all weights.
        element_bytes: bytes of one weight, activation, key or value.

    Raises:
        ValueError: naming the field.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    weights: float
    element_bytes: float = 2
    source: str = ""

    def __post_init__(self) -> None:
        fn = f"ModelShape {self.name}"
        for field in ("layers", "hidden", "heads", "kv_heads", "head_dim"):
            check_int(fn, field, getattr(self, field), 1)
        check_number(fn, "weights", self.weights)
        check_number(fn, "element_bytes", self.element_bytes)
        if self.heads % self.kv_heads:
            raise ValueError(f"{fn}: heads must be a multiple of kv_heads={self.kv_heads}, got {self.heads}")

    @property
    def group(self) -> int:
        """G: query heads that share a KV head."""
        return self.heads // self.kv_heads

    @property
    def width(self) -> int:
        """d: elements of q, and of attention's output, of a token in a layer."""
        return self.heads * self.head_dim

    @property
    def parameters(self) -> float:
        """N: weights in number."""
        return self.weights / self.element_bytes

    @property
    def kv_bytes(self) -> float:
        """Bytes of a token's keys and values in all layers, `2 e d L / G`."""
        return 2 * self.element_bytes * self.kv_heads * self.head_dim * self.layers

    @property
    def sent_bytes(self) -> float:
        """Bytes of q, k, v and attention's output for a token in all layers, `(2 + 2/G) e d L`."""
        return 2 * self.element_bytes * self.width * self.layers + self.kv_bytes

    @property
    def kv_projection_share(self) -> float:
        """Share of the weights that make k and v: what overlapping can hide of the model's time."""
        return 2 * self.layers * self.hidden * self.kv_heads * self.head_dim / self.parameters

    def attention_intensity(self) -> float:
        """FLOP per byte of decode attention, `2 G / e`, whatever the batch: G of them in 16 bits."""
        return 2 * self.group / self.element_bytes

    def model_intensity(self, batch: float) -> float:
        """FLOP per byte of everything else over `batch` tokens, `2 N B / (e (N + 2 B d))`: grows with the batch."""
        batch = check_number("model_intensity", "batch", batch)
        moved = self.weights + 2 * self.element_bytes * batch * self.hidden
        return 2 * self.parameters * batch / moved

    @classmethod
    def from_transformers(cls, config: Any, *, name: str | None = None, element_bytes: float = 2) -> "ModelShape":
        """From a transformers configuration of a type in `attnlab.decoder_models.MODELS`; weights are counted from it.

        Raises TypeError on what is no configuration, ValueError on another type.
        """
        kind = getattr(config, "model_type", None)
        if kind is None or not hasattr(config, "num_hidden_layers"):
            raise TypeError(f"ModelShape: config must be a transformers configuration, got {type(config).__name__}")
        if kind not in MODELS:
            raise ValueError(f"ModelShape: config must be of type {', '.join(MODELS)}, got {kind!r}")
        heads, hidden, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
        kv_heads = config.num_key_value_heads or heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        count = _parameters(config, kind, heads * head_dim, kv_heads * head_dim, head_dim)
        return cls(
            name or kind, layers, hidden, heads, kv_heads, head_dim, count * element_bytes, element_bytes,
            f"configuration of type {kind}",
        )  # fmt: skip


def _parameters(config: Any, kind: str, q: int, kv: int, head_dim: int) -> int:
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    layer = 2 * hidden * q + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
    if kind == "qwen2" or getattr(config, "attention_bias", False):
        layer += q + 2 * kv
    if kind != "qwen2" and getattr(config, "attention_bias", False):
        layer += hidden
    if kind == "qwen3":
        layer += 2 * head_dim
    if getattr(config, "mlp_bias", False):
        layer += 2 * inner + hidden
    tables = 1 if config.tie_word_embeddings else 2
    return config.num_hidden_layers * layer + tables * vocab * hidden + hidden


def load_model(name: str, path: str | os.PathLike[str] | None = None) -> ModelShape:
    """A model's sizes by name, from the library's data or from a TOML file of the same form.

    Raises ValueError on an unknown name, with near matches, and on a file's bad field.
    """
    return load("load_model", ModelShape, "models.toml", name, path)


def model_names() -> list[str]:
    """The models in the library's data."""
    return list(read("model_names", DATA / "models.toml"))
