"""A pytest plugin: which public function, on which GPU backend, each test ran, and how the test ended.

`python -m pytest -p attnlab.evals.gpu_record --gpu-record FILE` writes one row per test.
"""

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

Pair = tuple[str, str]


class Recorder:
    """Collects `{test, outcome, used}`; `used` are the (function, backend) pairs served on CUDA during the test."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: dict[str, dict[str, Any]] = {}
        self.used: set[Pair] = set()

    def watch(self, pick: Callable[..., str]) -> Callable[..., str]:
        @functools.wraps(pick)
        def wrapper(call: Any, *args: Any, **kwargs: Any) -> str:
            backend = pick(call, *args, **kwargs)
            if not torch.compiler.is_compiling() and call.device.type == "cuda":
                self.used.add((call.fn, backend))
            return backend

        return wrapper

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.used = set()
        result = yield
        self.rows.setdefault(item.nodeid, {"outcome": "skipped"})["used"] = sorted(self.used)
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self.rows.setdefault(report.nodeid, {"outcome": "skipped"})
        if report.failed:
            row["outcome"] = "failed"
        elif report.when == "call" and row["outcome"] != "failed":
            row["outcome"] = "skipped" if report.skipped else "passed"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.rows[report.nodeid] = {"outcome": "failed", "used": []}

    def pytest_sessionfinish(self) -> None:
        rows = [{"test": test, **row} for test, row in self.rows.items()]
        self.file.write_text(json.dumps(rows))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-record", type=Path, help="where to write which test ran which kernel")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--gpu-record")
    if file is None:
        return
    import attnlab
    from attnlab import dispatch

    recorder = Recorder(file)
    original, watched = dispatch.pick, recorder.watch(dispatch.pick)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{attnlab.__name__}.") and getattr(module, "pick", None) is original:
            module.pick = watched  # type: ignore[attr-defined]
    config.pluginmanager.register(recorder)
