"""Every production kernel compiles for every architecture within its limits, and the gate that says so can say no.

Each run is a process of its own: this one may be interpreting Triton.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab.kernels import configs
from attnlab.kernels.cuda import module

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton: attnlab[triton]")


def python(*arguments: str) -> subprocess.CompletedProcess:
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(paths)
    }
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.mark.skipif(bool(module.missing()), reason="needs NVRTC: attnlab[cuda]")
@pytest.mark.parametrize(
    ("archs", "dims", "dtype"), [("90", "64,96,128,256", "bf16"), ("80,100,120", "128", "bf16"), ("80", "256", "fp32")]
)
def test_production_kernels_keep_to_their_limits(archs, dims, dtype, tmp_path):
    record = tmp_path / "record.json"
    arguments = ("--arch", archs, "--head-dim", dims, "--dtype", dtype, "--quiet", "--json", str(record))
    done = python("-m", "attnlab.kernels.compile", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    built = json.loads(record.read_text())
    assert {row["arch"] for row in built} == {int(a) for a in archs.split(",")}
    names = {row["name"].partition("[")[0] for row in built}
    assert {"cuda.buffer", "cuda.gate", "cuda.layout", "cuda.states"} <= names
    assert {f"fusionrag.{name}" for name in ("selective", "rotate", "scatter", "norm", "sum")} <= names
    assert {name.partition(".")[0] for name in names} == {
        "cuda",
        "fusionrag",
        "lamina",
        "moba",
        "retroinfer",
        "states",
    }


def planted(tmp_path: Path, file: str, *faults: str) -> tuple[int, dict[str, list[str]]]:
    """The gate's exit status and what it found wrong with each kernel."""
    record = tmp_path / "record.json"
    done = python(str(HERE / "compile_gate" / "planted.py"), file, str(record), *faults)
    assert record.exists(), done.stdout + done.stderr
    return done.returncode, {row["name"]: row["problems"] for row in json.loads(record.read_text())}


def test_gate_fails_planted_faults(tmp_path):
    faults = {"shared": "shared memory", "spills": "spills", "hgmma": "no HGMMA", "syntax": "does not compile"}
    status, problems = planted(tmp_path, "planted", "none", *faults)
    assert status == 1
    assert problems.pop("none") == []
    assert problems.keys() == faults.keys()
    for name, (problem,) in problems.items():
        assert problem.startswith(faults[name])


def test_gate_passes_sound_kernels_and_lets_backward_ones_spill(tmp_path):
    assert planted(tmp_path, "planted_backward", "none", "spills") == (0, {"none": [], "spills": []})


def test_configs_pick_the_tightest_row(monkeypatch):
    table = {(90, 128, 2): {"A": 1}, (90, 256, 2): {"A": 2}, (0, 64, 4): {"A": 3}, (0, 256, 4): {"A": 4}}
    monkeypatch.setitem(configs.TABLES, "test", table)

    def pick(arch: int, head_dim: int, dtype_bytes: int) -> int:
        return configs.get("test", arch, head_dim, dtype_bytes)["A"]

    assert [pick(90, d, 2) for d in (1, 128, 129)] == [1, 1, 2]
    assert [pick(90, d, 4) for d in (64, 65)] == [3, 4]
    assert pick(120, 64, 2) == 3
    with pytest.raises(KeyError, match="no row of test for sm_90, head_dim 257"):
        pick(90, 257, 2)
    with pytest.raises(KeyError, match="no row of absent"):
        configs.get("absent", 90, 64, 2)


@pytest.mark.parametrize(
    ("family", "archs"), [(80, (80, 87)), (90, (90,)), (100, (100, 103, 110)), (120, (86, 89, 120, 121))]
)
def test_configs_know_the_family(family, archs):
    assert {configs.family(arch) for arch in archs} == {family}
