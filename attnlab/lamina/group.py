"""The processes of a disaggregated decoder: who is who, and the connections between them."""

import atexit
import contextlib
import math
import os
import time
import weakref
from collections import defaultdict
from datetime import timedelta
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..dispatch import check_bool, check_int
from .control import Control, Message, WorkerError
from .link import Link, cut_all
from .plan import SplitPlan

__all__ = ["Event", "Group", "WorkerError"]

START = "start every process with torchrun --nproc-per-node {} script.py, or set them in each"
_open: weakref.WeakSet["Group"] = weakref.WeakSet()
_stores: dict[tuple[str, ...], dist.Store] = {}  # the last one


class Event(NamedTuple):
    """Something a worker did, from `start` to `end`: seconds of a clock that all processes of a machine share."""

    name: str
    batch: int
    slice: int
    start: float
    end: float


class Group:
    """The model workers (ranks `0..replicas-1`, of which rank 0 leads) and the attention workers of `plan`.

    A context manager. Leaving it closes the group for everybody when the leader does so; leaving it by an exception
    tells the others, who raise a WorkerError. A process that dies, or keeps another waiting for `timeout`, gives every
    other one a WorkerError that names it. After a group was left, in any way, its processes can make another; without
    one of them, on another MASTER_PORT (and, under torchrun, without TORCHELASTIC_USE_AGENT_STORE).

    Args:
        plan: how attention is divided; one attention worker for each shard.
        replicas: model workers.
        timeout: seconds. The longest slice, or layer of a prompt, must take less; with several replicas the longest
            prompt, for whose first token the leader waits.
        device: `"cpu"` (gloo) or a CUDA device (NCCL); by default the GPU of LOCAL_RANK where there is one.
            NCCL is untested: each pair and direction has a communicator of its own, so that only the order of one
            direction's messages matters, and receives are polled for, so that they can fail in time.
        trace: keep `trace`, a list of Events.
        join_timeout: seconds to wait for the other processes to come up.

    Attributes:
        rank, world: of this process, of all.
        role: `"model"` or `"attention"`.
        replica, shard: which one it is, None for the other role.
        models, workers: ranks of each role.
        link: tensors to and from others.
        trace: list of Events, or None.
        busy: seconds by name of what was recorded.

    Raises:
        ValueError: arguments that do not fit each other or the environment.
        WorkerError: the others did not come up.
    """

    def __init__(
        self,
        plan: SplitPlan,
        *,
        replicas: int = 1,
        timeout: float = 10.0,
        device: torch.device | str | None = None,
        trace: bool = False,
        join_timeout: float = 300.0,
    ) -> None:
        fn = "Group"
        if not isinstance(plan, SplitPlan):
            raise TypeError(f"{fn}: plan must be a SplitPlan, got {type(plan).__name__}")
        check_int(fn, "replicas", replicas, 1)
        check_bool(fn, "trace", trace)
        for name, value in (("timeout", timeout), ("join_timeout", join_timeout)):
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                raise ValueError(f"{fn}: {name} must be a positive number of seconds, got {value!r}")
        self.plan, self.device = plan, _device(fn, device)
        self._owns = not dist.is_initialized()
        self.rank, self.world = _environment(fn, replicas + plan.shards) if self._owns else _joined()
        if self.world != replicas + plan.shards:
            raise ValueError(
                f"{fn}: the world must have {replicas + plan.shards} processes, for replicas {replicas} and "
                f"{plan.shards} shards, got {self.world}"
            )
        self.models, self.workers = tuple(range(replicas)), tuple(range(replicas, self.world))
        self.replica = self.rank if self.rank < replicas else None
        self.shard = None if self.rank < replicas else self.rank - replicas
        self.role = "attention" if self.replica is None else "model"
        self.trace: list[Event] | None = [] if trace else None
        self.busy: defaultdict[str, float] = defaultdict(float)
        self._closed = False
        self._groups: list[Any] = []
        try:
            self._join(timeout, join_timeout)
        except RuntimeError as e:
            self._leave()
            if isinstance(e, WorkerError):
                raise
            raise WorkerError(
                f"rank {self.rank} ({self.role}) could not join the other {self.world - 1} within {join_timeout} s: {e}"
            ) from e
        _open.add(self)
        self._agree()

    def command(self, message: Message) -> None:
        """At the leader: a command to every other rank."""
        self.control.command(message)

    def next_command(self) -> Message:
        """At the others: the leader's next command, however long it takes. WorkerError when anybody failed."""
        return self.control.next_command()

    def reply(self, message: Message) -> None:
        """At the others: an answer to the leader's last command."""
        self.control.reply(message)

    def replies(self, limit: bool = True) -> list[Message]:
        """At the leader: one reply of every other rank, in their order.

        WorkerError when anybody failed or, unless `limit` is False, takes longer than the timeout.
        """
        return self.control.replies(limit)

    def record(self, name: str, batch: int, slice_: int, start: float) -> None:
        """Note that `name` began at `start` (of `time.monotonic()`) and ends now: `busy`, and an Event if traced."""
        end = time.monotonic()
        self.busy[name] += end - start
        if self.trace is not None:
            self.trace.append(Event(name, batch, slice_, start, end))

    def report(self) -> Message:
        """This rank's counters since it joined: what everybody replies to `{"op": "stats"}`."""
        return {
            "sent": dict(self.link.sent),
            "received": dict(self.link.received),
            "waited": dict(self.link.waited),
            "busy": dict(self.busy),
            "events": [list(event) for event in self.trace or ()],
        }

    def close(self) -> None:
        """Leave, in any state. The leader's tells the others to, and waits for them up to the timeout.

        Whoever leaves before the leader does fails the others.
        """
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if not self.control.ended and self.control.error is None:
            if self.rank == 0:
                with contextlib.suppress(WorkerError):
                    self.command({"op": "close"})
            else:
                self.control.fail(f"{self.control.name(self.rank)} left before the group was closed", self.rank)
        self.control.close()
        self._cut()
        self._leave()

    def __enter__(self) -> "Group":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None and not self._closed:
            self.control.fail(f"{self.control.name(self.rank)} raised {type(error).__name__}: {error}", self.rank)
        self.close()

    def _join(self, timeout: float, join_timeout: float) -> None:
        gpu, wait = self.device.type == "cuda", timedelta(seconds=join_timeout)
        if gpu:
            torch.cuda.set_device(self.device)
        if self._owns:
            backend, store = "cpu:gloo,cuda:nccl" if gpu else "gloo", _store(wait, self.rank)
            dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world, timeout=wait)
        everybody = list(range(self.world))
        roles = ("model",) * len(self.models) + ("attention",) * len(self.workers)
        self._groups.append(dist.new_group(everybody, backend="gloo", timeout=wait))
        if gpu:
            lanes = self._nccl_lanes(wait)
        else:
            self._groups.append(dist.new_group(everybody, backend="gloo", timeout=wait))
            lanes = {}
        self.control = Control(self._groups[0], self.rank, roles, timeout)
        data = self._groups[1]
        self.link = Link(
            self.control,
            (lambda a, b: lanes[a, b]) if gpu else (lambda a, b: (data, a if b == self.rank else b)),
            self.device,
            timeout,
        )
        self.control.on_failure = self._cut

    def _nccl_lanes(self, wait: timedelta) -> dict[tuple[int, int], tuple[Any, int]]:
        """A communicator for each ordered pair that talks, brought up in one order everywhere."""
        lanes = {}
        pairs = [(a, b) for a in range(self.world) for b in range(self.world)]
        for a, b in pairs:
            if a == b or (a in self.workers and b in self.workers):
                continue
            pg = dist.new_group([a, b], backend="nccl", timeout=wait)
            if self.rank in (a, b):
                self._groups.append(pg)
                lanes[a, b] = pg, int((b if self.rank == a else a) > self.rank)
                x = torch.zeros(1, device=self.device)
                work = pg.send([x], lanes[a, b][1], 0) if self.rank == a else pg.recv([x], lanes[a, b][1], 0)
                work.wait()
                torch.cuda.synchronize(self.device)
        return lanes

    def _agree(self) -> None:
        """Everybody was given the same plan."""
        fields = ("by", "shards", "sizes", "block")
        mine = {name: getattr(self.plan, name) for name in fields} | {"replicas": len(self.models)}
        mine["sizes"] = None if self.plan.sizes is None else list(self.plan.sizes)
        try:
            if self.rank == 0:
                self.command({"op": "plan", **mine})
                return
            theirs = self.control.next_command(self.control.timeout)
            theirs.pop("op")
            if theirs != mine:
                raise ValueError(f"Group: plan and replicas must be the leader's {theirs} in every process, got {mine}")
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise

    def _cut(self) -> None:
        if self.device.type == "cpu":
            cut_all(self._groups[1], self.control.peers)

    def _leave(self) -> None:
        if hasattr(self, "link"):
            self.link.close()
        for pg in reversed(self._groups):
            if self.device.type == "cuda" and pg is not self._groups[0] and self.control.error is not None:
                pg.abort()
            dist.destroy_process_group(pg)
        self._groups.clear()
        if self._owns and dist.is_initialized():
            dist.destroy_process_group()


@atexit.register
def _abandon() -> None:
    """A process that ends without `close` says so; otherwise its threads would outlive the interpreter."""
    for group in list(_open):
        group.control.fail(f"{group.control.name(group.rank)} ended without closing its group", group.rank)
        group.close()


def _device(fn: str, device: torch.device | str | None) -> torch.device:
    if device is None:
        gpu = torch.cuda.is_available()
        return torch.device(
            f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}" if gpu else "cpu"
        )
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"{fn}: device must be a torch.device or its name, got {device!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f"{fn}: device must be on cpu (gloo) or cuda (NCCL), got {found}")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{fn}: device is {found}, and there is no GPU here")
    return found


def _environment(fn: str, processes: int) -> tuple[int, int]:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if absent := [name for name in names if name not in os.environ]:
        raise ValueError(f"{fn}: {', '.join(absent)} not set: {START.format(processes)}")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _store(wait: timedelta, rank: int) -> dist.Store:
    """Where this group's processes meet: apart from the groups before it, whose addresses are still in the store.

    The store stays up between groups: others may be in the next one before this process has left the last.
    """
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    address = tuple(os.environ[name] for name in names)
    if address not in _stores:
        _stores.clear()
        _stores[address] = next(dist.rendezvous("env://", timeout=wait))[0]
    store = _stores[address]
    return dist.PrefixStore(f"lamina/{store.add(f'lamina/{rank}', 1)}", store)


def _joined() -> tuple[int, int]:
    return dist.get_rank(), dist.get_world_size()
