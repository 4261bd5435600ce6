"""What decoding costs, with attention on devices of its own and without (arXiv 2405.01814, sections 2 to 4.3).

Decoding alone: prompts are computed elsewhere, and their keys and values are there when a request arrives. All times
are seconds, sizes bytes, rates per second, prices dollars per hour.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..dispatch import check_bool, check_int
from .catalogue import check_number
from .hardware import Hardware, load_hardware
from .models import ModelShape, load_model
from .timing import Efficiency, as_time, attention_time, model_time
from .traffic import Traffic

Points = Iterable[tuple[float, float]]
ROUGHLY = Efficiency()
Measured = Points | Callable[[float], float] | None


class Load(NamedTuple):
    """One batch: its requests, and the tokens that they attend, all together."""

    requests: int
    tokens: float


class Parts(NamedTuple):
    """Seconds of one batch's step: on the model's devices, on attention's, on each end of the network, on its own way
    through all of them, and what of that is saved by sending q first."""

    model: float
    attention: float
    compute_link: float
    memory_link: float
    chain: float
    hidden: float


class System:
    """What a cost model of a whole system has: capacity, time, throughput and price.

    `name`, `model`, `batches` (in rotation), `price` (dollars per hour), `capacity` (tokens that fit).
    """

    name: str
    model: ModelShape
    batches: int
    capacity: int
    _priced: tuple[tuple[Hardware, int], ...]

    @property
    def price(self) -> float:
        """Dollars per hour. ValueError where a device's price is not known."""
        for hardware, _ in self._priced:
            if hardware.price is None:
                raise ValueError(
                    f"{self.name}: the price of {hardware.name} is not known: pass dataclasses.replace("
                    f"load_hardware({hardware.name!r}), price=dollars_per_hour)"
                )
        return sum(float(hardware.price or 0) * count for hardware, count in self._priced)

    def round_time(self, loads: Sequence[Load]) -> float:
        """Seconds in which every batch of `loads` makes a token of each of its requests."""
        raise NotImplementedError

    def batch_limit(self, length: float | Traffic) -> int:
        """Requests, over all batches, whose keys and values fit at `length` tokens each."""
        return int(self.capacity // max(_length("batch_limit", length), 1.0))

    def iteration_time(self, batch: int, length: float | Traffic) -> float:
        """Seconds in which `batch` requests of `length` tokens, spread evenly over the batches, make a token each.

        Memory is not looked at: see `batch_limit`.
        """
        check_int("iteration_time", "batch", batch, 1)
        tokens = _length("iteration_time", length)
        sizes = [len(range(first, batch, self.batches)) for first in range(self.batches)]
        return self.round_time([Load(size, size * tokens) for size in sizes])

    def tokens_per_second(self, length: float | Traffic, batch: int | None = None) -> float:
        """Tokens made by `batch` requests (default: all that fit). ValueError when none fits, or `batch` does not."""
        limit = self.batch_limit(length)
        if limit < 1:
            raise ValueError(f"{self.name}: no request of {_length('', length):g} tokens fits into {self.capacity}")
        batch = limit if batch is None else batch
        check_int("tokens_per_second", "batch", batch, 1)
        if batch > limit:
            raise ValueError(f"{self.name}: batch must be at most batch_limit {limit}, got {batch}")
        return batch / self.iteration_time(batch, length)

    def tokens_per_dollar(self, length: float | Traffic, batch: int | None = None) -> float:
        """`tokens_per_second` over the price."""
        return self.tokens_per_second(length, batch) * 3600 / self.price

    def __repr__(self) -> str:
        return self.name


class CostModel(System):
    """Lamina: `dop[0]` devices `compute` run the model, `dop[1]` devices `memory` keep KV and attend.

    `batches` n take turns: for n = 1 one replica of the model on all `dop[0]` devices, from n = 2 on n - 1 replicas on
    `dop[0] / (n - 1)` each. A step of a batch is model, network and attention in turn; a round, one token for every
    request, lasts as long as the slowest of: a batch's own step, all batches' attention on the shared memory devices,
    their model parts over the replicas, and what they send over either end of the network.

    Args:
        compute, memory: names in the library's data, or `Hardware`.
        model: a name, or a `ModelShape`.
        alpha: share of the computing time that the network may add, for `required_bandwidth`.
        mtime: MTIME measured on one replica: points `(requests, seconds)`, or a function.
        atime: ATIME measured on all memory devices: points `(tokens attended, seconds in all layers)`, or a function.
        efficiency: what a roofline's estimate takes for reached where nothing measured is given.
        reserve: share of every device's memory that holds neither weights nor KV, in [0, 1).
        round_trip: seconds there and back over the network for nothing, once a layer. The default is the paper's own
            network stack; NCCL's was 66.6e-6.
        overlap: q is sent first, and attention over previous tokens runs while k and v are made and sent.

    Raises:
        ValueError, TypeError: naming the argument; unknown names, with near matches; weights that do not fit.
    """

    def __init__(
        self, compute: str | Hardware, memory: str | Hardware, model: str | ModelShape, *,
        dop: tuple[int, int] = (1, 1), batches: int = 2, alpha: float = 0.2, mtime: Measured = None,
        atime: Measured = None, efficiency: Efficiency = ROUGHLY, reserve: float = 0.1, round_trip: float = 33e-6,
        overlap: bool = True,
    ):  # fmt: skip
        fn = "CostModel"
        self.compute, self.memory, self.model = _device(fn, compute), _device(fn, memory), _shape(fn, model)
        self._check(fn, dop, batches)
        self.dop, self.batches, self.replicas = (dop[0], dop[1]), batches, max(1, batches - 1)
        self.alpha = check_number(fn, "alpha", alpha)
        self.round_trip = check_number(fn, "round_trip", round_trip, zero=True)
        check_bool(fn, "overlap", overlap)
        self.overlap, self.reserve = overlap, _reserve(fn, reserve)
        efficiency.check(fn)
        self.efficiency = efficiency
        self.measured = tuple(name for name, given in (("mtime", mtime), ("atime", atime)) if given is not None)
        devices = dop[0] // self.replicas
        self.name = f"{self.model.name} on {dop[0]}x {self.compute.name} + {dop[1]}x {self.memory.name}, n={batches}"
        _weights_fit(fn, self.model, self.compute, devices, self.reserve)
        self.capacity = int(dop[1] * self.memory.memory * (1 - self.reserve) / self.model.kv_bytes)
        self._priced = ((self.compute, dop[0]), (self.memory, dop[1]))
        self.mtime = as_time(fn, "mtime", mtime, model_time(self.model, self.compute, devices, efficiency))
        self.atime = as_time(fn, "atime", atime, attention_time(self.model, self.memory, dop[1], efficiency))
        self._links = (
            devices * self.compute.network * efficiency.network,
            dop[1] * self.memory.network * efficiency.network,
        )

    @staticmethod
    def _check(fn: str, dop: Any, batches: Any) -> None:
        if not isinstance(dop, tuple | list) or len(dop) != 2:
            raise ValueError(f"{fn}: dop must be two positive ints (compute, memory), got {dop!r}")
        check_int(fn, "dop[0]", dop[0], 1)
        check_int(fn, "dop[1]", dop[1], 1)
        check_int(fn, "batches", batches, 1)
        if dop[0] % max(1, batches - 1):
            raise ValueError(f"{fn}: dop[0] must be a multiple of batches - 1 = {batches - 1} replicas, got {dop[0]}")

    def with_options(self, **changes: Any) -> "CostModel":
        """The same with some of the arguments changed. ValueError where times were measured: they would not hold."""
        if self.measured:
            raise ValueError(f"{self.name}: {' and '.join(self.measured)} were measured for this and hold for it alone")
        now = {name: getattr(self, name) for name in ("dop", "batches", "alpha", "efficiency", "reserve", "round_trip")}
        where = {name: changes.pop(name, getattr(self, name)) for name in ("compute", "memory", "model")}
        return CostModel(**where, **{**now, "overlap": self.overlap, **changes})

    def parts(self, load: Load) -> Parts:
        """Seconds of one batch's step by where they are spent."""
        model, attention = self.mtime(load.requests), self.atime(load.tokens)
        sent = load.requests * self.model.sent_bytes
        near, far = (sent / rate for rate in self._links)
        hidden = self._hidden(model, attention, max(near, far))
        chain = model + attention + max(near, far) + self.model.layers * self.round_trip
        return Parts(model, attention, near, far, chain - (hidden if self.overlap else 0.0), hidden)

    def _hidden(self, model: float, attention: float, sent: float) -> float:
        """Seconds saved where k and v are made and sent while attention reads the previous tokens (section 4.2.2)."""
        group = self.model.group
        q, kv, made = sent * group / (2 * group + 2), sent / (group + 1), model * self.model.kv_projection_share
        return made + q + kv + attention - max(q + attention, max(q, made) + kv)

    def round_time(self, loads: Sequence[Load]) -> float:
        steps = [self.parts(load) for load in loads if load.requests]
        if not steps:
            return 0.0
        model, attention, compute_link, memory_link, *_ = (sum(column) for column in zip(*steps))
        spread = max(model, compute_link) / self.replicas
        return max(max(step.chain for step in steps), spread, attention, memory_link)

    @property
    def link(self) -> float:
        """Bytes/s that a replica's devices and the memory devices reach between them: the slower end's."""
        return min(self._links)

    def balance(self, length: float | Traffic, batch: int | None = None) -> float:
        """`t_attention (n - 1) / t_model`: at 1 no device waits (section 4.3), over 1 attention is what is short."""
        batch = max(1, self.batch_limit(length)) if batch is None else batch
        each = max(1, batch // self.batches)
        return self.atime(each * _length("balance", length)) * self.replicas / self.mtime(each)

    def required_bandwidth(self, batch: int, length: float | Traffic) -> float:
        """Bytes/s, all links together, that keep a batch's network time within `alpha` of its computing time.

        `(2 + 2/G) e d B L / (alpha (MTIME(B) + ATIME(B, l)))` (section 3.1).
        """
        check_int("required_bandwidth", "batch", batch, 1)
        computing = self.mtime(batch) + self.atime(batch * _length("required_bandwidth", length))
        return batch * self.model.sent_bytes / (self.alpha * computing)

    def overlap_gain(self, batch: int, length: float | Traffic) -> float:
        """Share of one batch's step that sending q first saves, whether `overlap` is on or not. It falls as G grows."""
        check_int("overlap_gain", "batch", batch, 1)
        step = self.parts(Load(batch, batch * _length("overlap_gain", length)))
        return step.hidden / (step.chain + (step.hidden if self.overlap else 0.0))

    def counterpart(self, hardware: str | Hardware | None = None) -> "HomogeneousCost":
        """Model and attention on as many devices of one kind (default: `compute`) as cost about as much."""
        device = self.compute if hardware is None else _device("counterpart", hardware)
        single = HomogeneousCost.priced(device)
        devices = max(1, round(self.price / single))
        return HomogeneousCost(device, self.model, devices=devices, efficiency=self.efficiency, reserve=self.reserve)

    def best(self, traffic: float | Traffic, *, budget: float | None = None, **options: Any) -> "CostModel":
        """The first of `cost_search.ranked(self, traffic, budget=..., ...)`: see there."""
        from .cost_search import ranked

        return ranked(self, traffic, budget=budget, **options)[0]

    def plot(self, path: str | os.PathLike[str], **options: Any) -> None:
        """Tokens per dollar against context length, and required bandwidth against batch: see `cost_plot.plot`."""
        from .cost_plot import plot

        plot(self, path, **options)


class HomogeneousCost(System):
    """The usual system: model and attention on the same `devices`, tensor parallel; weights and KV share their memory.

    Args as for `CostModel`; `mtime` and `atime` are measured on all devices. Raises as it does.
    """

    batches = 1

    def __init__(
        self, hardware: str | Hardware, model: str | ModelShape, *, devices: int = 1, mtime: Measured = None,
        atime: Measured = None, efficiency: Efficiency = ROUGHLY, reserve: float = 0.1,
    ):  # fmt: skip
        fn = "HomogeneousCost"
        self.hardware, self.model, self.devices = _device(fn, hardware), _shape(fn, model), devices
        check_int(fn, "devices", devices, 1)
        efficiency.check(fn)
        self.reserve = _reserve(fn, reserve)
        self.name = f"{self.model.name} on {devices}x {self.hardware.name}"
        left = _weights_fit(fn, self.model, self.hardware, devices, self.reserve)
        self.capacity = int(left / self.model.kv_bytes)
        self._priced = ((self.hardware, devices),)
        self.mtime = as_time(fn, "mtime", mtime, model_time(self.model, self.hardware, devices, efficiency))
        self.atime = as_time(fn, "atime", atime, attention_time(self.model, self.hardware, devices, efficiency))

    @staticmethod
    def priced(hardware: Hardware) -> float:
        """Dollars per hour of one device. ValueError where that is not known or nothing."""
        if not hardware.price:
            raise ValueError(f"HomogeneousCost: {hardware.name} has no price to compare by, got {hardware.price!r}")
        return hardware.price

    def round_time(self, loads: Sequence[Load]) -> float:
        return sum(self.mtime(load.requests) + self.atime(load.tokens) for load in loads if load.requests)


def _device(fn: str, given: Any) -> Hardware:
    if not isinstance(given, str | Hardware):
        raise TypeError(f"{fn}: hardware must be a name or a Hardware, got {type(given).__name__}")
    return load_hardware(given) if isinstance(given, str) else given


def _shape(fn: str, given: Any) -> ModelShape:
    if not isinstance(given, str | ModelShape):
        raise TypeError(f"{fn}: model must be a name or a ModelShape, got {type(given).__name__}")
    return load_model(given) if isinstance(given, str) else given


def _reserve(fn: str, reserve: Any) -> float:
    found = check_number(fn, "reserve", reserve, zero=True, most=1.0)
    if found == 1:
        raise ValueError(f"{fn}: reserve must be below 1, got {reserve!r}")
    return found


def _weights_fit(fn: str, model: ModelShape, hardware: Hardware, devices: int, reserve: float) -> float:
    """Bytes that the weights leave free."""
    room = devices * hardware.memory * (1 - reserve)
    if room < model.weights:
        raise ValueError(
            f"{fn}: {model.name}'s weights, {model.weights / 1e9:.1f} GB, do not fit one replica's "
            f"{devices}x {hardware.name}, {room / 1e9:.1f} GB"
        )
    return room - model.weights


def _length(fn: str, length: Any) -> float:
    return length.context if isinstance(length, Traffic) else check_number(fn, "length", length, zero=True)
