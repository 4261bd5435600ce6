"""How a number is measured: interleaved timing, peak memory, and the machine it was taken on.

Contenders run in one process, one call each per round, so a slow spell of the machine meets all of them alike;
speed-ups are medians of the ratios within a round.
"""

import contextlib
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
PACKAGES = ("torch", "triton", "transformers", "numpy", "cuda-core", "flash-attn")
ROOT = pathlib.Path(__file__).resolve().parent.parent


class Spread(NamedTuple):
    """Percentiles of repeated measurements, in the unit of the samples."""

    p20: float
    p50: float
    p80: float
    n: int


def spread(samples: Sequence[float]) -> Spread:
    """p20, median and p80 of `samples`, linear between neighbours. Raises ValueError without samples."""
    if not samples:
        raise ValueError("spread: needs at least one sample, got none")
    ranked = sorted(samples)

    def at(fraction: float) -> float:
        place = fraction * (len(ranked) - 1)
        low, high = ranked[math.floor(place)], ranked[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    return Spread(at(0.2), statistics.median(ranked), at(0.8), len(ranked))


# The 97.5 % point of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


class Interval(NamedTuple):
    """A mean and its 95 % interval, in the unit of the samples."""

    mean: float
    low: float
    high: float
    n: int


def interval(samples: Sequence[float]) -> Interval:
    """The mean of independent `samples` with Student's t interval. Raises ValueError unless they are 2 to 31."""
    n = len(samples)
    if not 2 <= n <= len(T_975) + 1:
        raise ValueError(f"interval: needs 2 to {len(T_975) + 1} samples, got {n}")
    mean, half = statistics.fmean(samples), T_975[n - 2] * statistics.stdev(samples) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster `other` is than `base`, round by round."""
    return spread([b / o for b, o in zip(base, other, strict=True)])


def interleave(
    contenders: Mapping[str, Call],
    repeats: int,
    *,
    device: torch.device | str = "cpu",
    least_s: float = 0.0,
    tick: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, `repeats` samples each, after one call each to warm up.

    Each round calls every contender, starting one further along than the round before. Where one call is shorter
    than `least_s`, a sample is the mean of enough calls to fill it (CPU only). On CUDA a sample is one call between
    events, after the L2 cache has been overwritten. `tick(name)` is called before every sample and warm-up.
    """
    if repeats < 1:
        raise ValueError(f"interleave: repeats must be a positive int, got {repeats}")
    device, calls = torch.device(device), {}
    for name, fn in contenders.items():
        tick(name)
        fn()
        first = _sample(fn, 1, device) if least_s else least_s
        calls[name] = max(1, math.ceil(least_s / max(first, 1e-9))) if device.type == "cpu" and least_s else 1
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for i in range(repeats):
        gc.collect()
        shift = i % max(len(names), 1)
        for name in names[shift:] + names[:shift]:
            tick(name)
            samples[name].append(_sample(contenders[name], calls[name], device))
    return samples


def _sample(fn: Call, calls: int, device: torch.device) -> float:
    if device.type == "cuda":
        return _cuda_sample(fn, device)
    start = time.perf_counter()
    for _ in range(calls):
        fn()
    return (time.perf_counter() - start) / calls


def _cuda_sample(fn: Call, device: torch.device) -> float:
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda.synchronize(device)
    # A short sleep on the GPU lets the CPU queue the whole call, so launch overhead is hidden as it is in a model.
    torch.cuda._sleep(1_000_000)
    start.record()
    fn()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e-3


class Peak:
    """The most memory a stretch of code held over what was held before it, and how that was found."""

    bytes: int | None = None
    method: str = "none"


@contextlib.contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[Peak]:
    """Fill the yielded `Peak` when the block ends.

    CUDA: the allocator's high-water mark. Linux: the kernel's high-water mark of resident memory (VmHWM), reset
    before the block and with the heap's free pages handed back first. Other systems: `ru_maxrss`, which cannot be
    reset, so only the first large block of a process is measured right.
    """
    device, peak = torch.device(device), Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes, peak.method = torch.cuda.max_memory_allocated(device) - before, "cuda allocator"
    elif _reset_high_water():
        before = _status("VmRSS")
        yield peak
        peak.bytes, peak.method = max(0, _status("VmHWM") - before), "VmHWM"
    else:
        before = _maxrss()
        yield peak
        after = _maxrss()
        if before is not None and after is not None:
            peak.bytes, peak.method = after - before, "ru_maxrss"


def _reset_high_water() -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) * 1024


def _maxrss() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_child(target: str, **kwargs: Any) -> Any:
    """`module:function(**kwargs)` in a fresh process with this one's thread count; arguments and result are JSON.

    Raises RuntimeError with the last line of the child's complaint.
    """
    import attnlab

    root = str(pathlib.Path(attnlab.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    job = json.dumps([target, kwargs, torch.get_num_threads()])
    done = subprocess.run([sys.executable, "-m", __name__, job], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{target} failed in a child process: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine, the versions and the commit behind a record. Nothing in it names the machine's owner."""
    device = torch.device(device)
    now = datetime.datetime.now(datetime.timezone.utc)
    record: dict[str, Any] = {
        "date": now.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "device": device.type,
        "gpu": None,
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
    }
    if device.type == "cuda":
        record["gpu"] = torch.cuda.get_device_name(device)
        record["driver"] = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
        record["cuda"] = torch.version.cuda
    return record


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"])
    if commit is None or not (ROOT / "pyproject.toml").exists():
        return None
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return commit + ("+changes" if changed else "")


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as f:
        for line in f:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _main() -> None:
    target, kwargs, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    module, function = target.split(":")
    print(json.dumps(getattr(importlib.import_module(module), function)(**kwargs)))


if __name__ == "__main__":
    _main()
