"""Settings every test shares: interpreted Triton without a GPU, poisoned `torch.empty`, threads, hypothesis.

Importing this file must happen before `triton` is: the interpreter is chosen when `@triton.jit` runs.
"""

import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

HAS_CUDA = torch.cuda.is_available()

if not HAS_CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))

settings.register_profile(
    "attnlab",
    derandomize=True,
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("attnlab")

# Large and positive: -1 means "no block" all over the library, so a negative sentinel could pass for an answer.
INT_POISON = {torch.uint8: 0x5A, torch.int8: 0x5A, torch.int16: 0x5A5A}


def poison(x: torch.Tensor) -> torch.Tensor:
    """Fill `x` with NaN, or with a number no index can be, in place."""
    with torch.no_grad():
        if x.dtype.is_floating_point or x.dtype.is_complex:
            return x.fill_(float("nan"))
        return x.fill_(True if x.dtype == torch.bool else INT_POISON.get(x.dtype, 0x5A5A5A5A))


def _poisoned(make: Callable) -> Callable:
    @functools.wraps(make)
    def wrapper(*args, **kwargs):
        if torch.compiler.is_compiling():
            return make(*args, **kwargs)
        x = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return poison(x) if caller.startswith("attnlab.") and kwargs.get("out") is None else x

    return wrapper


@pytest.fixture(autouse=True)
def poisoned_empty(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory this library asks for holds NaN, so an output nobody wrote fails its comparison.

    Only calls made by `attnlab.*` code are filled: PyTorch's own (autograd, gradcheck, opcheck, inductor) get what they
    asked for, and code under `torch.compile` is traced as if nothing were patched. PyTorch's switch for this,
    `fill_uninitialized_memory`, works only with deterministic algorithms on, which would hide the order-dependent
    sums that the bitwise-rerun tests are there to find. Mark a test `unpoisoned` to opt out (say, to count launches).
    """
    if request.node.get_closest_marker("unpoisoned") is None:
        for name in ("empty", "empty_like", "empty_strided"):
            monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
        monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        monkeypatch.setattr(torch.Tensor, "new_empty_strided", _poisoned(torch.Tensor.new_empty_strided))
    yield


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU when there is one, else the CPU (Triton then interprets)."""
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For models so small that more threads cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def narrow_builds(tmp_path_factory: pytest.TempPathFactory):
    return tmp_path_factory.mktemp("narrow")


@pytest.fixture(params=["x86-64", "x86-64-v3"])
def narrower(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, narrow_builds) -> Iterator[None]:
    """C kernels for targets with narrower vectors, each built once for all tests."""
    from attnlab.kernels.cpu import module

    if shutil.which("cc") is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("no C compiler, or this processor does not run the target")
    monkeypatch.setenv("XDG_CACHE_HOME", str(narrow_builds))
    monkeypatch.setattr(module, "NATIVE", (f"-march={request.param}",))
    module._library.cache_clear()
    yield
    module._library.cache_clear()


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory):
    """Builds and runs the CUDA C++ kernels on the CPU, each once for all tests."""
    from tests.cuda_emulation.emulate import Emulator

    return Emulator(tmp_path_factory.mktemp("emulation"))


@pytest.fixture
def emulated(machine, monkeypatch: pytest.MonkeyPatch):
    """Launches of CUDA C++ kernels go to the `machine`."""
    from attnlab.kernels.cuda import module

    monkeypatch.setattr(module, "launch", machine.launch)
    monkeypatch.setattr(module, "arch", lambda device: 90)
    machine.falling = False
    return machine


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "unpoisoned: leave torch.empty as it is")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped without one")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
