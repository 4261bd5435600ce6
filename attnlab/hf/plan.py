"""Per-layer plans: which layers of a model are sparse, and how. Needs no transformers."""

import re
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

KEY = "attnlab_moba"
_FULL_LAYERS = "'last:N', 'first:N', a list of layer indices or None"
_RANGE = re.compile(r"(first|last):(\d+)")
_LEAST = {"block_size": 1, "topk": 1, "sink_blocks": 0, "local_blocks": 0}
_CHOICES = {
    "routing": ("head", "group"),
    "phase": ("both", "prefill", "decode"),
    "backend": ("auto", "reference", "portable", "cpu", "triton", "cuda"),
}


@dataclass(frozen=True)
class MoBAPlan:
    """How `attn_implementation="attnlab_moba"` treats a model's layers. `attnlab.hf.set_plan` hands it to a model.

    `block_size`, `topk`, `routing`, `sink_blocks`, `local_blocks` and `backend` are `attnlab.moba_attention`'s.
    `full_layers`: layers that stay dense: `"last:3"`, `"first:2"`, a list of layer indices, or None.
    `phase`: where the others are sparse. A call decodes when at most `attnlab.hf.DECODE_TOKENS` tokens follow cached
    ones, else it prefills (or trains); `"prefill"` keeps decode dense, `"decode"` keeps prefill dense.
    Layers with a sliding window are local already: they run dense inside their window, whatever the plan says.
    """

    block_size: int
    topk: int
    full_layers: str | tuple[int, ...] | list[int] | None = None
    routing: str = "head"
    sink_blocks: int = 0
    local_blocks: int = 0
    phase: str = "both"
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"MoBAPlan: {name} must be an int of at least {least}, got {value!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"MoBAPlan: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        object.__setattr__(self, "full_layers", _full_layers("MoBAPlan", self.full_layers))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        if isinstance(self.full_layers, tuple):
            values["full_layers"] = list(self.full_layers)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MoBAPlan":
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"MoBAPlan: unknown fields {unknown}; known ones are {sorted(known)}")
        if missing := sorted({"block_size", "topk"} - set(values)):
            raise ValueError(f"MoBAPlan: {' and '.join(missing)} must be given, got {values!r}")
        return cls(**values)

    def dense_layers(self, num_layers: int) -> frozenset[int]:
        """The layers `full_layers` names, in a model of `num_layers`."""
        return named_layers("MoBAPlan", self.full_layers, num_layers)


def named_layers(fn: str, full_layers: Any, num_layers: int) -> frozenset[int]:
    """The layers that a `full_layers` of `fn` names, in a model of `num_layers`."""
    full_layers = _full_layers(fn, full_layers)
    if full_layers is None:
        return frozenset()
    if isinstance(full_layers, str):
        end, count = full_layers.split(":")
        if int(count) > num_layers:
            raise ValueError(f"{fn}: full_layers={full_layers!r}, but the model has {num_layers} layers")
        return frozenset(range(int(count)) if end == "first" else range(num_layers - int(count), num_layers))
    if outside := [i for i in full_layers if i >= num_layers]:
        raise ValueError(f"{fn}: full_layers names layers {outside}, but the model has {num_layers} layers")
    return frozenset(full_layers)


def _full_layers(fn: str, value: Any) -> str | tuple[int, ...] | None:
    if value is None:
        return None
    if isinstance(value, str) and _RANGE.fullmatch(value):
        return value
    if isinstance(value, list | tuple) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value
    ):
        return tuple(value)
    raise ValueError(f"{fn}: full_layers must be {_FULL_LAYERS}, got {value!r}")


def set_plan(model: Any, plan: MoBAPlan | dict[str, Any] | None) -> None:
    """Give `plan` to a transformers model or config; None takes it away.

    The plan is kept as a plain dict in the text config, `config.attnlab_moba`, so `save_pretrained` and
    `from_pretrained` keep it. Raises ValueError when it does not fit the model's layers, or when all layers it should
    make sparse have a sliding window.
    """
    if isinstance(plan, dict):
        plan = MoBAPlan.from_dict(plan)
    if plan is not None and not isinstance(plan, MoBAPlan):
        raise TypeError(f"set_plan: plan must be a MoBAPlan, a dict or None, got {type(plan).__name__}")
    configs = text_configs("set_plan", model)
    if plan is not None:
        _check_fit(plan, configs[0])
    for config in configs:
        if plan is not None:
            setattr(config, KEY, plan.to_dict())
        elif hasattr(config, KEY):
            delattr(config, KEY)


def get_plan(model: Any) -> MoBAPlan | None:
    """The plan of a transformers model or config, or None."""
    return _plan(text_configs("get_plan", model)[0])


def layer_plan(module: Any) -> MoBAPlan | None:
    """The plan an attention module runs under; None if its layer stays dense."""
    config: Any = getattr(module, "config", None)
    plan = _plan(config)
    if plan is None:
        raise ValueError(
            f"attnlab_moba: {type(module).__name__} has no plan, and no block size suits every model. Give it one: "
            "attnlab.hf.set_plan(model, attnlab.hf.MoBAPlan(block_size=512, topk=8)). Parts of a composite model that "
            'should stay as they are take another implementation: attn_implementation={"text_config": "attnlab_moba"}'
        )
    if plan.full_layers is None:
        return plan
    index = getattr(module, "layer_idx", None)
    if index is None:
        raise ValueError(f"attnlab_moba: full_layers needs {type(module).__name__}.layer_idx, which it lacks")
    return None if index in _dense_layers(plan, config.num_hidden_layers) else plan


def _plan(config: Any) -> MoBAPlan | None:
    values = getattr(config, KEY, None)
    if values is None:
        return None
    return _parse(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items()))


@lru_cache(maxsize=64)
def _parse(items: tuple[tuple[str, Any], ...]) -> MoBAPlan:
    return MoBAPlan.from_dict(dict(items))


@lru_cache(maxsize=64)
def _dense_layers(plan: MoBAPlan, num_layers: int) -> frozenset[int]:
    return plan.dense_layers(num_layers)


def text_configs(fn: str, model: Any) -> list[Any]:
    """The text config first, then the copies of it that a model's modules hold."""
    config = getattr(model, "config", model)
    if not hasattr(config, "get_text_config"):
        raise TypeError(f"{fn}: expected a transformers model or config, got {type(model).__name__}")
    text = config.get_text_config()
    found = {id(text): text}
    for module in model.modules() if hasattr(model, "modules") else ():
        held = getattr(module, "config", None)
        if type(held) is type(text):
            found[id(held)] = held
    return list(found.values())


def _check_fit(plan: MoBAPlan, config: Any) -> None:
    count = getattr(config, "num_hidden_layers", None)
    if count is None:
        if plan.full_layers is not None:
            raise ValueError(f"set_plan: full_layers needs {type(config).__name__}.num_hidden_layers, which it lacks")
        return
    dense = plan.dense_layers(count)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"] * count
    check_sparse("set_plan", [kind == "sliding_attention" for i, kind in enumerate(types) if i not in dense])


def check_sparse(fn: str, windows: list[bool]) -> None:
    """Refuse a plan when every layer outside `full_layers` has a window; there may be none outside."""
    if windows and all(windows):
        raise ValueError(
            f"{fn}: no layer would be sparse, since each one outside full_layers has a sliding window and is local "
            "already; config.sliding_window = None (and config.layer_types, where set) takes the windows away"
        )
