"""The attention side of a disaggregated decoder: keys, values and attention of one shard, and no model."""

import time
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from ..append import BACKENDS as APPEND
from ..append import append_token
from ..dispatch import check_int
from .control import Message
from .decode import BACKENDS, split_decode
from .group import Group
from .kv_pool import KVPool
from .link import Incoming
from .placement import Part, Placement
from .protocol import runner, steps

PROMPTS = 2  # layers of a prompt that are waited for at a time


class Work(NamedTuple):
    """One batch of a round, the same in every layer."""

    part: Part
    lengths: Tensor  # int32 [rows]: tokens here before the new one
    table: Tensor  # int32 [rows, N]
    slots: Tensor  # int64 [new rows]: where the new keys go
    new: Tensor | None  # which of the part's rows keep a new token here; None: all


class AttentionWorker:
    """Serves the attention of one shard: keeps its keys and values and answers queries.

    Attention over previous tokens runs while the model still computes the new keys and values, which join it at the
    end (arXiv 2405.01814, section 4.2).

    Args:
        group: of which this rank is an attention worker.
        page_size: tokens a page of the pool.
        capacity: tokens the pool holds, in whole pages. None: it grows.
        backend: of `split_decode` and `append_token`.

    Raises:
        ValueError: naming the argument, what was expected and what came.
    """

    def __init__(
        self, group: Group, *, page_size: int = 64, capacity: int | None = None, backend: str = "auto"
    ) -> None:
        fn = "AttentionWorker"
        if group.shard is None:
            raise ValueError(
                f"{fn}: group must be one in which this process is an attention worker (ranks {list(group.workers)}), "
                f"got rank {group.rank}"
            )
        check_int(fn, "page_size", page_size, 1)
        if capacity is not None:
            check_int(fn, "capacity", capacity, 1)
            if capacity < page_size:
                raise ValueError(f"{fn}: capacity must be at least page_size {page_size}, got {capacity}")
        known = ["auto", *(name for name in BACKENDS if name in APPEND)]
        if backend not in known:
            raise ValueError(f"{fn}: backend must be one of {', '.join(map(repr, known))}, got {backend!r}")
        self._group, self._link, self._shard, self._backend = group, group.link, group.shard, backend
        self._page_size, self._capacity = page_size, capacity
        self._replicas = len(group.models)

    def serve(self) -> None:
        """Work until the leader closes the group; then, or when anything fails, it is closed here too.

        Raises WorkerError when another process failed.
        """
        work = {"model": self._model, "prefill": self._prefill, "round": self._round, "stats": self._stats}
        with self._group, torch.no_grad():
            while (message := self._group.next_command())["op"] != "close":
                work[message["op"]](message)

    def _model(self, message: Message) -> None:
        self._layers, self._head_dim, self._scale = message["layers"], message["head_dim"], message["scale"]
        self._dtype = getattr(torch, message["dtype"])
        self._wide = torch.promote_types(self._dtype, torch.float32)
        plan = self._group.plan
        self._merged = plan.by == "sequence"  # by the model worker: states go there as they are
        self._placement = Placement(plan, self._replicas, message["heads"], message["kv_heads"])
        self._pool = KVPool(
            self._layers, self._placement.kv_heads(self._shard), self._head_dim, self._dtype, self._group.device,
            page_size=self._page_size, capacity=self._capacity,
        )  # fmt: skip
        self._warm_up(message["heads"] // message["kv_heads"])
        self._group.reply({"page_size": self._page_size, "capacity": self._capacity})

    def _warm_up(self, group: int) -> None:
        """First calls import, compile and build for seconds, which must not count as a slice's time."""
        kv_heads = self._placement.kv_heads(self._shard)
        if kv_heads:
            q, kv = (torch.zeros(1, h, self._head_dim).to(self._pool.k[0]) for h in (kv_heads * group, kv_heads))
            one = self._on_device([1], torch.int32)
            self._append(self._attend(q[:, None], 0, one, one[:, None] - 1), q[:, None], kv, kv, None)

    def _stats(self, message: Message) -> None:
        self._group.reply(self._group.report())

    def _prefill(self, message: Message) -> None:
        id, replica = message["id"], message["replica"]
        self._placement.admit(id, message["length"], message["shard"])
        part = self._placement.prompt_part(self._shard, id)
        if part is None:
            return
        slots = self._on_device(self._pool.extend(id, part.size), torch.int64)
        shape = (2, part.size, part.kv_heads.stop - part.kv_heads.start, self._head_dim)
        posted: deque[Incoming] = deque()
        for layer in range(self._layers):
            while len(posted) < min(PROMPTS, self._layers - layer):
                posted.append(self._link.receive(shape, self._dtype, replica, "prompt"))
            self._pool.write(layer, slots, *posted.popleft().wait())

    def _round(self, message: Message) -> None:
        self._placement.drop(message["drop"])
        for id in message["drop"]:
            if id in self._pool:
                self._pool.drop(id)
        batches = message["batches"]
        work = [self._plan(ids) for ids in batches]
        mine = [(k, j, found) for k, j in steps(self._layers, len(batches)) if (found := work[j]) is not None]
        ahead, posted = len(batches) + 1, deque[tuple[Incoming, Incoming]]()
        for n, (k, j, found) in enumerate(mine):
            while len(posted) < min(ahead, len(mine) - n):
                posted.append(self._post(*mine[n + len(posted)]))
            self._step(k, j, found, *posted.popleft())
        self._placement.advance([id for ids in batches for id in ids])

    def _plan(self, ids: list[int]) -> Work | None:
        part = self._placement.part(self._shard, ids)
        if part is None:
            return None
        numbers = torch.arange(len(ids))
        rows, new = numbers[part.rows], numbers[part.new]
        here = [ids[row] for row in rows.tolist()]
        lengths = self._on_device([self._pool.tokens(id) for id in here], torch.int32)
        slots = [slot for row in new.tolist() for slot in self._pool.extend(ids[row], 1)]
        some = None if part.new_size == part.size else torch.searchsorted(rows, new).to(self._group.device)
        return Work(part, lengths, self._pool.table(here), self._on_device(slots, torch.int64), some)

    def _post(self, k: int, j: int, work: Work) -> tuple[Incoming, Incoming]:
        part, source = work.part, runner(k, j, self._replicas)
        heads, kv_heads = (x.stop - x.start for x in (part.heads, part.kv_heads))
        q = self._link.receive((part.size, heads, self._head_dim), self._dtype, source, "q")
        kv = self._link.receive((2, part.new_size, kv_heads, self._head_dim), self._dtype, source, "kv")
        return q, kv

    def _step(self, layer: int, j: int, work: Work, incoming_q: Incoming, incoming_kv: Incoming) -> None:
        q = incoming_q.wait()[:, None]
        start = time.monotonic()
        state = self._attend(q, layer, work.lengths, work.table)
        self._group.record("attend", j, layer, start)
        k, v = incoming_kv.wait()
        start = time.monotonic()
        if work.part.new_size:
            state = self._append(state, q, k, v, work.new)
        self._group.record("append", j, layer, start)
        to = runner(layer + 1, j, self._replicas)
        self._link.send(state[0][:, 0], to, "out")
        if self._merged:
            self._link.send(state[1][:, 0], to, "lse")
        self._pool.write(layer, work.slots, k, v)

    def _attend(self, q: Tensor, layer: int, lengths: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        return split_decode(
            q, self._pool.k[layer], self._pool.v[layer], lengths=lengths, page_table=table, scale=self._scale,
            out_dtype=self._wide, backend=self._backend,
        )  # fmt: skip

    def _append(
        self, state: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, new: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The new tokens' keys join all rows, or rows `new`. By sequence the state stays wide."""
        out, lse = state
        k, v = k[:, None], v[:, None]
        if new is None:
            to = out if self._merged else torch.empty(out.shape, dtype=self._dtype, device=out.device)
            return append_token(state, q, k, v, scale=self._scale, out=(to, lse), backend=self._backend)
        some = append_token((out[new], lse[new]), q[new], k, v, scale=self._scale, backend=self._backend)
        for x, part in zip(state, some):
            x[new] = part
        return state

    def _on_device(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._group.device)
