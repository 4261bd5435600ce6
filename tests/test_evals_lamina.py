"""Lamina's part of the benchmark: what it times is right, what it reports is what it timed."""

import json

import pytest
import torch

from attnlab import lamina
from attnlab.evals import bench, bench_cases, bench_check, bench_lamina, report
from attnlab.evals.bench_cases import Case

CPU = torch.device("cpu")
SMALL = bench_cases.Shape(16, 8, 16, "float32")
DECODING = [kind for kind in bench_lamina.KINDS if kind.startswith("split")]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_lamina, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench_lamina, "BACKENDS", ("portable",))
    monkeypatch.setattr(bench_lamina, "MERGERS", ("portable",))


@pytest.mark.parametrize("kind", DECODING)
def test_contenders_compute_the_same(kind):
    found = bench_lamina.contenders(Case(kind, 300), SMALL, CPU, ["portable"])
    base, ours = found[bench_lamina.BASES[kind]](), found["portable"]()[0]
    if kind.startswith("split_decode"):
        heads = 8 if kind == "split_decode_mha" else 16
        assert ours.shape == (1, 1, heads, 16)
        torch.testing.assert_close(ours.view(base.shape), base)
    else:
        torch.testing.assert_close(ours, base[0])
    shards = {"split_head": "head", "split_sequence": "sequence"}.get(kind)
    if shards:
        plan = found["portable"].args[2]
        assert (plan.by, plan.shards, len(found["portable"].args[1])) == (shards, 8, 8)


def test_a_copy_moves_as_many_bytes_as_the_merge():
    found = bench_lamina.contenders(Case("merge_states", 2), SMALL, CPU, ["portable"])
    out, lse = found["portable"]()
    outs, lses = found["portable"].args
    assert outs.numel() * 4 == 2 * 2**20 and outs.shape[0] == lses.shape[0] == 8
    weight = lses.double().softmax(0)
    torch.testing.assert_close(out.double(), (weight[..., None] * outs.double()).sum(0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, lses.logsumexp(0))
    moved = sum(x.numel() * 4 for x in (outs, lses, out, lse))
    assert 2 * found["copy"]().numel() * 4 == pytest.approx(moved, rel=1e-4)


@pytest.mark.parametrize("kind", [*DECODING, "merge_states"])
def test_check_passes_what_is_right_and_stops_what_is_not(kind, monkeypatch):
    bench_check.check(Case(kind, 256), SMALL, CPU, "portable")
    name = {"merge_states": "merge_states"}.get(kind, "split_decode" if "decode" in kind else "split_attention")
    honest = getattr(bench_lamina, name)

    def wrong(*args, **options):
        out, lse = honest(*args, **options)
        return (out, lse) if options["backend"] == "reference" else (out, lse * 1.0001)

    monkeypatch.setattr(bench_lamina, name, wrong)
    with pytest.raises(bench_check.Disagreement, match=rf"{kind} T=256 \[portable\]: lse: error"):
        bench_check.check(Case(kind, 256), SMALL, CPU, "portable")


def test_two_processes():
    """Real ones: as many bytes a token as the formula says, and the tokens of one process."""
    pytest.importorskip("transformers")
    found = bench_lamina.two_processes(1, 3, 1)
    assert len(found["one process"]) == len(found["two processes"]) == 1
    assert found["tokens"] == 3 and found["seconds"] == found["two processes"][0] > 0
    assert found["bytes"] == found["formula"] and 0 < found["communication"] < 1


def test_a_process_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(bench_lamina, "__name__", "nowhere")
    with pytest.raises(RuntimeError, match=r"failed in a process: .*No module named nowhere"):
        bench_lamina.two_processes(1, 3, 1)


def test_record_table_and_the_cost_models_times(small, monkeypatch, tmp_path, capsys):
    def timed(contenders, repeats, **options):
        return {name: [0.2 if name in bench_lamina.BASES.values() else 0.1] * repeats for name in contenders}

    about = {"tokens": 32, "seconds": 0.5, "communication": 0.25, "bytes": 1015.0, "formula": 1000.0}
    monkeypatch.setattr(bench, "interleave", timed)
    monkeypatch.setattr(
        bench_lamina, "two_processes", lambda *a: {"one process": [0.25], "two processes": [0.5], **about}
    )
    few = [Case(kind, 256, target=2.0, repeats=2) for kind in bench_lamina.KINDS]
    monkeypatch.setattr(bench_lamina, "cases", lambda device, quick: [*few, Case("split_decode", 64, repeats=1)])
    options = ["--out", str(tmp_path), "--device", "cpu", "--only", ",".join(bench_lamina.KINDS)]
    assert bench.main(options) == 0
    path = tmp_path / "bench-cpu.json"
    record = json.loads(path.read_text())
    goals = {row["kind"]: (row["contender"], row["figure"], row["met"]) for row in record["rows"] if row["target"]}
    assert goals.pop("lamina_decode") == ("attnlab two processes", 0.5, False)
    assert goals == dict.fromkeys(goals, ("attnlab portable", 2.0, True)) and len(goals) == 5
    assert (record["lamina_shape"], record["kv_bytes"]) == (str(SMALL), 2 * 8 * 16 * 4)
    text = (tmp_path / "bench-cpu.md").read_text()
    assert text == report.markdown(record) and text in capsys.readouterr().out
    for words in (
        "256 MiB",
        "2.00x (2.00-2.00)",
        "1015, 1.015 times (2 + 2/G) e d L",
        "within 1%: missed",
        "| 64 ",
        "25%",
    ):
        assert words in text, words
    table = lamina.attention_from_benchmarks(path, lamina.load_model("LLaMA3-70B"), contender="attnlab portable")
    assert table(64) == pytest.approx(0.1 * 327680 / 1024)


def test_older_records_are_updated(small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "interleave", lambda contenders, repeats, **options: {n: [1.0] for n in contenders})
    monkeypatch.setattr(bench_lamina, "cases", lambda device, quick: [Case("merge_states", 1, repeats=1)])
    options = ["--out", str(tmp_path), "--device", "cpu", "--only", "merge_states"]
    bench.main(options)
    path = tmp_path / "bench-cpu.json"
    old = json.loads(path.read_text())
    rows = old.pop("rows")
    del old["lamina_shape"], old["kv_bytes"]
    path.write_text(json.dumps(old | {"rows": []}))
    bench.main([*options, "--update", str(path)])
    new = json.loads(path.read_text())
    assert new["rows"] == rows and new["kv_bytes"] == 1024


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_their_kinds(device):
    full, quick = (bench_lamina.cases(torch.device(device), q) for q in (False, True))
    wanted = set(bench_lamina.KINDS) - ({"lamina_decode"} if device == "cuda" else set())
    assert {case.kind for case in quick} == {case.kind for case in full} == wanted
    assert not any(case.target for case in quick)
