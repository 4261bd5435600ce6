"""Decoding simulated request by request, on Lamina or on homogeneous devices.

Prefill is outside, as in the paper: it runs on nodes of its own, and a request arrives with its prompt's KV.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .cost import Load, System
from .traffic import Arrival


class Served(NamedTuple):
    """What became of a request: when it arrived, was taken into a batch, had its first and its last token (seconds)."""

    arrival: float
    admitted: float
    first: float
    finished: float
    output: int


class Round(NamedTuple):
    """One round: its start and length (seconds), the requests that made a token, and the tokens held at its end."""

    start: float
    seconds: float
    requests: int
    tokens: int


@dataclass(frozen=True)
class SimulationReport:
    """What a simulation measured. Times in seconds; batches are requests over all of the system's rotated batches.

    Attributes:
        system: its name.
        tokens: made in all.
        seconds: from the first arrival to the last token.
        throughput: tokens per second of that time.
        token_time, token_time_p50, token_time_p99: between two tokens of a request, over all tokens.
        queue_time: mean wait from arrival to being taken into a batch.
        mean_batch: requests in a round, over the time in which there were any; `max_batch`: the most.
        max_tokens: the most tokens held in memory at once.
        dollars_per_million: tokens, at the system's price over all of `seconds`; None where the price is not known.
        served: per request, in order of arrival; `rounds`: all rounds in order.
    """

    system: str
    tokens: int
    seconds: float
    throughput: float
    token_time: float
    token_time_p50: float
    token_time_p99: float
    queue_time: float
    mean_batch: float
    max_batch: int
    max_tokens: int
    dollars_per_million: float | None
    served: tuple[Served, ...] = field(repr=False)
    rounds: tuple[Round, ...] = field(repr=False)


class Comparison(NamedTuple):
    """Two systems on the same requests; ratios are the first's over the second's, `per_dollar` of tokens per dollar."""

    first: SimulationReport
    second: SimulationReport
    throughput: float
    batch: float
    token_time: float
    per_dollar: float


def simulate(system: System, requests: Iterable[Arrival]) -> SimulationReport:
    """Serve `requests` by continuous batching, first come first served, and report.

    A request is taken in, at the start of a round, when its prompt and all of its output fit beside what the others
    will need at most (so that none is ever put out again; their output lengths are taken as known), into the rotated
    batch that holds the fewest tokens. In a round every request of every batch makes one token, and it takes
    `system.round_time`; token `i` of an output attends `prompt + i` tokens. The same requests give the same report.

    Raises:
        ValueError, TypeError: on requests that are not so, on none, and on one that can never fit.
    """
    if not isinstance(system, System):
        raise TypeError(f"simulate: system must be a CostModel or a HomogeneousCost, got {type(system).__name__}")
    queue = deque(_checked(system, requests))
    state = _State(system, len(queue))
    order = list(queue)
    while queue or state.running:
        if not state.running and queue[0][1].time > state.now:
            state.now = queue[0][1].time
        while queue and queue[0][1].time <= state.now and state.admit(*queue[0]):
            queue.popleft()
        state.advance()
    return _report(system, state, [request for _, request in order])


def compare(first: System, second: System, requests: Iterable[Arrival]) -> Comparison:
    """Simulate both on the same requests. ValueError where one's price is not known, or as `simulate`."""
    given = list(requests)
    prices = first.price, second.price
    a, b = simulate(first, given), simulate(second, given)
    speed = a.throughput / b.throughput
    # A price of nothing for both sides compares as equal.
    per_dollar = speed * prices[1] / prices[0] if prices[0] else float("inf") if prices[1] else speed
    return Comparison(a, b, speed, a.mean_batch / b.mean_batch, a.token_time / b.token_time, per_dollar)


class _State:
    """The clock, what each batch holds, and what has happened."""

    def __init__(self, system: System, count: int):
        self.system, self.now = system, 0.0
        self.reserved = 0
        self.requests = [0] * system.batches
        self.tokens = [0] * system.batches
        self.ends: list[tuple[int, int, int, int]] = []
        self.started: list[int] = []
        self.admitted, self.first, self.finished = ([0.0] * count for _ in range(3))
        self.rounds: list[Round] = []

    @property
    def running(self) -> int:
        return len(self.ends)

    def admit(self, index: int, request: Arrival) -> bool:
        """Into the lightest batch, if it fits."""
        size = request.prompt + request.output
        if self.reserved + size > self.system.capacity:
            return False
        self.reserved += size
        batch = min(range(len(self.tokens)), key=lambda b: (self.tokens[b], self.requests[b], b))
        self.requests[batch] += 1
        self.tokens[batch] += request.prompt
        self.admitted[index] = self.now
        self.started.append(index)
        heapq.heappush(self.ends, (len(self.rounds) + request.output, index, batch, size))
        return True

    def advance(self) -> None:
        """One round: a token for every request; those that have all of theirs leave."""
        self.tokens = [held + made for held, made in zip(self.tokens, self.requests)]
        seconds = self.system.round_time([Load(*load) for load in zip(self.requests, self.tokens)])
        self.rounds.append(Round(self.now, seconds, self.running, sum(self.tokens)))
        self.now += seconds
        for index in self.started:
            self.first[index] = self.now
        self.started.clear()
        while self.ends and self.ends[0][0] == len(self.rounds):
            _, index, batch, size = heapq.heappop(self.ends)
            self.finished[index] = self.now
            self.requests[batch] -= 1
            self.tokens[batch] -= size
            self.reserved -= size


def _checked(system: System, requests: Iterable[Arrival]) -> list[tuple[int, Arrival]]:
    """Numbered in order of arrival."""
    fn, found = "simulate", list(requests)
    if not found:
        raise ValueError(f"{fn}: requests must not be empty")
    for request in found:
        if not isinstance(request, Arrival):
            raise TypeError(f"{fn}: requests must be Arrivals, got {type(request).__name__}")
        good = _int(request.prompt) and _int(request.output) and request.prompt >= 0 and request.output >= 1
        if not good or not 0 <= request.time < float("inf"):
            raise ValueError(f"{fn}: a request needs time >= 0, prompt >= 0 and output >= 1, got {request}")
        if request.prompt + request.output > system.capacity:
            raise ValueError(f"{fn}: {request} never fits: {system.name} holds {system.capacity} tokens")
    return list(enumerate(sorted(found, key=lambda request: request.time)))


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _report(system: System, state: _State, requests: Sequence[Arrival]) -> SimulationReport:
    served = tuple(
        Served(request.time, state.admitted[i], state.first[i], state.finished[i], request.output)
        for i, request in enumerate(requests)
    )
    rounds = tuple(state.rounds)
    tokens = sum(each.requests for each in rounds)
    seconds, busy = state.now - requests[0].time, sum(each.seconds for each in rounds)
    weighted = sum(each.seconds * each.requests for each in rounds)
    try:
        dollars = system.price * seconds / 3600 / tokens * 1e6
    except ValueError:
        dollars = None
    p50, p99 = _quantiles(rounds, tokens, (0.5, 0.99))
    return SimulationReport(
        system=system.name,
        tokens=tokens,
        seconds=seconds,
        throughput=tokens / seconds,
        token_time=weighted / tokens,
        token_time_p50=p50,
        token_time_p99=p99,
        queue_time=sum(each.admitted - each.arrival for each in served) / len(served),
        mean_batch=weighted / busy,
        max_batch=max(each.requests for each in rounds),
        max_tokens=max(each.tokens for each in rounds),
        dollars_per_million=dollars,
        served=served,
        rounds=rounds,
    )


def _quantiles(rounds: Sequence[Round], tokens: int, shares: Sequence[float]) -> list[float]:
    """Seconds that at least a share of all tokens did not exceed."""
    ordered, found = sorted(rounds, key=lambda each: each.seconds), []
    for share in shares:
        passed = 0
        for each in ordered:
            passed += each.requests
            if passed >= share * tokens:
                found.append(each.seconds)
                break
    return found
