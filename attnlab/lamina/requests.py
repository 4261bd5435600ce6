"""Which requests run, in which batch, and where their keys and values lie: the leader's books. No tensors here."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .plan import SplitPlan


@dataclass(frozen=True)
class Request:
    """A request as it stands: enough to start it again elsewhere, by `submit(request.tokens, request.remaining)`.

    Attributes:
        id: what `submit` returned.
        tokens: the prompt and all tokens generated so far.
        prompt: how many of them the prompt has.
        remaining: how many more may be generated.
    """

    id: int
    tokens: tuple[int, ...]
    prompt: int
    remaining: int

    @property
    def generated(self) -> tuple[int, ...]:
        return self.tokens[self.prompt :]


class Room(NamedTuple):
    """What an attention worker can hold: pages of `page_size` tokens, `capacity` tokens in all (None: any number)."""

    page_size: int
    capacity: int | None

    @property
    def pages(self) -> int | None:
        return None if self.capacity is None else self.capacity // self.page_size

    def need(self, tokens: int) -> int:
        """Pages of a request with so many tokens here."""
        return -(-tokens // self.page_size)


@dataclass
class _Entry:
    id: int
    tokens: list[int]
    prompt: int
    remaining: int
    pages: list[int] = field(default_factory=list)  # reserved, of each worker
    shard: int | None = None  # request plan: the worker that has it
    batch: int = -1

    def snapshot(self) -> Request:
        return Request(self.id, tuple(self.tokens), self.prompt, self.remaining)


class Admission(NamedTuple):
    """A request that starts: its prompt, and under a request plan the worker that holds it."""

    id: int
    tokens: tuple[int, ...]
    shard: int | None


class Requests:
    """Requests waiting and running.

    A request starts when the pages of all tokens it may ever have are free, so that none is stopped half way, and in
    the order they came: one that waits for room is not overtaken, else long ones could wait for ever. Batches are kept
    balanced, by number first, which the model's time follows, and by tokens second, which attention's follows.

    Args:
        plan: where keys and values lie.
        rooms: of each attention worker.
        batches: how many run in turn.
    """

    def __init__(self, plan: SplitPlan, rooms: Sequence[Room], batches: int) -> None:
        self.plan, self.rooms = plan, tuple(rooms)
        self.free = [room.pages for room in rooms]
        self.reserved = [0] * len(rooms)
        self._ids = itertools.count()
        self._waiting: dict[int, _Entry] = {}
        self._running: dict[int, _Entry] = {}
        self._batches: list[list[int]] = [[] for _ in range(batches)]
        self._ended: list[int] = []

    def submit(self, fn: str, tokens: Sequence[int], new: int) -> int:
        """Queue a request for `new` tokens. ValueError when the workers could not hold it even if it were alone."""
        stored = len(tokens) + new - 1  # the last token's key is never needed
        if not any(self._fits(pages, empty=True) for _, pages in self._places(stored)):
            raise ValueError(
                f"{fn}: prompt and max_new_tokens must fit the attention workers, got {len(tokens)} + {new} tokens, "
                f"of which {stored} are stored, for {self._described()}"
            )
        entry = _Entry(next(self._ids), list(tokens), len(tokens), new)
        self._waiting[entry.id] = entry
        return entry.id

    def admit(self) -> list[Admission]:
        """The waiting requests that fit now, placed; they count as running from here on."""
        found = []
        for entry in list(self._waiting.values()):
            stored = len(entry.tokens) + entry.remaining - 1
            able = [(shard, pages) for shard, pages in self._places(stored) if self._fits(pages)]
            if not able:
                break
            entry.shard, entry.pages = min(able, key=lambda place: self._load(place[0]))
            self._take(entry, 1)
            self._running[entry.id] = self._waiting.pop(entry.id)
            self._join(entry)
            found.append(Admission(entry.id, tuple(entry.tokens), entry.shard))
        return found

    def fits_next(self) -> bool:
        """Whether the request at the head of the queue fits now."""
        head = next(iter(self._waiting.values()), None)
        if head is None:
            return False
        return any(self._fits(pages) for _, pages in self._places(len(head.tokens) + head.remaining - 1))

    def batches(self) -> list[list[int]]:
        """Ids of every batch, for the next round."""
        while True:
            sizes = [len(batch) for batch in self._batches]
            most, least = sizes.index(max(sizes)), sizes.index(min(sizes))
            if sizes[most] - sizes[least] < 2:
                return [list(batch) for batch in self._batches]
            target = (self._tokens(most) - self._tokens(least)) / 2
            moved = min(self._batches[most], key=lambda i: abs(len(self._running[i].tokens) - target))
            self._batches[most].remove(moved)
            self._batches[least].append(moved)
            self._running[moved].batch = least

    def last_token(self, id: int) -> int:
        return self._running[id].tokens[-1]

    def take(self, id: int, token: int, ends: Iterable[int]) -> None:
        """Note a new token; its request leaves if that was the last."""
        entry = self._running[id]
        entry.tokens.append(token)
        entry.remaining -= 1
        if entry.remaining == 0 or token in ends:
            self._leave(entry)

    def remove(self, fn: str, id: int) -> None:
        """Cancel a request. ValueError when there is none of this id."""
        if self._waiting.pop(id, None) is None:
            if id not in self._running:
                raise ValueError(f"{fn}: id must be of a request under way, got {id!r}")
            self._leave(self._running[id])

    def ended(self) -> list[int]:
        """Ids that left since the last call: their keys and values can go."""
        found, self._ended = self._ended, []
        return found

    @property
    def any_ended(self) -> bool:
        return bool(self._ended)

    @property
    def running(self) -> tuple[int, ...]:
        return tuple(self._running)

    def snapshot(self) -> tuple[Request, ...]:
        """All requests under way, running ones first, in the order in which they came."""
        return tuple(entry.snapshot() for entry in (*self._running.values(), *self._waiting.values()))

    def _places(self, tokens: int) -> list[tuple[int | None, list[int]]]:
        """Where a request with so many stored tokens could lie: its shard, and the pages of each worker."""
        shares = self.plan.sizes or (1,) * self.plan.shards
        if self.plan.by == "sequence":
            counts = self.plan.count(tokens)
            return [(None, [room.need(n) for room, n in zip(self.rooms, counts, strict=True)])]
        whole = [room.need(tokens) if share else 0 for room, share in zip(self.rooms, shares, strict=True)]
        if self.plan.by == "head":
            return [(None, whole)]
        return [(w, [n if i == w else 0 for i, n in enumerate(whole)]) for w, share in enumerate(shares) if share]

    def _fits(self, pages: Sequence[int], *, empty: bool = False) -> bool:
        room = [r.pages for r in self.rooms] if empty else self.free
        return all(there is None or n <= there for n, there in zip(pages, room, strict=True))

    def _load(self, shard: int | None) -> float:
        """Of a request plan's worker: pages reserved, relative to its share."""
        return 0.0 if shard is None else self.reserved[shard] / (self.plan.sizes or (1,) * self.plan.shards)[shard]

    def _take(self, entry: _Entry, sign: int) -> None:
        for w, n in enumerate(entry.pages):
            self.reserved[w] += sign * n
            there = self.free[w]
            self.free[w] = None if there is None else there - sign * n

    def _join(self, entry: _Entry) -> None:
        entry.batch = min(range(len(self._batches)), key=lambda j: (len(self._batches[j]), self._tokens(j)))
        self._batches[entry.batch].append(entry.id)

    def _leave(self, entry: _Entry) -> None:
        del self._running[entry.id]
        self._batches[entry.batch].remove(entry.id)
        self._take(entry, -1)
        self._ended.append(entry.id)

    def _tokens(self, batch: int) -> int:
        return sum(len(self._running[i].tokens) for i in self._batches[batch])

    def _described(self) -> str:
        each = [f"{'any number of' if r.pages is None else r.pages} pages of {r.page_size}" for r in self.rooms]
        return f"workers with {', '.join(each)}"
