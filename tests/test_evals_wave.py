"""RetroInfer's benchmarks: quality (data, losses against the reference's, claims, record), then speed and memory."""

import json
import math

import pytest
import torch

import attnlab
from attnlab import WaveConfig, WaveIndex, wave_reference
from attnlab.evals import (
    bench,
    bench_cases,
    bench_check,
    bench_wave,
    demo_model,
    measure,
    readme,
    report,
    wave_data,
    wave_quality,
)
from attnlab.evals.wave_quality import BUDGETS, METHODS, Loss
from attnlab.reference import retroinfer as reference


def test_interval_by_hand():
    # Mean 2.5, variance 5 / 3; with 3 degrees of freedom t is 3.182: half of it is 3.182 * sqrt(5 / 12) = 2.05397.
    mean, low, high, n = measure.interval([1.0, 2.0, 3.0, 4.0])
    assert (mean, n) == (2.5, 4)
    assert high - mean == pytest.approx(2.05397, abs=1e-5) and mean - low == pytest.approx(high - mean)
    assert measure.interval([1.0] * 31) == measure.Interval(1.0, 1.0, 1.0, 31)
    for samples in ([1.0], [1.0] * 32):
        with pytest.raises(ValueError, match=f"needs 2 to 31 samples, got {len(samples)}"):
            measure.interval(samples)


def test_t_quantiles():
    def cdf(t: float, dof: int, steps: int = 4000) -> float:
        scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
        at = [(1 + (t * i / steps) ** 2 / dof) ** (-(dof + 1) / 2) for i in range(steps + 1)]
        simpson = at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2])
        return 0.5 + scale * simpson * t / steps / 3

    for dof, t in enumerate(measure.T_975, 1):
        assert cdf(t, dof) == pytest.approx(0.975, abs=5e-5)


@pytest.fixture(scope="module")
def row():
    return wave_data.planted(1024, 4, 0)


def test_planted_rows_are_what_they_say(row):
    assert row.q.shape == (4, 16, 64) and row.k.shape == row.v.shape == (1024, 4, 64)
    logits = torch.einsum("ngrd,tgd->ngrt", row.q.unflatten(1, (4, 4)), row.k) / 8
    torch.testing.assert_close(logits.std(-1), torch.tensor(wave_data.SHARPNESS).expand(4, 4, 4))
    again, other = wave_data.planted(1024, 4, 0), wave_data.planted(1024, 4, 1)
    assert all(map(torch.equal, row, again)) and not torch.equal(row.k, other.k)
    top = logits.argmax(-1)
    assert (top[:2] == top[:2, :1, :1]).all()  # the first half are needles: every head finds the same token,
    assert (logits[:2, :, 3].softmax(-1).amax(-1) > 0.9).all()  # and the sharpest one little else
    # Like keys have like values: a token's value is closer to that of the token with the nearest key than to another's.
    keys, values = (torch.nn.functional.normalize(x[:, 0] - x[:, 0].mean(0), dim=-1) for x in (row.k, row.v))
    nearest = (keys @ keys.T).fill_diagonal_(-1).argmax(-1)
    assert (values * values[nearest]).sum(-1).mean() > 0.5
    assert (values * values.roll(512, 0)).sum(-1).mean() < 0.2


def test_losses_are_those_of_the_reference(row):
    config, budget = WaveConfig(), 0.02
    found = wave_quality.losses(row)
    store = WaveIndex.build(row.k[None], row.v[None], capacity=1024).store
    held = wave_reference.token_order(store, 0, 1024, 1024 - 68, config.spec)
    held = held._replace(k=held.k.double(), v=held.v.double())
    index = wave_reference.regrouped(held, int(store.clusters[0]), config.spec, False)
    options = wave_reference.options(config.spec)
    k, v = (x.double().repeat_interleave(4, 1) for x in (row.k, row.v))
    for name, method in METHODS.items():
        losses = []
        for q in row.q.double():
            mass = (torch.einsum("hd,thd->ht", q, k) / 8).softmax(-1)
            full = torch.einsum("ht,thd->hd", mass, v)
            out, _, read = reference.select_attention(
                q, row.k.double(), row.v.double(), index, options, budget=budget, **method
            )
            covered = (mass * read.repeat_interleave(4, 0)).sum(-1)
            losses.append(Loss(((out - full).norm(dim=-1) / full.norm(dim=-1)).mean(), covered.mean()))
        error, recall = (sum(x) / len(losses) for x in zip(*losses, strict=True))
        assert found[name, budget].error == pytest.approx(error.item(), rel=1e-4, abs=1e-5), name
        assert found[name, budget].recall == pytest.approx(recall.item(), rel=1e-4), name
    assert {key[1] for key in found} == set(BUDGETS)


def test_llama_rows_are_what_its_attention_sees(monkeypatch):
    pytest.importorskip("transformers")
    build, seen = demo_model.build, []

    def hooked(*args):
        model = build(*args)
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.data *= 10  # random weights attend to all alike, and would hide a wrong query
            layer.self_attn.register_forward_hook(
                lambda module, _, out: seen.append((module.o_proj.weight, out[0][0])), with_kwargs=False
            )
        return model

    monkeypatch.setattr(demo_model, "build", hooked)
    rows = wave_data.llama(256, 8, 1)
    assert len(rows) == len(seen) == 2
    for row, (weight, out) in zip(rows, seen, strict=True):
        assert row.q.shape == (8, 8, 64) and row.k.shape == row.v.shape == (256, 2, 64)
        # The query after the last key sees that key and those before it, and its own, which the row lacks.
        mine = attnlab.full_attention(row.q[:1][None], row.k[None], row.v[None])[0, 0]
        own = (mine.flatten() @ weight.T - out[256]).norm() / out[256].norm()
        assert own < 0.1
    assert not torch.equal(rows[0].k, wave_data.llama(256, 8, 0)[0].k)


def test_claims_are_met_or_missed():
    def seed(cluster: float, wave: float, everything: float) -> wave_quality.Losses:
        errors = dict.fromkeys(METHODS, 1.0) | {"cluster": cluster, "wave": wave, "wave, all estimated": everything}
        return {(name, b): Loss(errors[name], 0.5) for name in METHODS for b in BUDGETS}

    good, bad = wave_quality.claims("planted", [seed(5, 2, 2)] * 3), [seed(5, 2, 2), seed(3, 2, 1), seed(5, 2, 2.1)]
    assert [(c["figure"], c["met"]) for c in good] == [(2.5, True), (1.0, True)]
    first, second = wave_quality.claims("planted", bad)
    assert first["figure"] > 2 > first["low"] and not first["met"]  # a mean over 2 is not enough
    assert second["figure"] == pytest.approx(1.05) and not second["met"]


def test_quality_end_to_end(tmp_path, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(wave_quality, "BUDGETS", (0.02,))
    assert wave_quality.main(["--quick", "--tokens", "256", "--out", str(tmp_path / "made")]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "made" / "wave-quality-cpu.json").read_text())
    assert wave_quality.markdown(record) in text and "| full" not in text
    assert {row["data"] for row in record["rows"]} == {"planted", "llama"}
    assert {row["selector"] for row in record["rows"]} == set(METHODS)
    full = [row for row in record["rows"] if row["selector"] == "full"]
    assert all(row["error"] < 1e-5 and abs(row["recall"] - 1) < 1e-5 for row in full)
    assert len((tmp_path / "made" / "wave-quality-cpu.csv").read_text().splitlines()) == 1 + len(record["rows"])
    assert len(record["claims"]) == 4 and record["environment"]["versions"]["torch"]
    assert readme.parts(tmp_path / "made")["wave"] == wave_quality.markdown(record)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tokens", "100"], "--tokens must be at least 256, got 100"),
        (["--seeds", "1"], "--seeds must be from 2 to 31, got 1"),
        (["--out", __file__], f"--out must be a folder, {__file__} is a file"),
    ],
)
def test_bad_options_give_one_clear_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        wave_quality.parse(options)
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"wave_quality: error: {complaint}"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(wave_quality.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        wave_quality.parse([])
    assert "transformers is not installed: pip install 'attnlab[hf]'" in capsys.readouterr().err


CPU = torch.device("cpu")
SMALL = bench_cases.Shape(4, 2, 16, "float32")
CASE = bench_cases.Case("wave_decode", 512)


def test_bench_writes_retroinfers_rows(monkeypatch, tmp_path, capsys):
    targets = {"wave_decode": 0.0, "wave_build": 0.0, "wave_faiss": 1e9, "wave_growth": 1e9, "wave_memory": 0.01}
    targets |= {"wave_int8": 0.05}
    progress = []
    few = [bench_cases.Case(kind, 1024, target=goal, repeats=1) for kind, goal in targets.items()]
    monkeypatch.setattr(bench_wave, "cases", lambda device, quick: few)
    monkeypatch.setattr(bench_wave, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench.Progress, "close", lambda self: progress.append((self.done, self.total)))
    only = ",".join(bench_wave.KINDS)
    assert bench.main(["--out", str(tmp_path), "--device", "cpu", "--only", only]) == 0
    record = json.loads((tmp_path / "bench-cpu.json").read_text())
    rows = [row for row in record["rows"] if row["target"] is not None]
    met = {"wave_decode": True, "wave_build": False, "wave_faiss": False, "wave_growth": True, "wave_memory": False}
    met["wave_int8"] = True
    if bench_wave.no_faiss(CPU):
        met.pop("wave_faiss")
        assert any("faiss: skipped" in note for note in record["notes"])
    else:
        assert len({*progress[0]}) == 1  # as many steps as were foretold
    assert {row["kind"]: row["met"] for row in rows} == met
    by_kind = {kind: [row for row in record["rows"] if row["kind"] == kind] for kind in targets}
    # 60 clusters of two means of 16 floats, a radius and an offset; 1024 tokens of a key and a value.
    assert by_kind["wave_memory"][1]["figure"] == 60 * (2 * 16 + 2) / (1024 * 32)
    # In int8 a byte for each of those floats, two steps of 2 bytes, a radius and an offset; the keys are bfloat16.
    assert by_kind["wave_int8"][1]["figure"] == 60 * (2 * 16 + 12) / (1024 * 32 * 2)
    dense, ours = by_kind["wave_build"]
    assert ours["figure"] == pytest.approx(ours["p50"] / dense["p50"])
    assert [row["length"] for row in by_kind["wave_growth"]] == [128, 256, 512, 1024]
    text = (tmp_path / "bench-cpu.md").read_text()
    assert text == report.markdown(record) and text in capsys.readouterr().out
    for words in (
        "4 heads, 2 KV heads, D=16",
        "decode, 1 token",
        ">= 0: met",
        "<= 0%: missed",
        "<= 1%: missed",
        "keys and values in bfloat16",
        "<= 5%: met",
    ):
        assert words in text


def test_figures_of_equal_times(monkeypatch, tmp_path):
    def equal(contenders, repeats, **options):
        return {name: [2.0] * repeats for name in contenders}

    kinds = ["wave_decode", "wave_build"] + ["wave_faiss"] * (bench_wave.no_faiss(CPU) is None)
    few = [bench_cases.Case(kind, 512, target=1.0, repeats=2) for kind in kinds]
    monkeypatch.setattr(bench_wave, "cases", lambda device, quick: few)
    monkeypatch.setattr(bench_wave, "CPU_SHAPE", SMALL)
    monkeypatch.setattr(bench, "interleave", equal)
    bench.main(["--out", str(tmp_path), "--device", "cpu", "--only", ",".join(kinds)])
    rows = json.loads((tmp_path / "bench-cpu.json").read_text())["rows"]
    assert [row["p50"] for row in rows if row["kind"] == "wave_build"] == [32000.0, 2000.0]  # a quarter, squared
    figures = {row["kind"]: (row["figure"], row["met"]) for row in rows if row["target"]}
    wanted = {"wave_decode": (1.0, True), "wave_build": (1 / 16, True), "wave_faiss": (1.0, True)}
    assert figures == {kind: wanted[kind] for kind in kinds}


def test_faiss_solves_the_same_problem():
    pytest.importorskip("faiss")
    contenders = bench_wave.faiss_contenders(bench_cases.Case("wave_faiss", 1024), SMALL)
    k = bench_wave.make_kv(SMALL, 1024, CPU)[0][0].double()
    theirs = torch.stack([torch.from_numpy(x) for x in contenders["faiss"]()])
    assert theirs.shape == (2, 1024) and theirs.max() == 63
    for mine, other, x in zip(contenders["portable"](), theirs, (k - k.mean(0)).unbind(1), strict=True):
        objective, wanted = (reference.total(x, labels.long(), 64).norm(dim=1).sum() for labels in (mine, other))
        assert abs(objective / wanted - 1) < 0.02


def test_faiss_is_optional(monkeypatch):
    monkeypatch.setattr(bench_wave.importlib.util, "find_spec", lambda name: None)
    assert bench_wave.no_faiss(CPU) == "not installed (pip install 'attnlab[faiss-cpu]')"
    assert "CPU" in bench_wave.no_faiss(torch.device("cuda"))


def test_check_passes_what_is_right():
    bench_check.check(CASE, SMALL, CPU, "portable")


def test_check_stops_a_wrong_step(monkeypatch):
    honest = attnlab.wave_attention

    def wrong(*args, **options):
        out = honest(*args, **options)
        return out if options["backend"] == "reference" or "retrieval_ratio" in options else out * 1.001

    monkeypatch.setattr(attnlab, "wave_attention", wrong)
    with pytest.raises(bench_check.Disagreement, match=r"wave_decode T=512 \[portable\]: step: error"):
        bench_check.check(CASE, SMALL, CPU, "portable")


def test_check_stops_bad_clusters(monkeypatch):
    honest = WaveIndex.build

    def lazy(k, v, config, *, backend):
        return honest(
            k, v, config if backend == "reference" else WaveConfig(segment=512, iterations=1), backend=backend
        )

    monkeypatch.setattr(attnlab.WaveIndex, "build", lazy)
    with pytest.raises(bench_check.Disagreement, match="objective"):
        bench_check.check(CASE, SMALL, CPU, "portable")


def test_check_stops_a_wrong_full_step(monkeypatch):
    honest = attnlab.wave_attention

    def wrong(*args, **options):
        out = honest(*args, **options)
        return out * 1.001 if "retrieval_ratio" in options else out

    monkeypatch.setattr(attnlab, "wave_attention", wrong)
    with pytest.raises(bench_check.Disagreement, match="step over every cluster: error"):
        bench_check.check(CASE, SMALL, CPU, "portable")


def test_int8_takes_its_share_of_the_memory():
    meta, kv = bench_wave.memory(bench_cases.Case("wave_int8", 8192), bench_wave.CPU_SHAPE, CPU, "portable")
    assert 0.033 < meta / kv < 0.035 and kv == 8192 * 8 * 2 * 64 * 2


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cases_have_their_kinds(device):
    full, quick = (bench_wave.cases(torch.device(device), q) for q in (False, True))
    kinds = set(bench_wave.KINDS)
    assert {case.kind for case in quick} == kinds
    assert {case.kind for case in full} == kinds - ({"wave_faiss"} if device == "cuda" else set())
    assert all((case.target is None) == (device == "cuda") for case in full)
