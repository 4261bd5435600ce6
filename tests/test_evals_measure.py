"""Timing, memory, records and tables of attnlab.evals, and the benchmark's own check."""

import io
import json
import re
import sys

import pytest
import torch

import attnlab
from attnlab.evals import (
    bench,
    bench_cases,
    bench_check,
    bench_flex,
    bench_fusion,
    bench_lamina,
    bench_wave,
    measure,
    readme,
    report,
)  # fmt: skip
from attnlab.progress import Progress

CPU = torch.device("cpu")
SMALL = bench_cases.Shape(2, 1, 16, "float32")


def test_spread_interpolates():
    assert measure.spread([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == measure.Spread(2.0, 3.5, 5.0, 6)
    assert measure.spread([7.0]) == measure.Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one sample"):
        measure.spread([])


def test_ratio_is_taken_within_rounds():
    # A machine that slows down threefold between the rounds leaves the ratio alone.
    assert measure.ratio([2.0, 6.0], [1.0, 3.0]).p50 == 2.0


def test_rounds_interleave_the_contenders():
    calls = []
    contenders = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = measure.interleave(contenders, 3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="repeats must be a positive int, got 0"):
        measure.interleave(contenders, 0)


def test_short_calls_fill_a_sample(monkeypatch):
    now = [0.0]

    def short():
        now[0] += 0.25

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.interleave({"short": short}, 2, least_s=1.0) == {"short": [0.25, 0.25]}
    assert now[0] == 0.25 * (1 + 1 + 2 * 4)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets its high-water mark")
def test_peak_memory_counts_what_was_freed_again():
    with measure.peak_memory() as first:
        torch.ones(48 << 18)
    with measure.peak_memory() as second:
        torch.ones(16 << 18)
    for peak, expected in ((first, 48), (second, 16)):
        assert expected - 1 < peak.bytes / 2**20 < expected + 8  # the kernel counts resident pages in batches
        assert peak.method == "VmHWM"


def test_a_child_returns_json_and_its_complaint():
    assert measure.in_child("statistics:mean", data=[1, 2, 3]) == 2
    with pytest.raises(RuntimeError, match=r"statistics:mean failed in a child process: .*mean requires at least one"):
        measure.in_child("statistics:mean", data=[])


def test_environment_is_json_and_names_versions():
    record = json.loads(json.dumps(measure.environment()))
    assert torch.__version__.startswith(record["versions"]["torch"])  # which may lack the local part, +cu130
    assert record["threads"] == torch.get_num_threads()
    assert {"date", "commit", "cpu", "cores", "gpu", "python", "system"} <= set(record)


def test_progress_is_plain_lines_without_a_terminal():
    stream = io.StringIO()
    progress = Progress(2, stream, every_s=0.0)
    for what in ("first", "second"):
        progress.step(what)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["0%", "50%", "100%"]
    assert "\r" not in stream.getvalue() and lines[1].endswith("second")


def test_progress_redraws_one_line_on_a_terminal():
    stream = io.StringIO()
    stream.isatty = lambda: True
    progress = Progress(2, stream)
    progress.step("first")
    progress.close()
    assert stream.getvalue().count("\r") == 2 and stream.getvalue().count("\n") == 1
    assert "left" not in stream.getvalue()  # neither before the first step is done nor at the end


def test_progress_says_how_much_time_is_left(monkeypatch):
    now, stream = [100.0], io.StringIO()
    monkeypatch.setattr("attnlab.progress.time.monotonic", lambda: now[0])
    stream.isatty = lambda: True
    progress = Progress(4, stream)
    for what in ("first", "second"):
        progress.step(what)
        now[0] += 20
    assert stream.getvalue().endswith("25%    20 s  60 s left  second\x1b[K")


def test_progress_of_steps_that_differ_goes_by_their_cost(monkeypatch):
    stream = io.StringIO()
    stream.isatty = lambda: True
    with Progress(40, stream) as progress:
        progress.step("short", 10)
        progress.step("long", 30)
    assert [line.split("]")[1].split()[0] for line in stream.getvalue().split("\r")[1:]] == ["0%", "25%", "100%"]


def test_progress_ends_its_line_where_the_work_failed():
    stream = io.StringIO()
    stream.isatty = lambda: True
    with pytest.raises(ValueError), Progress(2, stream) as progress:
        progress.step("first")
        raise ValueError
    assert stream.getvalue().endswith("first\x1b[K\n") and "100%" not in stream.getvalue()


def test_progress_fits_on_a_line_of_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    stream.isatty = lambda: True
    Progress(2, stream).step("x" * 100)
    assert (
        stream.getvalue().count("x") == 59 - len("[] ") - 24 - len("  0%     0 s  ") and "\n" not in stream.getvalue()
    )


@pytest.mark.parametrize("kind", ["forward", "training", "decode"])
def test_check_passes_what_is_right(kind):
    bench_check.check(bench_cases.Case(kind, 0, 16, 3), SMALL, CPU, "portable")


@pytest.mark.parametrize("kind", ["forward", "training", "decode"])
def test_check_stops_wrong_numbers(kind, monkeypatch):
    name = "moba_decode" if kind == "decode" else "moba_attention"
    honest = getattr(attnlab, name)

    def wrong(*args, **kwargs):
        out = honest(*args, **kwargs)
        return out if kwargs["backend"] == "reference" else out * 1.001

    monkeypatch.setattr(attnlab, name, wrong)
    with pytest.raises(bench_check.Disagreement, match=r"k=3 \[portable\]: out: error"):
        bench_check.check(bench_cases.Case(kind, 0, 16, 3), SMALL, CPU, "portable")


def test_check_stops_wrong_routing(monkeypatch):
    honest = attnlab.moba_select

    def wrong(*args, **kwargs):
        indices, scores = honest(*args, **kwargs)
        return attnlab.MoBASelection(indices, scores.roll(1, dims=1))

    monkeypatch.setattr(attnlab, "moba_select", wrong)
    with pytest.raises(bench_check.Disagreement, match="routing"):
        bench_check.check(bench_cases.Case("forward", 0, 16, 3), SMALL, CPU, "portable")


def test_bench_reports_no_speed_when_results_are_wrong(monkeypatch, tmp_path, capsys):
    def disagree(*args):
        raise bench_check.Disagreement("planted")

    monkeypatch.setattr(bench, "check", disagree)
    assert bench.main(["--quick", "--only", "forward", "--out", str(tmp_path)]) == 1
    assert "no speed is reported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bench_writes_a_record_of_every_kind(monkeypatch, tmp_path, capsys):
    few = [bench_cases.Case(kind, 256, 16, 3, target=1e9, repeats=1) for kind in bench_cases.KINDS if kind != "flex"]
    monkeypatch.setattr(bench_cases, "cases", lambda device, quick: few)
    for others in (bench_wave, bench_fusion, bench_lamina):
        monkeypatch.setattr(others, "cases", lambda device, quick: [])
    monkeypatch.setattr(bench_cases, "CPU_SHAPE", SMALL)
    assert bench.main(["--out", str(tmp_path), "--device", "cpu"]) == 0
    record = json.loads((tmp_path / "bench-cpu.json").read_text())
    assert {row["kind"] for row in record["rows"]} == {case.kind for case in few}
    goals = {row["kind"]: row["met"] for row in record["rows"] if row["target"]}
    assert goals == {"forward": False, "training": False, "decode": False, "memory": True, "growth": True}
    assert len((tmp_path / "bench-cpu.csv").read_text().splitlines()) == len(record["rows"]) + 1
    text = (tmp_path / "bench-cpu.md").read_text()
    assert text == report.markdown(record) and text in capsys.readouterr().out
    for words in ("forward + backward", "decode, 1 token", ">= 1e+09: missed", "apart from the gate", "skipped"):
        assert words in text


def test_flex_masks_hold_the_same_routing():
    case = bench_cases.Case("flex", 256, 16, 3)
    q, k, v = bench_cases.make_qkv(SMALL, case.length, CPU)
    from torch.nn.attention.flex_attention import flex_attention

    inputs = bench_cases.heads_first(q, k, v)
    ours = attnlab.moba_attention(q, k, v, **case.routing, backend="reference")
    flex = flex_attention(*inputs, block_mask=bench_flex.moba_mask(case, q, k), enable_gqa=True)
    torch.testing.assert_close(flex.transpose(1, 2), ours)
    dense = flex_attention(*inputs, block_mask=bench_flex.causal_mask(case.length, CPU), enable_gqa=True)
    torch.testing.assert_close(dense, bench_cases.sdpa(*inputs))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--only", "forward,speed"], "--only knows .* got 'speed'"),
        (["--repeats", "0"], "--repeats must be a positive int, got 0"),
        (["--out", __file__], "--out must be a folder"),
    ],
)
def test_bad_options_give_one_clear_line(options, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.parse(options)
    lines = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2
    assert lines[-1].startswith("bench: error: ")
    assert re.search(complaint, lines[-1])


def test_a_table_is_aligned_markdown():
    assert report.table(("a", "bb"), [("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |\n"


def test_readme_parts_are_replaced_between_their_markers(tmp_path):
    text = "top\n<!-- bench begin: made -->\nold\n<!-- bench end -->\nmid\n<!-- demo begin -->\n<!-- demo end -->\n"
    text += "".join(f"<!-- {name} begin -->\n<!-- {name} end -->\n" for name in ("accuracy", "testbed", "wave"))
    assert readme.render(text, tmp_path) == text.replace("old\n", "")
    with pytest.raises(ValueError, match="no markers for: accuracy, demo, testbed, wave"):
        readme.render(text.split("mid")[0], tmp_path)


def test_growth_lengths_double():
    lengths = bench_cases.growth_lengths(bench_cases.Case("growth", 131072, 512, 3))
    assert lengths == [16384, 32768, 65536, 131072]
