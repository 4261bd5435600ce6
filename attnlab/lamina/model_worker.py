"""What a replica of the model does: its slices of every round, and prompts."""

import functools
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..decoder_models import dense
from ..full import full_attention
from ..states import merge_states
from .group import Group
from .link import Incoming
from .placement import Part, Placement
from .protocol import runner, steps
from .slices import Rotation, Slices, greedy

Sample = Callable[[Tensor], Tensor]


class Answer(NamedTuple):
    """What one attention worker sends back for its part of a batch."""

    part: Part
    out: Incoming
    lse: Incoming | None


class Coming(NamedTuple):
    """What a slice waits for."""

    residual: Incoming | None  # None: the slice before ran here
    answers: list[Answer]


@dataclass
class Batch:
    """A batch in a round."""

    index: int
    tokens: Tensor  # int64 [n]
    rotation: Rotation
    parts: list[Part]
    residual: Tensor | None = None  # behind the last slice that ran here


class Replica:
    """A model's part of the work; the leader has one too.

    Slice `k` of batch `j` runs on replica `(j + k) % R`. Every replica takes its own in the order of `(k, j)`: with
    `R + 1` batches, while attention of one is under way, the replicas compute the others.
    """

    def __init__(self, fn: str, group: Group, model: Any, sample: Sample | None) -> None:
        self.group, self.link, self.model = group, group.link, model
        self.cut = Slices(fn, model)
        self.sample = greedy if sample is None else sample
        facts = self.cut.facts
        self.device = facts.device
        self.placement = Placement(group.plan, len(group.models), facts.heads, facts.kv_heads)
        self._warm_up()

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What the attention workers need to know of the model, and replicas must have in common."""
        facts = self.cut.facts
        return {
            "layers": facts.layers,
            "heads": facts.heads,
            "kv_heads": facts.kv_heads,
            "head_dim": facts.head_dim,
            "dtype": str(self.cut.dtype).removeprefix("torch."),
            "scale": self.cut.scale,
            "vocab": facts.vocab,
            "weights": _checksum(self.model),
        }

    def _warm_up(self) -> None:
        """First calls import and compile, which may take longer than the others would wait in a round."""
        facts = self.cut.facts
        q, k = (
            torch.zeros(1, 1, heads, facts.head_dim, dtype=self.cut.dtype, device=self.device)
            for heads in (facts.heads, facts.kv_heads)
        )
        with torch.no_grad():
            full_attention(q, k, k, scale=self.cut.scale)
            if self.group.plan.by == "sequence":
                wide = q.to(torch.promote_types(q.dtype, torch.float32))
                merge_states(torch.stack([wide, wide]), torch.stack([wide[..., 0]] * 2))

    def prefill(self, message: dict[str, Any], ids: Tensor) -> Tensor:
        """The first token `[1]` of prompt `ids [T]`. Keys and values of a layer leave while the next one computes."""
        cut, last = self.cut, self.cut.facts.layers - 1
        rotation = cut.rotation(torch.arange(len(ids), device=self.device))
        parts = self.placement.prompt(message["id"])
        begun = time.monotonic()
        residual = cut.embed(ids)
        for layer in range(last + 1):
            q, normed = cut.query(layer, residual, rotation)
            k, v = cut.key_value(layer, normed, rotation)
            for part in parts:
                mine = torch.stack([x[part.tokens][:, part.kv_heads] for x in (k, v)])
                self.link.send(mine, part.rank, "prompt")
            if layer == last:
                q, residual = q[-1:], residual[-1:]
            out = full_attention(q[None], k[None], v[None], scale=cut.scale)
            assert isinstance(out, Tensor)
            residual = cut.close(layer, residual, out[0])
        token = self._next(residual)
        self.group.record("prefill", -1, -1, begun)
        return token

    def round(self, message: dict[str, Any]) -> dict[int, Tensor]:
        """One token of every request: those of the batches whose last slice runs here."""
        self.placement.drop(message["drop"])
        batches = {
            j: self._batch(j, ids, tokens)
            for j, (ids, tokens) in enumerate(zip(message["batches"], message["tokens"], strict=True))
            if ids
        }
        slices, replicas = self.cut.facts.layers + 1, len(self.group.models)
        items = [
            (k, batches[j])
            for k, j in steps(slices, len(message["batches"]))
            if j in batches and runner(k, j, replicas) == self.group.rank
        ]
        found = {}
        following = self._expect(*items[0]) if items else None
        for i, (k, batch) in enumerate(items):
            # Posted one slice ahead, so that what comes while this one computes has somewhere to go.
            coming, following = following, self._expect(*items[i + 1]) if i + 1 < len(items) else None
            assert coming is not None
            token = self._slice(k, batch, coming)
            if token is not None:
                found[batch.index] = token
        self.placement.advance([id for ids in message["batches"] for id in ids])
        return found

    def ends_at(self, batch: int) -> int:
        """The replica that has a batch's new tokens."""
        return runner(self.cut.facts.layers, batch, len(self.group.models))

    def _batch(self, index: int, ids: list[int], tokens: list[int]) -> Batch:
        positions = torch.tensor([self.placement.lengths[id] for id in ids], device=self.device)
        return Batch(
            index,
            torch.tensor(tokens, device=self.device),
            self.cut.rotation(positions),
            self.placement.parts(ids),
        )

    def _expect(self, k: int, batch: Batch) -> Coming:
        """Post the receives of a slice."""
        if k == 0:
            return Coming(None, [])
        n, facts, cut = len(batch.tokens), self.cut.facts, self.cut
        before, residual = runner(k - 1, batch.index, len(self.group.models)), None
        if before != self.group.rank:
            residual = self.link.receive((n, cut.hidden), cut.dtype, before, "hidden")
        merged = self.group.plan.by == "sequence"
        answers = []
        for part in batch.parts:
            rows, heads = part.size, part.heads.stop - part.heads.start
            dtype = torch.promote_types(cut.dtype, torch.float32) if merged else cut.dtype
            out = self.link.receive((rows, heads, facts.head_dim), dtype, part.rank, "out")
            lse = self.link.receive((rows, heads), dtype, part.rank, "lse") if merged else None
            answers.append(Answer(part, out, lse))
        return Coming(residual, answers)

    def _slice(self, k: int, batch: Batch, coming: Coming) -> Tensor | None:
        cut, rank, j = self.cut, self.group.rank, batch.index
        if k == 0:
            begun = time.monotonic()
            residual = cut.embed(batch.tokens)
        else:
            attended = self._joined(batch, coming.answers)
            before = batch.residual if coming.residual is None else coming.residual.wait()
            assert before is not None
            begun = time.monotonic()
            residual = cut.close(k - 1, before, attended)
        if k == cut.facts.layers:
            token = self._next(residual)
            self.group.record("slice", j, k, begun)
            return token
        q, normed = cut.query(k, residual, batch.rotation)
        sending = time.monotonic()
        for part in batch.parts:
            self.link.send(q[part.rows][:, part.heads], part.rank, "q")
        self.group.record("send q", j, k, sending)
        computing = time.monotonic()
        new_k, new_v = cut.key_value(k, normed, batch.rotation)
        for part in batch.parts:
            if part.new_size:
                mine = torch.stack([x[part.new][:, part.kv_heads] for x in (new_k, new_v)])
                self.link.send(mine, part.rank, "kv")
        self.group.record("kv", j, k, computing)
        if (after := runner(k + 1, j, len(self.group.models))) == rank:
            batch.residual = residual
        else:
            self.link.send(residual, after, "hidden")
        self.group.record("slice", j, k, begun)
        return None

    def _joined(self, batch: Batch, answers: list[Answer]) -> Tensor:
        """Attention of a batch `[n, Hq, D]` from its workers' answers."""
        facts, n = self.cut.facts, len(batch.tokens)
        if self.group.plan.by != "sequence":
            out = torch.empty(n, facts.heads, facts.head_dim, dtype=self.cut.dtype, device=self.device)
            for part, piece, _ in answers:
                out[part.rows, part.heads] = piece.wait()
            return out
        states = []
        for part, piece, weight in answers:
            assert weight is not None
            out, lse = piece.wait(), weight.wait()
            if part.size < n:
                every = out.new_zeros(n, facts.heads, facts.head_dim), lse.new_full((n, facts.heads), -torch.inf)
                every[0][part.rows], every[1][part.rows] = out, lse
                out, lse = every
            states.append((out, lse))
        return merge_states(torch.stack([out for out, _ in states]), torch.stack([lse for _, lse in states]))[0]

    def _next(self, residual: Tensor) -> Tensor:
        """The next tokens int64 `[n]` behind the residual stream of the last layer."""
        tokens = self.sample(self.cut.logits(residual))
        if not isinstance(tokens, Tensor) or tokens.shape != residual.shape[:1] or tokens.dtype != torch.int64:
            came = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            want = list(residual.shape[:1])
            raise ValueError(f"DisaggregatedDecoder: sample must return int64 ids {want}, got {came}")
        return tokens


def _checksum(model: Any) -> int:
    """Of a few numbers of every parameter: other weights have another, but for chance."""
    found = 0
    for weight in model.parameters():
        flat = weight.detach().flatten()
        few = flat[:: max(1, len(flat) // 64)].contiguous().view(torch.uint8)
        found = zlib.crc32(bytes(few.tolist()), found)
    return found


class ModelWorker:
    """A replica of the model other than the leader's.

    Args:
        group: of all ranks.
        model: the leader's model, of the same weights, on this rank's device.
        sample: as the leader's, see `DisaggregatedDecoder`: last slices take turns between replicas.

    Raises what `Slices` does, and ValueError on a rank that is the leader's or an attention worker's.
    """

    def __init__(self, group: Group, model: Any, *, sample: Sample | None = None) -> None:
        if group.role != "model" or group.rank == 0:
            raise ValueError(
                f"ModelWorker: group must be joined as a replica other than the leader, got rank {group.rank}"
            )
        self.group, self.model = group, model
        self._replica = Replica("ModelWorker", group, model, sample)
        self._sampled = sample is not None

    def serve(self) -> None:
        """Work until the leader closes. Raises WorkerError when a rank is gone."""
        with dense(self.model):
            while (message := self.group.next_command())["op"] != "close":
                getattr(self, f"_{message['op']}")(message)

    def _model(self, message: dict[str, Any]) -> None:
        self.group.reply(self._replica.description | {"sampled": self._sampled})

    def _prefill(self, message: dict[str, Any]) -> None:
        replica, link = self._replica, self.group.link
        replica.placement.admit(message["id"], message["length"], message["shard"])
        if message["replica"] == self.group.rank:
            ids = link.receive((message["length"],), torch.int64, 0, "token").wait()
            link.send(replica.prefill(message, ids), 0, "token")

    def _round(self, message: dict[str, Any]) -> None:
        for tokens in self._replica.round(message).values():
            self.group.link.send(tokens, 0, "token")

    def _stats(self, message: dict[str, Any]) -> None:
        self.group.reply(self.group.report())
