"""`make gpu` where there is no GPU, and what it concludes from the tests where there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import attnlab.testing
from attnlab.evals import gpu

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {"triton": {"memcheck": "clean", "racecheck": "clean"}}


def row(test: str, outcome: str, *used: tuple[str, str]) -> dict:
    return {"test": test, "outcome": outcome, "used": [list(pair) for pair in used]}


def verified(rows: list[dict], sanitizers: dict) -> set[tuple[str, str]]:
    return {(v["kernel"], v["backend"]) for v in gpu.verdicts(rows, sanitizers) if v["verified"]}


def test_a_pair_is_verified_by_its_tests_alone() -> None:
    a, b = ("moba_attention", "triton"), ("full_attention", "triton")
    rows = [row("t::1", "passed", a, ("moba_attention", "portable")), row("t::2", "passed", b), row("t::3", "skipped")]
    assert verified(rows, CLEAN) == {a, b}
    assert verified([*rows, row("t::4", "failed", b)], CLEAN) == {a}
    assert verified([*rows, row("t::gate[triton]", "failed")], CLEAN) == set()
    assert verified([*rows, row("t::gate[cuda]", "failed")], CLEAN) == {a, b}
    assert verified(rows, {"triton": {"memcheck": "errors"}}) == set()
    assert verified(rows, {"triton": {"memcheck": "compute-sanitizer not found"}}) == {a, b}
    assert verified([row("t::1", "skipped", a)], CLEAN) == set()


def test_saving_replaces_this_gpus_rows(tmp_path: Path) -> None:
    file = tmp_path / "verified.json"
    old = [{"kernel": "x", "backend": "triton", "gpu": gpu_name} for gpu_name in ("A", "B")]
    file.write_text(json.dumps({"schema_version": 1, "verified": old}))
    kernels = [
        {"kernel": "y", "backend": "cuda", "verified": True},
        {"kernel": "x", "backend": "cuda", "verified": False},
    ]
    record = {"gpu": "A", "driver": "1", "commit": "c", "date": "d", "versions": {}, "kernels": kernels}
    gpu.save_verified(record, file)
    data = json.loads(file.read_text())
    assert data["schema_version"] == 1
    assert [(r["gpu"], r["kernel"], r["backend"]) for r in data["verified"]] == [
        ("A", "y", "cuda"),
        ("B", "x", "triton"),
    ]


def test_the_plugin_records_outcomes(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_good(): pass\ndef test_bad(): assert 0\n")
    file = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "attnlab.evals.gpu_record", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(tmp_path), "--gpu-record", str(file), str(tmp_path / "test_it.py")]
    subprocess.run(command, cwd=ROOT, capture_output=True)
    assert [r["outcome"] for r in json.loads(file.read_text())] == ["passed", "failed"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_so_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_sanitizers_see_an_update_and_caches_that_make_room(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device.type == "cuda":
        pytest.importorskip("cuda.core")
    seen = {}

    class Watched(attnlab.WaveBuffer):
        def close(self) -> None:
            seen[self.policy] = self.stats()
            super().close()

    monkeypatch.setattr(attnlab, "WaveBuffer", Watched)
    x = attnlab.testing.gaussian(2, 1, 333, 4, 2, 80, dtype=torch.float16, device=device)
    growth, real = [], attnlab.WaveIndex.append
    monkeypatch.setattr(
        attnlab.WaveIndex, "append", lambda i, *kv: (growth.append(i.indexed), real(i, *kv), growth.append(i.indexed))
    )
    gpu._exercise_wave(x.k, x.v, x.q)
    assert all(old < new for old, new in zip(*growth, strict=True))
    assert all(min(s.hits, s.misses, s.evictions) > 0 for s in seen.values()) and list(seen) == ["clock", "lru"]


def test_sanitizers_see_every_kernel_of_fusionrag(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched, and in which modes; `make gpu` runs it."""
    pytest.importorskip("triton")
    from attnlab.kernels.fusionrag import importance, rotate, scatter, selective

    seen: dict[str, list[dict]] = {}

    def stand_in(name: str) -> object:
        launch = lambda *_, **constants: seen.setdefault(name, []).append(constants)
        return type("Kernel", (), {"__getitem__": lambda self, grid: launch})()

    for module in (importance, rotate, scatter, selective):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, stand_in(name))
    merges, real = [], selective.merge
    monkeypatch.setattr(selective, "merge", lambda *x: (merges.append(1), real(*x))[1])
    x = attnlab.testing.gaussian(2, 333, 333, 4, 2, 80, dtype=torch.float16, device=device)
    gpu._exercise_fusion(x.k, x.v, x.q)
    assert seen.keys() == {"selective_kernel", "rotate_kernel", "scatter_kernel", "norm_kernel", "sum_kernel"}
    modes = {(c["LAYOUT"], c["ROTARY"] > 0, c["SORTED"]) for c in seen["selective_kernel"]}
    assert modes == {("rows", True, True), *((x, False, many) for x in ("rows", "pages", "slots") for many in (0, 1))}
    assert merges and {c["INTERLEAVED"] for c in seen["rotate_kernel"]} == {False, True}
    assert {c["PER_CHUNK"] for c in seen["sum_kernel"]} == {False, True}
