"""Lamina: attention states split over devices and merged, and attention disaggregated from the model.

The distributed decoder, the cost model and the simulator are loaded when one of their names is first used.

What a system costs, before any device is rented:

    cost = attnlab.lamina.CostModel("H100", "H20", "LLaMA3-70B", dop=(2, 4))
    traffic = attnlab.lamina.load_traffic("Kimi-Conv")
    cost.tokens_per_dollar(traffic), cost.counterpart().tokens_per_dollar(traffic)
    attnlab.lamina.compare(cost, cost.counterpart(), traffic.draw(1000))
"""

from typing import TYPE_CHECKING, Any

from .decode import shared_prefix_decode, split_decode
from .plan import Shard, SplitPlan
from .split import split_attention

if TYPE_CHECKING:
    from .attention_worker import AttentionWorker
    from .cost import CostModel, HomogeneousCost
    from .decoder import DisaggregatedDecoder, run
    from .group import Event, Group, WorkerError
    from .hardware import Hardware, load_hardware
    from .model_worker import ModelWorker
    from .models import ModelShape, load_model
    from .requests import Request
    from .simulator import Comparison, SimulationReport, compare, simulate
    from .stats import DecoderStats
    from .timing import Efficiency, TimeTable, attention_from_benchmarks
    from .traffic import Arrival, Traffic, load_traffic, read_requests

__all__ = [
    "Arrival",
    "AttentionWorker",
    "Comparison",
    "CostModel",
    "DecoderStats",
    "DisaggregatedDecoder",
    "Efficiency",
    "Event",
    "Group",
    "Hardware",
    "HomogeneousCost",
    "ModelShape",
    "ModelWorker",
    "Request",
    "Shard",
    "SimulationReport",
    "SplitPlan",
    "TimeTable",
    "Traffic",
    "WorkerError",
    "attention_from_benchmarks",
    "compare",
    "load_hardware",
    "load_model",
    "load_traffic",
    "read_requests",
    "run",
    "shared_prefix_decode",
    "simulate",
    "split_attention",
    "split_decode",
]

_LAZY = {
    "Arrival": "traffic",
    "AttentionWorker": "attention_worker",
    "Comparison": "simulator",
    "CostModel": "cost",
    "DecoderStats": "stats",
    "DisaggregatedDecoder": "decoder",
    "Efficiency": "timing",
    "Event": "group",
    "Group": "group",
    "Hardware": "hardware",
    "HomogeneousCost": "cost",
    "ModelShape": "models",
    "ModelWorker": "model_worker",
    "Request": "requests",
    "SimulationReport": "simulator",
    "TimeTable": "timing",
    "Traffic": "traffic",
    "WorkerError": "group",
    "attention_from_benchmarks": "timing",
    "compare": "simulator",
    "load_hardware": "hardware",
    "load_model": "models",
    "load_traffic": "traffic",
    "read_requests": "traffic",
    "run": "decoder",
    "simulate": "simulator",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
