"""FusionRAG's part of the benchmark: what it times is right, what it reports is what it timed."""

import json

import pytest
import torch

from attnlab.evals import bench, bench_cases, bench_check, bench_fusion, report
from attnlab.evals.bench_fusion import PARTS

CPU = torch.device("cpu")
SMALL = bench_cases.Shape(4, 2, 16, "float32")
CASE = bench_cases.Case("selective", 256)
TINY = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_fusion, "MODEL", TINY)
    monkeypatch.setattr(bench_fusion, "CHUNK", 64)
    monkeypatch.setattr(bench_fusion, "QUESTION", 8)


def test_rows_are_a_share_of_the_positions():
    q, k, v, positions = bench_fusion.inputs(SMALL, 200, CPU)
    assert q.shape == (1, 30, 4, 16) and k.shape == v.shape == (1, 200, 2, 16)
    assert positions.shape == (1, 30) and (positions.diff() > 0).all() and positions.max() < 200
    assert not torch.equal(positions[0], torch.arange(30))


def test_future_of_the_shortcut():
    rows = bench_fusion.inputs(SMALL, 256, CPU)[3][0].tolist()
    seen = [range(256 - len(rows) + i + 1) for i in range(len(rows))]
    ahead = sum(j > at for at, keys in zip(rows, seen, strict=True) for j in keys)
    assert bench_fusion.future(CASE, SMALL) == pytest.approx(ahead / sum(map(len, seen)))


def test_contenders_compute_the_same():
    rows = bench_fusion.contenders(bench_cases.Case("selective_mask", 256), SMALL, CPU, ["portable"])
    every = bench_fusion.contenders(CASE, SMALL, CPU, ["portable"])
    dense, chosen = every["sdpa"]().transpose(1, 2), every["portable"]()
    positions = bench_fusion.inputs(SMALL, 256, CPU)[3][0]
    assert dense.shape[1] == 256
    for found in (rows["sdpa"]().transpose(1, 2), rows["portable"](), dense[:, positions]):
        torch.testing.assert_close(found, chosen)


def test_prompts_are_the_same_text_for_both(tiny):
    pytest.importorskip("transformers")
    with bench_fusion.prompts(256, 64, CPU, "portable") as made:
        assert list(map(len, made.chunks)) == [64] * 4 and len(made.question) == 8
        contenders, reports = made.contenders(0.25, "portable")
        contenders["portable"]()
        (first,) = reports
        assert (first.total("context"), first.total("recomputed"), first.total("computed")) == (256, 64, 0)
        kv = 2 * 256 * 2 * 2 * 8 * 4  # keys and values, tokens, layers, heads, head size, bytes
        assert dict(first.loaded_bytes) == {"disk": kv}
        assert contenders["prefill"]().shape == (256,)
        wanted = {part: pytest.approx(getattr(first, part)) for part in (*PARTS, "ttft")}
        assert bench_fusion.stages(reports) == {**wanted, "context": 256, "recomputed": 64, "loaded_bytes": kv}


def test_check_passes_what_is_right(tiny):
    pytest.importorskip("transformers")
    bench_check.check(CASE, SMALL, CPU, "portable")
    bench_check.check(bench_cases.Case("ttft_15", 256), SMALL, CPU, "portable")


def test_check_stops_wrong_rows(monkeypatch):
    honest = bench_fusion.selective_attention

    def wrong(*args, **options):
        return honest(*args, **options) * (1.001 if options["backend"] == "portable" else 1.0)

    monkeypatch.setattr(bench_fusion, "selective_attention", wrong)
    with pytest.raises(bench_check.Disagreement, match=r"selective T=256 \[portable\]: out: error"):
        bench_check.check(CASE, SMALL, CPU, "portable")


def test_check_stops_a_wrong_first_token(tiny, monkeypatch):
    pytest.importorskip("transformers")
    honest = bench_fusion.Prompts.answer
    monkeypatch.setattr(bench_fusion.Prompts, "answer", lambda made, rate, **o: honest(made, 0.5, **o))
    with pytest.raises(bench_check.Disagreement, match=r"ttft_0 T=256 \[portable\]: logits at rate 1 differ"):
        bench_check.check(bench_cases.Case("ttft_0", 256), SMALL, CPU, "portable")


def test_record_and_table(tiny, monkeypatch, tmp_path, capsys):
    pytest.importorskip("transformers")
    targets = {"selective": 0.0, "selective_mask": 1e9, "selective_memory": 1e9, "ttft_15": 0.0, "ttft_0": 1e9}
    few = [bench_cases.Case(kind, 512, target=target, repeats=2) for kind, target in targets.items()]
    monkeypatch.setattr(bench_fusion, "cases", lambda device, quick: few)
    monkeypatch.setattr(bench_fusion, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench_fusion, "BACKENDS", ("portable",))
    assert bench.main(["--out", str(tmp_path), "--device", "cpu", "--only", ",".join(targets)]) == 0
    record = json.loads((tmp_path / "bench-cpu.json").read_text())
    rows = {kind: [row for row in record["rows"] if row["kind"] == kind] for kind in targets}
    for kind, base in (
        ("selective", "sdpa"),
        ("selective_mask", "sdpa"),
        ("ttft_15", "prefill"),
        ("ttft_0", "prefill"),
    ):
        assert [row["contender"] for row in rows[kind]] == [base, "attnlab portable"], kind
        assert [row["met"] for row in rows[kind]] == [None, targets[kind] == 0.0], kind
    peaks = rows["selective_memory"]
    if peaks:  # this system tells how much memory a process held
        assert [row["contender"] for row in peaks] == ["sdpa", "attnlab portable"] and peaks[1]["met"]
        assert peaks[0]["figure"] == pytest.approx(peaks[0]["p50"] * 2**20 / (77 * 512))
    assert [(x["recomputed"], x["context"]) for x in record["stages"]] == [(77, 512), (0, 512)]
    for x in record["stages"]:
        assert sum(x[part] for part in PARTS) == pytest.approx(x["ttft"], rel=0.2) and x["loaded_bytes"] > 0
    assert record["fusion_shape"] == str(SMALL)
    text = (tmp_path / "bench-cpu.md").read_text()
    assert text == report.markdown(record) and text in capsys.readouterr().out
    assert sum("selective T=512: of what a bottom-right mask" in note for note in record["notes"]) == 1
    for words in ("FusionRAG: 4 heads, 2 KV heads, D=16", "full prefill", "boolean mask", ">= 0: met", "77 of 512"):
        assert words in text


def test_figures_of_equal_times(tiny, monkeypatch, tmp_path):
    pytest.importorskip("transformers")

    def equal(contenders, repeats, **options):
        for call in contenders.values():
            call()
            call()
        return {name: [2.0] * repeats for name in contenders}

    kinds = ("selective", "selective_mask", "ttft_0")
    few = [bench_cases.Case(kind, 256, target=1.0, repeats=2) for kind in kinds]
    monkeypatch.setattr(bench_fusion, "cases", lambda device, quick: few)
    monkeypatch.setattr(bench_fusion, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench_fusion, "BACKENDS", ("portable",))
    monkeypatch.setattr(bench, "interleave", equal)
    bench.main(["--out", str(tmp_path), "--device", "cpu", "--only", ",".join(kinds)])
    rows = json.loads((tmp_path / "bench-cpu.json").read_text())["rows"]
    found = {row["kind"]: (row["figure"], row["met"], row["p50"]) for row in rows if row["target"]}
    assert found == dict.fromkeys(kinds, (1.0, True, 2000.0))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_their_kinds(device):
    full, quick = (bench_fusion.cases(torch.device(device), q) for q in (False, True))
    assert {case.kind for case in quick} == {case.kind for case in full} == set(bench_fusion.KINDS)
    assert all((case.target is None) == (device == "cuda") for case in full)


def test_some_kinds_anew(monkeypatch, tmp_path, capsys):
    def timed(seconds):
        return lambda contenders, repeats, **options: {name: [seconds] * repeats for name in contenders}

    few = [bench_cases.Case(kind, 256, target=1.0, repeats=1) for kind in ("selective", "selective_mask")]
    monkeypatch.setattr(bench_fusion, "cases", lambda device, quick: few)
    monkeypatch.setattr(bench_fusion, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench_fusion, "BACKENDS", ("portable",))
    monkeypatch.setattr(bench, "interleave", timed(2.0))
    options = ["--out", str(tmp_path), "--device", "cpu", "--only"]
    bench.main([*options, "selective,selective_mask"])
    path = tmp_path / "bench-cpu.json"
    old = json.loads(path.read_text())
    monkeypatch.setattr(bench, "interleave", timed(3.0))
    bench.main([*options, "selective", "--update", str(path)])
    new = json.loads(path.read_text())
    assert [(row["kind"], row["p50"]) for row in new["rows"]] == [
        ("selective", 3000.0), ("selective", 3000.0), ("selective_mask", 2000.0), ("selective_mask", 2000.0)
    ]  # fmt: skip
    assert new["notes"][: len(old["notes"])] == old["notes"] and new["notes"][-1].startswith("selective: measured anew")
    assert new["environment"] == old["environment"]
    other = old | {"environment": old["environment"] | {"threads": 99}}
    with pytest.raises(ValueError, match="threads must be this run's"):
        bench.updated(other, new, ["selective"])
    with pytest.raises(ValueError, match="fusion_shape must be this run's"):
        bench.updated(old | {"fusion_shape": "another"}, new, ["selective"])
    with pytest.raises(SystemExit):
        bench.main([*options, "selective", "--update", str(tmp_path / "none.json")])
    assert "--update must be the JSON of a record" in capsys.readouterr().err
