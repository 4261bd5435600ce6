"""Tensors between two ranks of a group: sends that never wait, receives posted ahead, and bytes counted by kind."""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from .control import Control, cut
from .protocol import KINDS

TAGS = {kind: 16 + i for i, kind in enumerate(KINDS)}
MESSAGES, BYTES = 64, 64 << 20  # that may be on their way to one peer
POLL = 20e-6  # seconds between looks at a device's receive


class Incoming:
    """A receive that was posted."""

    def __init__(self, link: "Link", x: Tensor, work: Any, source: int, kind: str) -> None:
        self._link, self._x, self._work, self._source, self._kind = link, x, work, source, kind

    def wait(self) -> Tensor:
        """The tensor, once it is there. WorkerError when its sender is gone or takes longer than the timeout."""
        if self._work is not None:
            self._link._finish(self._work, self._source, self._kind)
            self._work = None
            self._link.received[self._kind] += self._x.nbytes
        return self._x


class Link:
    """Point to point, ordered for each pair and direction. One thread at a time.

    Args:
        lane: `(source, target)` to the process group that carries it, and the peer's rank in that.
        device: where received tensors are; those to send are brought there.

    Attributes:
        sent, received: payload bytes by kind of `protocol.KINDS`, and "command".
        waited: seconds spent waiting by kind.
    """

    def __init__(
        self, control: Control, lane: Callable[[int, int], tuple[Any, int]], device: torch.device, timeout: float
    ) -> None:
        self.control, self.device = control, device
        self.sent, self.received = control.sent, control.received
        self.waited: defaultdict[str, float] = defaultdict(float)
        self._lane, self._out, self._under_way = lane, defaultdict[int, deque](deque), Counter[int]()
        self._patience = 0.9 * timeout  # the rest is for finding out who is to blame

    def send(self, x: Tensor, to: int, kind: str) -> None:
        """Start sending `x`, which must not be written to until the receiver has it; it is kept alive as long.

        Waits only for a peer that is 64 messages, or 64 MiB, behind. A tensor without elements is not sent.
        """
        self.control.check()
        if x.numel() == 0:
            return
        x = x.detach().to(self.device).contiguous()
        pg, peer = self._lane(self.control.rank, to)
        out = self._out[to]
        while out and (len(out) >= MESSAGES or self._under_way[to] + x.nbytes > BYTES):
            work, oldest, waiting = out[0]
            self._finish(work, to, waiting, sending=True)
            self._under_way[to] -= oldest.nbytes
            out.popleft()
        try:
            out.append((pg.send([x], peer, TAGS[kind]), x, kind))
        except RuntimeError:
            raise self.control.lost(to, f"sending {kind}", 0.0) from None
        self._under_way[to] += x.nbytes
        self.sent[kind] += x.nbytes

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int, kind: str) -> Incoming:
        """Post a receive. For each source they are posted in the order in which it sends."""
        x = torch.empty(tuple(shape), dtype=dtype, device=self.device)
        if x.numel() == 0:
            return Incoming(self, x, None, source, kind)
        pg, peer = self._lane(source, self.control.rank)
        try:
            work = pg.recv([x], peer, TAGS[kind])
        except RuntimeError:
            raise self.control.lost(source, kind, 0.0) from None
        self.control.check()  # after posting: a connection that breaks from here on wakes the wait
        return Incoming(self, x, work, source, kind)

    def close(self) -> None:
        """Forget what is on its way, and the connections."""
        self._out.clear()
        del self._lane

    def _finish(self, work: Any, peer: int, kind: str, *, sending: bool = False) -> None:
        start = time.monotonic()
        what = f"sending {kind}" if sending else kind
        self.control.waiting = (peer, what, start)
        try:
            if self.device.type == "cpu":
                work.wait(timedelta(seconds=self._patience))
            else:
                self._poll(work, start)
        except RuntimeError:
            seconds = time.monotonic() - start
            if seconds < 0.99 * self._patience or self.control.error is not None:
                raise self.control.lost(peer, what, seconds) from None
            raise self.control.late(peer, what, seconds) from None
        finally:
            self.control.waiting = None
            self.waited[kind] += time.monotonic() - start

    def _poll(self, work: Any, start: float) -> None:
        """NCCL's waits cannot be cut short, so look until the timeout; then the current stream waits for nothing."""
        while not work.is_completed():
            if self.control.error is not None or time.monotonic() - start > self._patience:
                raise RuntimeError
            time.sleep(POLL)
        work.wait()


def cut_all(pg: Any, peers: Sequence[int]) -> None:
    for peer in peers:
        cut(pg, peer)
