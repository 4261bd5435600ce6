"""The disk tier of stored chunks: a folder that processes share, one safetensors file for each chunk.

A file is written under a scratch name, flushed and renamed, so a name always has a whole chunk behind it. Processes
meet at two kinds of `flock`: one on the folder, held for moments, under which names come and go; and one that a writer
holds on its scratch file for as long as it lives, which tells a dead writer's leftovers from work in progress.
"""

import contextlib
import fcntl
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from .. import safe_file
from .store_key import ChunkKey, ChunkKV

FORMAT = safe_file.Format("attnlab.ChunkKV", "1", "chunk")
STORED = re.compile(r"([0-9a-f]{64})\.safetensors")
SCRATCH = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{32}\.scratch")


class Stored(NamedTuple):
    """A file of the folder; they sort by last use."""

    used: int
    digest: str
    nbytes: int


class Folder:
    """Safe for threads and processes of one machine."""

    def __init__(self, path: str | os.PathLike[str], budget: int | None, verify: bool) -> None:
        safe_file.library()
        self.path, self.budget, self.verify = os.path.abspath(path), budget, verify
        os.makedirs(self.path, exist_ok=True)
        with self._locked():
            self._sweep()

    def file(self, digest: str) -> str:
        return os.path.join(self.path, f"{digest}.safetensors")

    def get(self, key: ChunkKey, place: Callable[[Tensor], Tensor]) -> ChunkKV | None:
        """The chunk, its tensors where `place` puts them; None if there is no file.

        Raises:
            ValueError: the file is not what was stored under this key.
        """
        path = self.file(key.digest)
        try:
            tensors, facts = safe_file.read("ChunkStore.get", path, FORMAT, place, verify=self.verify)
        except FileNotFoundError:
            return None
        found, own = facts["key"], key.facts
        if found != own:
            differ = {name: value for name, value in own.items() if found.get(name) != value}
            texts = [f"{name} {found.get(name)!r} instead of {value!r}" for name, value in differ.items()]
            raise ValueError(f"ChunkStore.get: {path} is another chunk's file: it has {', '.join(texts)}")
        return ChunkKV(key, tensors["k"], tensors["v"], tuple(facts["neighbours"]))

    def neighbours(self, key: ChunkKey) -> tuple[str, ...] | None:
        """Those of the chunk that `get` would find, unless its tensors are damaged."""
        try:
            found = safe_file.facts("ChunkStore.neighbours", self.file(key.digest), FORMAT)
        except (FileNotFoundError, ValueError):
            return None
        return tuple(found["neighbours"]) if found["key"] == key.facts else None

    def put(self, kv: ChunkKV) -> int | None:
        """Write a chunk in host memory; how many others went for it, or None if it is over the budget."""
        digest = kv.key.digest
        tensors, facts = {"k": kv.k, "v": kv.v}, {"key": kv.key.facts, "neighbours": kv.neighbours}
        data = safe_file.library().torch.save(tensors, safe_file.metadata(FORMAT, facts, tensors))
        if self.budget is not None and len(data) > self.budget:
            return None
        try:
            with self._scratch(digest) as (scratch, fd):
                _write(fd, data)
                with self._locked():
                    evicted = self._make_room(len(data), digest)
                    _touch(scratch)
                    os.replace(scratch, self.file(digest))
        except OSError as error:
            raise OSError(error.errno, f"ChunkStore.put: cannot store in {self.path}: {error.strerror}") from error
        return evicted

    def touch(self, digest: str) -> None:
        """Now is the last use. Order is a hint: a file that is gone, or another user's, is no error."""
        with contextlib.suppress(OSError):
            _touch(self.file(digest))

    def remove(self, digest: str) -> bool:
        try:
            os.unlink(self.file(digest))
        except FileNotFoundError:
            return False
        return True

    def clear(self) -> None:
        with self._locked():
            for stored in self.stored():
                self.remove(stored.digest)

    def holds(self, digest: str) -> bool:
        return os.path.exists(self.file(digest))

    def stored(self) -> list[Stored]:
        found = []
        with os.scandir(self.path) as entries:
            for entry in entries:
                if name := STORED.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        facts = entry.stat()
                        found.append(Stored(facts.st_mtime_ns, name[1], facts.st_size))
        return found

    def _make_room(self, nbytes: int, digest: str) -> int:
        """Evict until a file of `nbytes` fits in place of what `digest` has now; how many went."""
        if self.budget is None:
            return 0
        others = sorted(s for s in self.stored() if s.digest != digest)
        held, count = sum(s.nbytes for s in others), 0
        while held + nbytes > self.budget:
            self.remove(others[count].digest)
            held -= others[count].nbytes
            count += 1
        return count

    @contextlib.contextmanager
    def _scratch(self, digest: str) -> Iterator[tuple[str, int]]:
        """Name and descriptor of a new file; its name goes at the end unless it was renamed."""
        path = os.path.join(self.path, f"{digest}.{uuid.uuid4().hex}.scratch")
        with self._locked():  # no sweep sees it before it is locked
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            yield path, fd
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            os.close(fd)

    def _sweep(self) -> None:
        """Remove dead writers' scratch files."""
        for name in filter(SCRATCH.fullmatch, os.listdir(self.path)):
            path = os.path.join(self.path, name)
            with contextlib.suppress(FileNotFoundError, BlockingIOError), open(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(path)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(os.path.join(self.path, ".lock"), os.O_CREAT | os.O_RDWR, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # closing is not enough where a fork has a copy of the descriptor
            os.close(fd)


def _write(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
    os.fsync(fd)


def _touch(path: str) -> None:
    now = time.time_ns()  # the kernel's own stamps are milliseconds apart
    os.utime(path, ns=(now, now))
