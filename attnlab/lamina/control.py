"""The control channel of a group: JSON between any two ranks, and the news of who failed.

A thread for each peer waits for its messages, so that a peer's end is noticed while this process computes, waits for
somebody else or is idle, and questions are answered while it waits.
"""

import contextlib
import json
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch

Message = dict[str, Any]

HEAD, REST, CUT = 0, 1, 2  # tags: a message's first part, what did not fit, nothing
FIRST = 4096  # bytes of the first part, of which 8 hold the length
FOREVER = timedelta(days=365)
GRACE = 1.0  # seconds, for news and answers that are on their way


class WorkerError(RuntimeError):
    """A process of the group died, hung, failed or left.

    Attributes:
        rank: whose fault it was; None where nobody knows.
        role: `"model"`, `"attention"`, or `""`.
        requests: what the decoder needs to start its requests again, filled in by it.
    """

    def __init__(self, message: str, rank: int | None = None, role: str = "", requests: tuple = ()) -> None:
        super().__init__(message)
        self.rank, self.role, self.requests = rank, role, requests


def cut(pg: Any, peer: int) -> None:
    """Close gloo's connection to `peer`. A wait that runs out does so; it wakes whoever waits on it, here and there."""
    with contextlib.suppress(RuntimeError):
        pg.recv([torch.empty(1, dtype=torch.uint8)], peer, CUT).wait(timedelta(milliseconds=1))


class Control:
    """Commands, replies and failures of one rank.

    Args:
        pg: a gloo process group of all ranks, of this object alone.
        roles: the role of each rank.
        timeout: seconds that a peer may keep this one waiting.
    """

    def __init__(self, pg: Any, rank: int, roles: tuple[str, ...], timeout: float) -> None:
        self.rank, self.roles, self.timeout = rank, roles, timeout
        self.peers = [peer for peer in range(len(roles)) if peer != rank]
        self.error: WorkerError | None = None
        self.waiting: tuple[int, str, float] | None = None  # for whom, for what, since when
        self.sent, self.received = Counter[str](), Counter[str]()
        self.on_failure: Callable[[], None] = lambda: None
        self._pg, self._lock, self._sending = pg, threading.Lock(), threading.Lock()
        self._failed = threading.Event()
        self.ended = False  # the leader closed the group
        self._closing, self._left = False, set[int]()
        self._out: deque[tuple[int, Any, torch.Tensor]] = deque(maxlen=16 * len(roles))
        self._commands: queue.SimpleQueue[tuple[Message, int] | None] = queue.SimpleQueue()
        self._replies = {peer: queue.SimpleQueue[tuple[Message, int] | None]() for peer in self.peers}
        self._answers: queue.SimpleQueue[tuple[int, list | None]] = queue.SimpleQueue()
        self._questions = 0
        self._threads = {
            peer: threading.Thread(target=self._listen, args=(peer,), name=f"lamina-{peer}", daemon=True)
            for peer in self.peers
        }
        for thread in self._threads.values():
            thread.start()

    def name(self, rank: int) -> str:
        return f"rank {rank} ({self.roles[rank]})"

    def command(self, message: Message) -> None:
        """From the leader to all others."""
        self.check()
        self.ended |= message.get("op") == "close"
        for peer in self.peers:
            self.sent["command"] += self._send(peer, "command", message)

    def next_command(self, timeout: float | None = None) -> Message:
        """The leader's next command; without a `timeout` it may take for ever, but not longer than the leader lives."""
        return self._take(self._commands, 0, "command", timeout)

    def reply(self, message: Message) -> None:
        """To the leader."""
        self.check()
        self.sent["command"] += self._send(0, "reply", message)

    def replies(self, limit: bool = True) -> list[Message]:
        """At the leader: one reply of every other rank, in their order; without a `limit` they may take for ever."""
        return [self._take(self._replies[peer], peer, "reply", self.timeout if limit else None) for peer in self.peers]

    def check(self) -> None:
        """Raise what is known to have failed."""
        if self.error is not None:
            raise self.told(self.error)

    def told(self, error: WorkerError, waited: tuple[int, str, float] | None = None) -> WorkerError:
        """A copy of `error` to raise here, with what this rank waited for."""
        text = str(error)
        if waited is not None:
            peer, kind, seconds = waited
            text += f". {self.name(self.rank)} had waited {seconds:.2f} s for {kind} of {self.name(peer)}"
        return WorkerError(text, error.rank, error.role)

    def fail(self, text: str, rank: int) -> WorkerError:
        """Note a failure and tell everybody, unless one is known already. Returns the one that counts."""
        with self._lock:
            if self.error is not None:
                return self.error
            self.error = error = WorkerError(text, rank, self.roles[rank])
        if not self._closing:
            for peer in self.peers:
                if peer not in self._left and peer != rank:
                    self._send(peer, "failed", {"text": text, "rank": rank})
        self._failed.set()
        for waiters in (self._commands, *self._replies.values()):
            waiters.put(None)
        self.on_failure()
        return error

    def lost(self, peer: int, kind: str, seconds: float) -> WorkerError:
        """What to raise when the connection to `peer` broke while it was waited for."""
        # Its listener, or a note about a third one, is about to say why.
        if not self._failed.wait(min(GRACE, self.timeout)):
            self.fail(f"{self.name(peer)} broke its connection", peer)
        assert self.error is not None
        return self.told(self.error, (peer, kind, seconds))

    def late(self, peer: int, kind: str, seconds: float) -> WorkerError:
        """What to raise when `peer` took too long, which may itself be waiting for the one to blame."""
        if self.error is None:
            culprit, text = self._blame(peer)
            self.fail(text, culprit)
        assert self.error is not None
        return self.told(self.error, (peer, kind, seconds))

    def close(self) -> None:
        """Say goodbye, wait until the others did (not after a failure), and end the threads."""
        self._closing = True
        for peer in self.peers:
            self._send(peer, "bye", {})
        end = time.monotonic() + (self.timeout if self.error is None else 0.0)
        for thread in self._threads.values():
            while thread.is_alive() and self.error is None and time.monotonic() < end:
                thread.join(0.05)
        for peer, work, _ in self._out:
            if self.error is None or peer != self.error.rank:
                with contextlib.suppress(RuntimeError):
                    work.wait(timedelta(seconds=0.2))
        for peer, thread in self._threads.items():
            cut(self._pg, peer)
            thread.join(GRACE)
        self._out.clear()
        self._pg = None

    def _blame(self, peer: int) -> tuple[int, str]:
        """Follow who waits for whom to the one that does not answer, or waits for nobody."""
        chain, seen = "", {self.rank}
        while True:
            answer = self._ask(peer)
            if answer is None:
                return peer, f"{self.name(peer)} does not answer{chain}"
            if not answer or answer[0] in seen:
                return peer, f"{self.name(peer)} answers, but did not send what was waited for{chain}"
            seen.add(peer)
            chain = f", and {self.name(peer)} waits for {answer[1]} of {self.name(answer[0])}{chain}"
            peer = answer[0]

    def _ask(self, peer: int) -> list | None:
        """Whom `peer` waits for, and for what; `[]`: for nobody; None: no answer."""
        self._questions += 1
        self._send(peer, "ask", {"question": self._questions})
        end = time.monotonic() + max(GRACE, self.timeout / 30)
        while (left := end - time.monotonic()) > 0 and self.error is None:
            with contextlib.suppress(queue.Empty):
                question, answer = self._answers.get(timeout=min(left, 0.05))
                if question == self._questions:
                    return answer
        return None

    def _take(self, waiters: queue.SimpleQueue, peer: int, kind: str, timeout: float | None) -> Message:
        start = time.monotonic()
        self.waiting = None if timeout is None else (peer, kind, start)
        try:
            item = waiters.get(timeout=timeout)
        except queue.Empty:
            raise self.late(peer, kind, time.monotonic() - start) from None
        finally:
            self.waiting = None
        if item is None:
            waiters.put(None)
            assert self.error is not None
            raise self.told(self.error)
        message, size = item
        self.received["command"] += size
        return message

    def _send(self, peer: int, what: str, message: Message) -> int:
        data = json.dumps([what, message]).encode()
        whole = len(data).to_bytes(8, "little") + data
        parts = [(HEAD, whole[:FIRST]), (REST, whole[FIRST:])]
        with self._sending, contextlib.suppress(RuntimeError):  # a peer that is gone: its listener says so
            for tag, part in parts:
                if part:
                    x = torch.frombuffer(bytearray(part), dtype=torch.uint8)
                    self._out.append((peer, self._pg.send([x], peer, tag), x))
        return len(data)

    def _receive(self, peer: int) -> tuple[str, Message, int]:
        x = torch.zeros(FIRST, dtype=torch.uint8)
        self._pg.recv([x], peer, HEAD).wait(FOREVER)
        data = x.numpy().tobytes()
        size, data = int.from_bytes(data[:8], "little"), data[8:]
        if size > len(data):
            x = torch.zeros(size - len(data), dtype=torch.uint8)
            self._pg.recv([x], peer, REST).wait(FOREVER)
            data += x.numpy().tobytes()
        return *json.loads(data[:size]), size

    def _listen(self, peer: int) -> None:
        try:
            while self._handle(peer, *self._receive(peer)):
                pass
        except RuntimeError:
            if not self._closing:
                self.fail(f"{self.name(peer)} is gone: its connection closed", peer)

    def _handle(self, peer: int, what: str, message: Message, size: int) -> bool:
        if what == "command":
            self.ended |= message.get("op") == "close"
            self._commands.put((message, size))
        elif what == "reply":
            self._replies[peer].put((message, size))
        elif what == "ask":
            waiting = self.waiting
            self._send(peer, "answer", {"question": message["question"], "waits": list(waiting or ())[:2]})
        elif what == "answer":
            self._answers.put((message["question"], message["waits"]))
        elif what == "failed":
            self.fail(message["text"], message["rank"])
        elif what == "bye":
            self._left.add(peer)
            return False
        return True
