"""The runner: what is shared, what a prompt depends on, and that an interrupted run ends as one that was not."""

import itertools
import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from attnlab.evals.harness import plots, prompts, runner
from attnlab.evals.harness.errors import RunError, UsageError
from attnlab.evals.harness.folder import RunFolder
from attnlab.evals.harness.method import Batch
from attnlab.evals.harness.runner import Plan
from attnlab.evals.harness.task import Outcome
from tests.evals_fakes import Guess, Items, Recall, dense, subject


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    monkeypatch.setattr(Batch, "dense", dense)
    monkeypatch.setattr(plots, "write", lambda run, folder: [])


def plan(**changes):
    tasks, methods = [Recall(), Items("items")], [Guess("full"), Guess("moba:block=16", dense=False), Guess("wave")]
    settings = dict(subject=subject(), tasks=tasks, lengths=[16, 32], methods=methods, samples=5, seed=0, batch=2)
    return Plan(**{**settings, **changes})


def go(path, resume=False, skip=False, **changes):
    """Run a plan in a folder; what it took."""
    checked = plan(**changes).checked(skip=skip)
    with RunFolder(path, runner.config(checked, "quick", None), resume=resume) as folder:
        spent = runner.run(checked, folder)
        runner.finish(checked, folder, spent)
    return spent


def files(path):
    """What a resumed run must have the same, byte for byte: all but times."""
    found = {name: (path / name).read_bytes() for name in ("config.yaml", "results.json", "table.md")}
    for file in sorted((path / "samples").iterdir()):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[file.name] = [json.dumps({k: v for k, v in line.items() if k != "seconds"}) for line in lines]
    return found


def records(path):
    return [json.loads(line) for file in sorted((path / "samples").iterdir()) for line in file.open()]


def hashes(path):
    return {(r["task"], r["length"], r["index"]): r["prompt"] for r in records(path)}


def test_a_run_from_beginning_to_end(tmp_path, capsys):
    spent = go(tmp_path)
    kept = records(tmp_path)
    assert len(kept) == spent.samples == 2 * 2 * 5 * 3
    first = next(r for r in kept if r["task"] == "recall" and r["method"] == "wave" and r["index"] == 3)
    assert first["tokens"] == first["length"] - 4 + 1 + 2 and first["facts"] == {"depth": 0.03}
    assert first["question"] == "w2 w3" and first["budget"] == 0.5 and first["output"].startswith("w")
    assert first["scores"]["hit"] == float(first["output"] == first["answers"][0])
    rows = json.loads((tmp_path / "results.json").read_text())["results"]
    for row in rows:
        same = [r for r in kept if all(r[key] == row[key] for key in ("task", "length", "method"))]
        unit = 100 if row["metric"] == "hit" else 1
        assert row["n"] == 5
        assert row["mean"] == pytest.approx(unit * np.mean([r["scores"][row["metric"]] for r in same]))
    assert {(r["task"], r["length"], r["method"]) for r in rows} == {
        (r["task"], r["length"], r["method"]) for r in kept
    }
    env = json.loads((tmp_path / "env.json").read_text())
    assert env["wall_s"] >= 0 and env["model_s"] == pytest.approx(spent.model_s) and env["batch"] == 2
    err = capsys.readouterr().err
    assert err.splitlines()[0].endswith("recall, 16 tokens, full, samples from 0") and "100%" in err.splitlines()[-1]


def test_model_time_is_answers_and_shared_prefills(tmp_path):
    spent = go(tmp_path, tasks=[Recall()], lengths=[16])
    assert spent.model_s == pytest.approx(sum(r["seconds"] for r in records(tmp_path)) + 3 * 1e-3)


def test_prompts_are_built_once_and_prefilled_once(tmp_path, monkeypatch):
    task, told = Recall(), []
    ids = type(subject()).ids
    monkeypatch.setattr(type(subject()), "ids", lambda self, text: told.append(text) or ids(self, text))
    spent = go(tmp_path, tasks=[task])
    everything = list(itertools.product((16, 32), range(5)))
    assert task.built == [(16, 0), *everything]  # one before anything runs, for the methods to look at
    assert len(told) == 2 * len(task.built)
    assert spent.prefills == 10 == json.loads((tmp_path / "results.json").read_text())["prefills"]
    assert {r["method"]: r["prefills"] for r in records(tmp_path)} == {"full": 1, "moba:block=16": 0, "wave": 0}


def test_prefills_that_are_not_shared_are_counted(tmp_path, monkeypatch):
    def unshared(batch):
        batch._dense = None
        return dense(batch)

    monkeypatch.setattr(Batch, "dense", unshared)
    assert go(tmp_path, tasks=[Recall()]).prefills == 20
    assert json.loads((tmp_path / "results.json").read_text())["prefills"] == 20


def test_prefills_that_are_not_shared_show_after_a_resume_too(tmp_path, monkeypatch):
    def unshared(batch):
        batch._dense = None
        return dense(batch)

    monkeypatch.setattr(Batch, "dense", unshared)
    methods = [Guess("full"), Guess("wave"), Guess("quest")]
    methods[1].stop_at = 0
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, tasks=[Recall()], lengths=[16], samples=2, methods=methods)
    methods[1].stop_at = None
    go(tmp_path, tasks=[Recall()], lengths=[16], samples=2, methods=methods, resume=True)
    counts = {(r["method"], r["index"]): r["prefills"] for r in records(tmp_path)}
    assert counts == {(m, i): n for m, n in (("full", 1), ("wave", 0), ("quest", 1)) for i in range(2)}


def test_prompts_depend_on_seed_task_length_and_index_alone(tmp_path):
    go(tmp_path / "a")
    go(tmp_path / "b", batch=3, methods=[Guess("wave")], tasks=[Items("items"), Recall()], lengths=[32, 16], samples=4)
    go(tmp_path / "c", seed=1)
    a, b, c = (hashes(tmp_path / name) for name in "abc")
    assert len(set(a.values())) == len(a) == 20 and len(b) == 16
    assert all(a[key] == b[key] for key in b)
    assert not set(a.values()) & set(c.values()) and a.keys() == c.keys()


def test_hash_of_a_prompt_tells_context_from_question():
    batch = Batch(subject(), [None, None], 0, context_ids=[[1, 2], [1]], question_ids=[[3], [2, 3]])
    assert len(set(prompts.hashes(batch))) == 2


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
        (["ab", "c"], ["a", "bc"]),
        ([["a"], []], [["a", []]]),
        (1, True),
        (1, "1"),
        (None, "None"),
        (Items.metrics[0], Recall.metrics[0]),
    ],
)
def test_hash_of_an_item_tells_its_parts(a, b):
    a1, b1, a2 = (prompts.hashes(Batch(subject(), [x], 0))[0] for x in (a, b, a))
    assert a1 == a2 != b1


def test_hash_of_an_item_refuses_what_it_cannot_read():
    with pytest.raises(TypeError, match="plain values, got object"):
        prompts.hashes(Batch(subject(), [object()], 0))


def interrupted(path, calls, **changes):
    """A run that ends in the middle of the last method after so many batches of it; whether it did."""
    methods = plan().methods
    methods[-1].stop_at = calls
    try:
        go(path, methods=methods, **changes)
    except KeyboardInterrupt:
        return True
    return False


def test_wherever_it_was_interrupted_a_run_ends_the_same(tmp_path):
    go(tmp_path / "whole")
    expected, left = files(tmp_path / "whole"), []
    for calls in itertools.count():
        path = tmp_path / str(calls)
        if not interrupted(path, calls):
            break
        left.append(len(records(path)))
        spent = go(path, resume=True)
        assert files(path) == expected
        assert spent.samples == 60 - left[-1]
    assert left == sorted(set(left)) and len(left) == 6  # the batches of prompts, of which each method has as many


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_torn_files_are_mended(tmp_path, batch):
    go(tmp_path / "whole")
    expected, rng = files(tmp_path / "whole"), np.random.default_rng(batch)
    path = tmp_path / "torn"
    go(path)
    for file in sorted((path / "samples").iterdir()):
        data = file.read_bytes()
        file.write_bytes(data[: rng.integers(len(data) + 1)])
    (path / "results.json").unlink()
    go(path, resume=True, batch=batch)
    assert files(path) == expected


def test_a_finished_run_does_nothing_on_resume(tmp_path):
    go(tmp_path)
    expected, env = files(tmp_path), (tmp_path / "env.json").read_bytes()
    task = Recall()
    assert go(tmp_path, resume=True, tasks=[task, Items("items")]).samples == 0
    assert task.built == [(16, 0)]
    assert files(tmp_path) == expected and (tmp_path / "env.json").read_bytes() == env


def test_methods_are_added_as_if_they_had_been_there(tmp_path):
    go(tmp_path / "both")
    go(tmp_path / "one", methods=plan().methods[:1])
    go(tmp_path / "one", methods=plan().methods[::-1], resume=True)
    added = files(tmp_path / "one")
    order = b'methods: {"full": {"dense": true}, "wave": {"dense": true}, "moba:block=16": {"dense": false}}'
    assert order in added.pop("config.yaml")
    expected = files(tmp_path / "both")
    expected.pop("config.yaml")
    for name in ("results.json", "table.md"):  # in another order of methods
        assert sorted(added.pop(name).split()) == sorted(expected.pop(name).split())
    assert added == expected


def test_a_resumed_run_of_other_prompts_is_refused(tmp_path):
    interrupted(tmp_path, 2)
    with pytest.raises(UsageError, match=r"recall-16-full.*sample 0 had another prompt"):
        go(tmp_path, resume=True, tasks=[Recall(salt=1), Items("items")])


@pytest.mark.parametrize(("name", "value"), [("hit", float("nan")), ("size", float("inf")), ("budget", float("nan"))])
def test_a_number_that_is_none_stops_the_run_and_keeps_the_rest(tmp_path, monkeypatch, name, value):
    run = Recall.run

    def broken(self, batch, method):
        found = run(self, batch, method)
        if method.calls == 2:
            scores, budget = ({**found[1].scores, name: value}, 0.5) if name != "budget" else (found[1].scores, value)
            found[1] = Outcome(scores, "", budget, 0.0)
        return found

    monkeypatch.setattr(Recall, "run", broken)
    with pytest.raises(
        RunError, match=f"recall, length 16, full, sample 3: {name} must be a finite number, got {value}"
    ):
        go(tmp_path)
    assert len(records(tmp_path)) == 6 and not (tmp_path / "results.json").exists()


def test_out_of_memory_is_one_line(tmp_path, monkeypatch):
    def full(self, batch, method):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Items, "run", full)
    with pytest.raises(RunError, match="items, 16 tokens, full: out of memory with 2 samples at a time; --resume with"):
        go(tmp_path)
    assert len(records(tmp_path)) == 30


def test_a_task_has_as_many_samples_as_its_data(tmp_path):
    go(tmp_path, tasks=[Recall(samples=3), Items("items")])
    kept = records(tmp_path)
    assert sum(r["task"] == "recall" for r in kept) == 3 * 2 * 3 and sum(r["task"] == "items" for r in kept) == 30


def test_long_prompts_come_in_smaller_batches():
    sizes = {n: len(plan(batch=None, samples=100).batches(Recall(), n)[0]) for n in (128, 8192, 16384, 65536, 131072)}
    assert sizes == {128: 8, 8192: 8, 16384: 4, 65536: 1, 131072: 1}
    assert [len(b) for b in plan(samples=5).batches(Recall(), 16)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"tasks": []}, "tasks must be some that differ, got none"),
        ({"tasks": [Recall(), Recall()]}, "tasks must be some that differ, got recall, recall"),
        ({"lengths": []}, "lengths must be some that differ, got none"),
        ({"lengths": [16, 16]}, "lengths must be some that differ, got 16, 16"),
        ({"lengths": [16, 65]}, "recall: length 65: fake takes 1 to 64 tokens"),
        ({"lengths": [0]}, "recall: length 0: fake takes 1 to 64 tokens"),
        ({"methods": []}, "methods must be some that differ, got none"),
        ({"methods": [Guess("full"), Guess("full")]}, "methods must be some that differ, got full, full"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"tasks": [Recall(samples=0)]}, "recall: its data has no sample"),
        ({"methods": [Guess("full"), Guess("x", refuses="model")]}, "method 'x' cannot serve this model"),
        ({"methods": [Guess("full"), Guess("x", refuses="items")]}, "method 'x' cannot serve items"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(tmp_path, changes, complaint):
    methods = changes.get("methods", plan().methods)
    with pytest.raises(UsageError, match=complaint):
        go(tmp_path / "x", **{"methods": methods, **changes})
    assert not (tmp_path / "x").exists() and all(method.calls == 0 for method in methods)


def test_a_prompt_longer_than_the_model_is_refused(tmp_path):
    task = Recall()
    task.build, build = lambda subject, length, *rest: build(subject, 64, *rest), task.build
    with pytest.raises(UsageError, match="recall, length 16, sample 0 has 64 tokens with its answer: fake takes 63"):
        go(tmp_path, tasks=[task], subject=subject(max_length=63))
    go(tmp_path, tasks=[task], subject=subject(max_length=64), lengths=[16])


def test_methods_that_cannot_serve_are_left_out_where_that_was_asked(tmp_path):
    methods = [Guess("full"), Guess("reuse", refuses="items"), Guess("wave", refuses="model")]
    go(tmp_path, skip=True, methods=methods)
    assert {(r["task"], r["method"]) for r in records(tmp_path)} == {
        ("recall", "full"), ("items", "full"), ("recall", "reuse")
    }  # fmt: skip
    spent = go(tmp_path, skip=True, resume=True, methods=[*methods, Guess("more", refuses="recall")])
    assert spent.samples == 10
    with pytest.raises(UsageError, match="cannot serve this model"):
        go(tmp_path / "x", skip=True, methods=methods[2:])


def test_a_task_may_refuse_a_method(tmp_path, monkeypatch):
    def check_method(self, subject, method):
        if method.spec == "wave":
            raise UsageError(f"{self.name} cannot measure {method.spec}")

    monkeypatch.setattr(Items, "check_method", check_method)
    with pytest.raises(UsageError, match="items cannot measure wave"):
        go(tmp_path / "x")
    assert go(tmp_path / "x", skip=True).samples == 50
