"""From samples to rows, table, figures, comparison and other harnesses' forms: each against what a hand works out."""

import csv
import json
import random

import pytest

from attnlab.evals.harness import anchors, compare, formats, plots, results, table
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.statistics import Interval, paired_difference, wilson
from attnlab.evals.harness.task import Metric

MATCH = Metric("string_match_all")
LOSS = Metric("loss", percent=False, higher_is_better=False)
FRONT, BACK = (Metric(f"loss@{a}-{b}", percent=False, higher_is_better=False) for a, b in ((0, 64), (64, 256)))


def record(task, length, method, index, score, budget=1.0, *, prompt=None, facts=None, metric="string_match_all"):
    scores = score if isinstance(score, dict) else {metric: score}
    made = dict(task=task, length=length, method=method, index=index, prompt=prompt or f"{task}-{length}-{index}")
    made |= dict(question="which, then?", answers=["a", "b"], facts=facts or {}, output='a,\n"b"', scores=scores)
    return made | dict(budget=budget, tokens=length - 2, seconds=random.random())


def cells(task, length, scores, budgets=None, **more):
    """Records of several methods: `scores[method]` is a list."""
    budgets = budgets or {}
    return [
        record(task, length, method, i, x, budgets.get(method, 1.0), **more)
        for method, values in scores.items()
        for i, x in enumerate(values)
    ]


def write(folder, records, metrics, *, methods=None, config=None):
    (folder / "samples").mkdir(parents=True)
    files = {}
    for r in records:
        files.setdefault((r["task"], r["length"], r["method"]), []).append(json.dumps(r) + "\n")
    for i, lines in enumerate(files.values()):
        (folder / "samples" / f"{i}.jsonl").write_text("".join(lines))
    held = results.document(records, metrics, 7, methods)
    (folder / "results.json").write_text(json.dumps(held))
    config = {"suite": "quick", "model": "testbed", "seed": 0} | (config or {})
    (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(x)}\n" for key, x in config.items()))
    return folder


RULER = cells(
    "niah_single_1", 4096, {"full": [1.0] * 20, "moba:block=16+topk=8": [1.0] * 14 + [0.0] * 6},
    {"moba:block=16+topk=8": 0.125},
) + cells("niah_single_1", 8192, {"full": [1.0] * 18 + [0.0] * 2, "moba:block=16+topk=8": [1.0] * 10 + [0.0] * 10},
          {"moba:block=16+topk=8": 0.0625})  # fmt: skip


def test_rows_by_hand():
    records = [
        record("t", 64, "m", i, x, b) for i, (x, b) in enumerate([(1.0, 0.5), (0.0, None), (1.0, 0.25), (1.0, 0.0)])
    ]
    (row,) = results.summarise(records, {"t": (MATCH,)})
    low, high = (100 * x for x in wilson(3, 4)[1:3])
    assert row == dict(
        task="t", length=64, method="m", metric="string_match_all", mean=75.0, ci_lo=low, ci_hi=high, n=4, budget=0.25
    )
    assert list(row) == ["task", "length", "method", "metric", "mean", "ci_lo", "ci_hi", "n", "budget"]
    assert (low, high) == pytest.approx((30.0642, 95.4413), abs=1e-4)


def test_raw_metrics_stay_raw():
    both = [record("t", 64, "m", i, {"loss": x, "loss@0-64": 2 * x}, None) for i, x in enumerate([1.0, 2.0])]
    one, two = results.summarise(both, {"t": (LOSS, FRONT, BACK)})
    assert (one["metric"], one["mean"], one["ci_lo"], one["ci_hi"], one["budget"]) == ("loss", 1.5, 1.0, 2.0, None)
    assert (two["metric"], two["mean"]) == ("loss@0-64", 3.0)  # and no row of what no record has
    (alone,) = results.summarise(both[:1], {"t": (LOSS,)})
    assert (alone["mean"], alone["ci_lo"], alone["ci_hi"], alone["n"]) == (1.0, None, None, 1)


def test_order_is_the_runs_not_the_records():
    metrics = {"z": (MATCH,), "a": (MATCH,)}
    records = [r for t in metrics for n in (128, 64) for r in cells(t, n, {m: [0.25, 1.0] for m in ("b", "full", "a")})]
    mixed = random.Random(0).sample(records, len(records))
    rows = results.summarise(mixed, metrics)
    assert rows == results.summarise(records, metrics)
    assert [(r["task"], r["length"], r["method"]) for r in rows] == [
        (t, n, m) for t in ("z", "a") for n in (64, 128) for m in ("full", "a", "b")
    ]
    given = results.summarise(mixed, metrics, ["b", "a", "full"])
    assert [r["method"] for r in given[:3]] == ["b", "a", "full"]


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([record("other", 64, "m", 0, 1.0)], "metrics must name every task, got a record of 'other'"),
        ([record("t", 64, "m", 3, 1.0)] * 2, r"records must differ in index, got 3 twice \(t, length 64, m\)"),
        (
            [record("t", 64, "m", 0, 1.0), record("t", 64, "m", 1, {})],
            r"every record must have the score 'string_match_all', one has not \(t, length 64, m, index 1\)",
        ),
    ],
)
def test_bad_records_say_what_is_wrong(records, complaint):
    with pytest.raises(ValueError, match=complaint):
        results.summarise(records, {"t": (MATCH,)})


def test_a_folder_reads_back(tmp_path):
    metrics = {"niah_single_1": (MATCH,)}
    write(tmp_path / "r", random.Random(1).sample(RULER, len(RULER)), metrics)
    run = results.load(tmp_path / "r")
    assert run.metrics == metrics and run.prefills == 7 and run.config["model"] == "testbed"
    assert run.rows == results.summarise(RULER, metrics)
    assert run.lengths("niah_single_1") == [4096, 8192] and run.methods() == ["full", "moba:block=16+topk=8"]
    assert [r["index"] for r in run.samples["niah_single_1", 8192, "full"]] == list(range(20))


def spoiled(folder, how):
    made = write(folder, RULER, {"niah_single_1": (MATCH,)})
    target = made / "results.json"
    held = json.loads(target.read_text())
    if how == "unfinished":
        target.unlink()
    elif how == "no run":
        target.unlink()
        (made / "samples").rename(made / "other")
    elif how == "torn":
        target.write_text(target.read_text()[:100])
    elif how == "binary":
        target.write_bytes(b"\xff\xfe\xfd")
    elif how == "version":
        target.write_text(json.dumps(held | {"schema_version": 99}))
    elif how == "list":
        target.write_text("[]")
    elif how == "metrics":
        target.write_text(json.dumps({key: x for key, x in held.items() if key != "metrics"}))
    elif how == "sample":
        (made / "samples" / "0.jsonl").write_text("{}\n")
    elif how == "line":
        (made / "samples" / "0.jsonl").write_text('{"task": \n')
    return made


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("unfinished", "holds no results.json: the run is not finished, continue it with --resume"),
        ("no run", "holds no results.json: it is no run folder"),
        ("torn", "results.json is damaged"),
        ("binary", "results.json is damaged"),
        ("version", "results.json has schema_version 99, this attnlab reads 1"),
        ("list", "results.json has schema_version None"),
        ("metrics", "is no run folder of this attnlab: 'metrics'"),
        ("sample", "is no run folder of this attnlab: 'task'"),
        ("line", "0.jsonl is damaged"),
    ],
)
def test_a_spoiled_folder_is_one_line(tmp_path, how, complaint):
    with pytest.raises(UsageError, match=complaint) as raised:
        results.report(spoiled(tmp_path / "r", how))
    assert "\n" not in str(raised.value)


def test_no_folder(tmp_path):
    with pytest.raises(UsageError, match="nowhere is no folder: a run folder holds"):
        results.load(tmp_path / "nowhere")


def test_effective_length_by_hand():
    scores = {1024: 90.0, 2048: 77.0, 4096: 76.0}
    # RULER's bar is 85.6 whatever full attention reaches; others' is 85 % of its score at the shortest: 76.5.
    assert table.effective_length("niah_single_1", scores, {1024: 10.0}) == 1024
    assert table.effective_length("vt@noise", {1024: 85.6, 2048: 85.5}, {}) == 1024
    assert table.effective_length("testbed_single", scores, {4096: 99.0, 1024: 90.0}) == 2048
    assert table.effective_length("testbed_single", scores, {1024: 80.0}) == 4096
    assert table.effective_length("testbed_single", {1024: 20.0}, {1024: 90.0}) is None


def test_table_by_hand(tmp_path):
    write(tmp_path / "r", RULER, {"niah_single_1": (MATCH,)})
    lines = results.report(tmp_path / "r").splitlines()
    assert lines[0] == "# Accuracy: suite quick, model testbed, seed 0, 7 contexts prefilled densely"
    assert "## niah_single_1: string_match_all, % (n = 20)" in lines
    squeezed = [" ".join(line.split()) for line in lines]
    assert "| method | 4K | 8K | read, 4K | read, 8K | effective length |" in squeezed
    assert "| full | 100.0 (83.9-100.0) | 90.0 (69.9-97.2) | 100.0% | 100.0% | 8K |" in squeezed
    assert "| moba:block=16+topk=8 | 70.0 (48.1-85.5) | 50.0 (29.9-70.1) | 12.5% | 6.2% | none |" in squeezed
    assert "Effective length: the longest with a score of at least 85.6, RULER's bar." in lines
    # 6 lost of 6 discordant: 2 / 2^6; 8 of 8: 2 / 2^8.
    (against,) = [line for line in squeezed if "-30.0" in line]
    assert ", p = .031 |" in against and ", p = .008 |" in against and "-40.0 (" in against
    assert "other models" in results.report(tmp_path / "r")


def test_table_of_other_tasks(tmp_path):
    few = cells("testbed_single", 1024, {"wave": [1.0, 0.0]}) + cells("testbed_single", 2048, {"wave": [1.0, 1.0]})
    more = cells("text_loss", 1024, {"wave": [{"loss": 2.0}, {"loss": 3.0}]}, {"wave": None})
    write(tmp_path / "r", few + more, {"testbed_single": (MATCH,), "text_loss": (LOSS,)})
    text = results.report(tmp_path / "r")
    assert "at least 85% of the method's own score" in text and "RULER" not in text
    assert "minus full" not in text.split("## ", 1)[1]
    assert "## text_loss: loss, lower is better (n = 2)" in text and "2.500 (2.000-3.000)" in text


def test_methods_are_held_to_full_attentions_bar(tmp_path):
    scores = {"full": [1.0] * 10, "wave": [1.0] * 8 + [0.0] * 2}
    write(tmp_path / "r", cells("t", 64, scores) + cells("t", 128, scores), {"t": (MATCH,)})
    rows = [line.split(" | ") for line in results.report(tmp_path / "r").splitlines()]
    reached = {row[0].strip("| "): row[-1].strip("| ") for row in rows if len(row) == 6}
    assert reached == {"method": "effective length", "full": "128", "wave": "none"}
    assert "at least 85% of full's score" in results.report(tmp_path / "r")


def test_means_over_tasks(tmp_path):
    metrics = {"a": (MATCH,), "b": (MATCH,), "loss": (LOSS,)}
    records = cells("a", 64, {"full": [1.0, 1.0]}) + cells("b", 64, {"full": [0.0, 1.0]}, {"full": 0.5})
    records += cells("loss", 64, {"full": [{"loss": 9.0}]})
    write(tmp_path / "r", records, metrics)
    text = " ".join(results.report(tmp_path / "r").split())
    assert "## Mean of 2 tasks, % a, b. | method | 64 | read |" in text and "| full | 75.0 | 75.0% |" in text


def test_pairs_are_of_equal_prompts():
    ours = [record("t", 64, "m", i, x) for i, x in enumerate([1.0, 0.0, 0.0, 1.0])]
    base = [record("t", 64, "full", i, 1.0, prompt="another" if i == 2 else None) for i in range(5)]
    found, p = table.paired(ours, base, MATCH)
    assert found.n == 3 and found.mean == pytest.approx(-100 / 3) and p == 1.0
    assert found[1:3] == pytest.approx(tuple(100 * x for x in paired_difference([1, 0, 1], [1, 1, 1])[1:3]))
    assert table.paired(ours, base[2:3], MATCH) is None
    halves = [record("t", 64, "m", i, 0.5) for i in range(3)]
    assert table.paired(halves, base, MATCH)[1] is None
    assert (
        table.paired([record("t", 64, "m", 0, {"loss": 1.0})], [record("t", 64, "m", 0, {"loss": 0.0})], LOSS)[1]
        is None
    )


@pytest.mark.parametrize(
    ("found", "p", "percent", "n", "wanted"),
    [
        (Interval(-3.14, -6.2, -0.4, 50), 0.0211, True, 50, "-3.1 (-6.2 to -0.4), p = .021"),
        (Interval(0.001, -0.02, 2.0, 50), 0.0001, True, 60, "0.0 (0.0 to +2.0), p < .001, n = 50"),
        (Interval(0.25, None, None, 1), None, False, None, "+0.250"),
        (Interval(0.0, 0.0, 0.0, 9), 1.0, True, None, "0.0 (0.0 to 0.0), p = 1"),
    ],
)
def test_difference_as_text(found, p, percent, n, wanted):
    assert table.difference(found, p, percent, n) == wanted


def test_published_figures_go_with_their_suites(tmp_path):
    assert {a.suite for a in anchors.beside(["vt", "testbed_single"])} == {"ruler"}
    assert [a.figures.count(".") for a in anchors.beside(["ragqa"])] == [4] and not anchors.beside(["testbed_tracking"])
    assert len(anchors.RULER) == 13 and anchors.is_ruler("niah_multivalue@noise") and not anchors.is_ruler("needle")
    text = "".join(" ".join(anchor) for anchor in anchors.ANCHORS)
    for figure in (".7818", ".7849", "38.8", "56.0", "0.66, 1.50, 1.97, 0.73", ".722", ".822", ".860", ".869"):
        assert figure in text
    write(tmp_path / "r", RULER, {"niah_single_1": (MATCH,)})
    ending = results.report(tmp_path / "r").split("## Published figures of other models")[1]
    assert "Not measured here" in ending and ".7818" in ending and "TriviaQA" not in ending


@pytest.fixture
def pictured(tmp_path):
    """A run that every figure has data for."""
    records = list(RULER)
    for i in range(6):
        for method, score in (("full", 1.0), ("moba:block=16+topk=8", float(i % 2 == 0))):
            records.append(record("needle", 4096, method, i, score, 0.0, facts={"depth": (i % 3) / 2}))
            stretches = {"loss": 2.0 + i, "loss@0-64": 3.0 + i, "loss@64-256": 1.0 + i}
            records.append(record("text_loss", 256, method, i, stretches, None))
    metrics = {"niah_single_1": (MATCH,), "needle": (MATCH,), "text_loss": (LOSS, FRONT, BACK)}
    return write(tmp_path / "r", records, metrics)


def test_reports_are_the_same_bytes_each_time(pictured):
    paths = results.write_reports(pictured)
    names = [
        "table.md",
        *(f"plots/{n}.png" for n in ("accuracy-by-length", "accuracy-by-budget", "needle", "loss-by-position")),
    ]
    assert [str(path.relative_to(pictured)) for path in paths] == names
    assert paths[0].read_text() == results.report(pictured)
    first = [path.read_bytes() for path in paths]
    assert not any(stamp in data for data in first for stamp in (b"tIME", b"Software", b"date"))
    assert [path.read_bytes() for path in results.write_reports(pictured)] == first


def test_figures_show_the_rows(pictured):
    run = results.load(pictured)
    (by_length,) = plots.accuracy_by_length(run).axes  # needle has one length
    full, moba = (container.lines[0] for container in by_length.containers[:2])
    assert full.get_xydata().tolist() == [[4096, 100], [8192, 90]] and moba.get_ydata().tolist() == [70, 50]
    spread = by_length.containers[0].lines[2][0].get_segments()[1]
    assert spread[:, 1] == pytest.approx([100 * x for x in wilson(18, 20)[1:3]])
    by_budget = plots.accuracy_by_budget(run)
    assert [axes.get_title() for axes in by_budget.axes] == ["niah_single_1, 8K", "needle, 4K"]
    assert [c.lines[0].get_xydata().tolist() for c in by_budget.axes[0].containers[:2]] == [[[100, 90]], [[6.25, 50]]]
    assert by_budget.axes[1].containers[0].lines[0].get_xdata().tolist() == [0]  # reuse without recompute is shown
    assert [text.get_text() for text in by_budget.legends[0].get_texts()] == run.methods()
    (losses,) = plots.loss_by_position(run).axes
    assert losses.containers[0].lines[0].get_xydata().tolist() == [[32, 5.5], [160, 3.5]]


def test_needles_by_depth(pictured):
    run = results.load(pictured)
    found = plots._needles(run)
    assert {d: found["moba:block=16+topk=8", 4096, d] for d in (0.0, 0.5, 1.0)} == {0.0: 50, 0.5: 50, 1.0: 50}
    grid = plots.needle_grid(run)
    assert [axes.get_title() for axes in grid.axes[:2]] == run.methods()
    assert grid.axes[0].images[0].get_array().tolist() == [[100], [100], [100]]
    assert [t.get_text() for t in grid.axes[0].get_yticklabels()] == ["0", "50", "100"]


def test_no_figure_without_its_data(tmp_path):
    write(tmp_path / "r", cells("t", 64, {"m": [1.0]}, {"m": None}), {"t": (MATCH,)})
    assert results.write_reports(tmp_path / "r") == [tmp_path / "r" / "table.md"]


def test_compare_a_run_with_itself(tmp_path):
    one = write(tmp_path / "r", RULER, {"niah_single_1": (MATCH,)})
    text = compare.compare(one, one)
    assert text.count("0.0 (0.0 to 0.0), p = 1") == 4 and "Not compared" not in text and "| setting" not in text


def test_compare_says_what_cannot_be(tmp_path):
    metrics = {"t": (MATCH,), "u": (MATCH,), "v": (MATCH,), "w": (MATCH,)}
    a = cells("t", 64, {"full": [1.0] * 4, "wave": [1.0] * 4}) + cells("u", 64, {"full": [1.0]})
    a += cells("v", 64, {"full": [1.0]}) + cells("v", 128, {"full": [1.0]}) + cells("w", 64, {"full": [1.0]})
    b = cells("t", 64, {"full": [0.0, 1.0, 1.0], "quest": [1.0]}) + cells("v", 64, {"full": [1.0]}, prompt="another")
    b += cells("w", 64, {"full": [{"loss": 1.0}]})
    one = write(tmp_path / "a", a, metrics)
    two = write(tmp_path / "b", b, {"t": (MATCH,), "v": (MATCH,), "w": (LOSS,)}, config={"seed": 1})
    text = compare.compare(one, two)
    squeezed = " ".join(text.split())
    assert text.startswith(f"# {two} minus {one}\n")
    assert "| seed | 0 | 1 |" in squeezed
    assert "| t | 64 | full | 3 | 100.0 | 66.7 | -33.3 (-100.0 to 0.0), p = 1 |" in squeezed
    assert text.split("Not compared:\n")[1].splitlines() == [
        "- method wave: only in the first run",
        "- u: only in the first run",
        "- 128 of v: only in the first run",
        "- method quest: only in the second run",
        "- t, 64: 3 prompts in common, of 4 and 3 samples",
        "- v, 64: no prompts in common (1 and 1 samples): made with another seed, tokenizer or generator",
        "- w: scored by string_match_all in the first run, by loss in the second",
    ]


def test_compare_two_methods(tmp_path):
    one = write(tmp_path / "a", cells("t", 64, {"wave": [1.0, 0.0]}), {"t": (MATCH,)})
    two = write(tmp_path / "b", cells("t", 64, {"quest": [1.0, 1.0]}), {"t": (MATCH,)})
    assert "| wave -> quest | 2 | 50.0 | 100.0 | +50.0 (0.0 to +100.0), p = 1" in " ".join(
        compare.compare(one, two).split()
    )
    three = write(tmp_path / "c", cells("u", 64, {"quest": [1.0, 1.0]}), {"u": (MATCH,)})
    assert "Nothing in common" in compare.compare(one, three)
    with pytest.raises(UsageError, match="nowhere is no folder"):
        compare.compare(one, tmp_path / "nowhere")


def test_lm_eval_form(tmp_path):
    made = write(tmp_path / "r", RULER + cells("text", 64, {"full": [{"loss": 2.5, "loss@0-64": 1.0}]}),
                 {"niah_single_1": (MATCH,), "text": (LOSS, FRONT)})  # fmt: skip
    out = formats.write(made, "lm-eval")
    assert out == made / "lm-eval"
    full, moba = (
        json.loads((out / m / "results_attnlab.json").read_text()) for m in ("full", "moba%3Ablock=16+topk=8")
    )
    assert full["results"]["niah_single_1"] == {
        "name": "niah_single_1", "alias": "niah_single_1", "sample_len": 40, "4096,none": 1.0, "4096_stderr,none": 0.0,
        "8192,none": 0.9, "8192_stderr,none": pytest.approx((0.9 * 0.1 / 19) ** 0.5),
    }  # fmt: skip
    assert full["results"]["text"]["64,none"] == 2.5 and full["results"]["text"]["64_stderr,none"] == "N/A"
    assert full["results"]["text"]["64/loss@0-64,none"] == 1.0
    assert full["higher_is_better"] == {
        "niah_single_1": {"4096": True, "8192": True},
        "text": {"64": False, "64/loss@0-64": False},
    }
    assert list(moba["results"]) == ["niah_single_1"] and moba["results"]["niah_single_1"]["8192,none"] == 0.5
    for key in ("versions", "n-shot", "configs", "n-samples", "group_subtasks"):
        assert list(full[key]) == ["niah_single_1", "text"]
    assert full["n-samples"]["niah_single_1"] == {"original": 40, "effective": 40}
    assert full["config"]["model_args"] == {"pretrained": "testbed", "method": "full"}


def test_kvpress_form(tmp_path):
    made = write(tmp_path / "r", RULER + cells("qa", 4096, {"reuse": [1.0, 0.5, 0.0]}, {"reuse": 0.0}, metric="f1"),
                 {"niah_single_1": (MATCH,), "qa": (Metric("f1"),)}, config={"model": "some/folder"})  # fmt: skip
    out = formats.write(made, "kvpress")
    assert sorted(path.name for path in out.iterdir()) == [
        "quick__4096__folder__full__0.00",
        "quick__4096__folder__moba%3Ablock=16+topk=8__0.88",
        "quick__4096__folder__reuse__0.00",
        "quick__8192__folder__full__0.00",
        "quick__8192__folder__moba%3Ablock=16+topk=8__0.94",
    ]
    folder = out / "quick__8192__folder__moba%3Ablock=16+topk=8__0.94"
    assert json.loads((folder / "metrics.json").read_text()) == {"niah_single_1": {"string_match": 50.0}}
    assert 'press_name: "moba:block=16+topk=8"\n' in (folder / "config.yaml").read_text()
    assert "compression_ratio: 0.9375\n" in (folder / "config.yaml").read_text()
    with (folder / "predictions.csv").open(newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 20 and rows[0]["predicted_answer"] == 'a,\n"b"' and rows[0]["answer"] == "['a', 'b']"
    assert rows[0]["compression_ratio"] == "0.9375"
    reuse = json.loads((out / "quick__4096__folder__reuse__0.00" / "metrics.json").read_text())
    assert reuse == {"qa": {"f1": 50.0}}


def test_unknown_format(tmp_path):
    with pytest.raises(UsageError, match=r"unknown format 'lmeval': did you mean 'lm-eval'\?"):
        formats.write(tmp_path, "lmeval")
