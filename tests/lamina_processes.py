"""Real processes for the distributed tests, forked from a server that imported torch once; none outlives its test."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.lamina_warm", "tests.lamina_bodies"])


class Failure(NamedTuple):
    """What a process raised."""

    kind: str
    text: str
    trace: str
    values: dict[str, Any]  # the exception's attributes


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(
    body: Callable[..., Any],
    world: int,
    *args: Any,
    lost: Collection[int] = (),
    seconds: float = 120.0,
    **options: Any,
) -> list[Any]:
    """`body(*args, **options)` in `world` processes with torch.distributed's environment; what each returned, by rank.

    A process that raised gives a Failure. One that is `lost` (it is to be killed or stopped) gives None, and is killed
    once the others are done. TimeoutError after so many seconds; no process is left in any case.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(world):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_main, args=(theirs, body, rank, world, port, args, options), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, set(range(world)) - set(lost), time.monotonic() + seconds)
    finally:
        for process in processes:
            process.kill()
            process.join(10)


def good(results: list[Any]) -> list[Any]:
    """The same results, where none is a Failure."""
    for rank, result in enumerate(results):
        if isinstance(result, Failure):
            raise AssertionError(f"rank {rank}: {result.trace}")
    return results


def _collect(pipes: list[Connection], awaited: set[int], end: float) -> list[Any]:
    found: list[Any] = [None] * len(pipes)
    while awaited:
        ready = wait([pipes[rank] for rank in awaited], max(0.0, end - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(awaited)} neither returned nor raised")
        for rank in [rank for rank in awaited if pipes[rank] in ready]:
            try:
                found[rank] = pipes[rank].recv()
            except EOFError:
                found[rank] = Failure("EOFError", "the process ended without a result", "", {})
            awaited.discard(rank)
    return found


def _main(
    pipe: Connection, body: Callable[..., Any], rank: int, world: int, port: int, args: tuple, options: dict
) -> None:
    torch.set_num_threads(1)
    names = dict(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=rank)
    os.environ.update({name: str(value) for name, value in names.items()})
    make = torch.empty
    torch.empty = lambda *a, **k: _poisoned(make(*a, **k))
    try:
        result = body(*args, **options)
    except BaseException as e:
        result = Failure(type(e).__name__, str(e), traceback.format_exc(), dict(vars(e)))
    pipe.send(result)
    pipe.close()


def _poisoned(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan")) if x.is_floating_point() else x
