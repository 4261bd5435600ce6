"""A progress bar on a terminal, plain lines elsewhere; both on stderr, so that stdout holds results only."""

import shutil
import sys
import time
from typing import TextIO

WIDTH = 24


class Progress:
    """Counts steps up to `total`; `step(what)` says what starts now. On a terminal it says how much time is left.

    Steps that differ have a `cost` each; `total` is their sum then. As a context manager it ends its line, done or not.
    """

    def __init__(self, total: float, stream: TextIO | None = None, every_s: float = 5.0):
        self.total, self.done, self.every_s = max(total, 1), 0.0, every_s
        self.stream = sys.stderr if stream is None else stream
        self.live = self.stream.isatty()
        self.start = self.last = time.monotonic()

    def step(self, what: str, cost: float = 1) -> None:
        """Announce the next step. Without a terminal, at most a line every `every_s` seconds, and always the first."""
        now = time.monotonic()
        if self.live or self.done == 0 or now - self.last >= self.every_s:
            self._write(what, now)
        self.done += cost

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._end()

    def close(self) -> None:
        """Finish the line."""
        self.done = self.total
        self._write("done", time.monotonic())
        self._end()

    def _end(self) -> None:
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def _write(self, what: str, now: float) -> None:
        self.last = now
        share, spent = min(self.done / self.total, 1.0), now - self.start
        text = f"{share:4.0%} {spent:5.0f} s  "
        if self.live:
            bar = "#" * round(WIDTH * share)
            left = f"{spent * (1 / share - 1):.0f} s left  " if 0 < share < 1 else ""
            # A line that wraps would not be overwritten.
            line = f"[{bar:<{WIDTH}}] {text}{left}{what}"[: shutil.get_terminal_size().columns - 1]
            self.stream.write(f"\r{line}\x1b[K")
        else:
            self.stream.write(f"{text}{what}\n")
        self.stream.flush()
