"""`attnlab-eval`: what it prints, one line for everything typed wrong, and a run killed with -9."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attnlab.evals import cli, methods, tasks
from attnlab.evals.harness import plots, runner
from attnlab.evals.harness.errors import RunError, UsageError
from attnlab.evals.harness.formats import FORMATS
from attnlab.evals.harness.method import Batch
from attnlab.evals.harness.suites import SUITES
from attnlab.evals.methods import subject as models
from attnlab.evals.testbed import train
from tests import evals_fakes

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def fakes(monkeypatch):
    """Nothing is loaded; tasks and methods answer at once."""
    asked = {}

    def parse(text):
        return [evals_fakes.Guess(name, refuses="items" if name == "reuse" else "") for name in text.split(",")]

    def load(*how):
        asked["load"] = how
        return evals_fakes.subject(max_length=1 << 20)

    def make(name, data_dir):
        asked["data_dir"] = data_dir
        return evals_fakes.Items(name) if name == "items" else evals_fakes.Recall(name)

    monkeypatch.setattr(methods, "parse", parse)
    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(tasks, "make", make)
    monkeypatch.setattr(Batch, "dense", evals_fakes.dense)
    monkeypatch.setattr(plots, "write", lambda run, folder: [])
    return asked


SMALL = ["run", "--tasks", "recall", "--lengths", "16", "--samples", "4"]


def complaint(capsys, *argv, status=2):
    """The one line on stderr."""
    assert cli.main([str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    [line] = err.splitlines()
    assert line.startswith("attnlab-eval: ") and out == ""
    return line.removeprefix("attnlab-eval: ")


def test_run_report_and_compare(fakes, tmp_path, capsys):
    asks = [*SMALL, "--methods", "full,wave", "--model", "there", "--device", "cpu", "--dtype", "float16"]
    assert cli.main([*asks, "--data-dir", "data", "--out", str(tmp_path / "a")]) == 0
    out, err = capsys.readouterr()
    table = (tmp_path / "a" / "table.md").read_text()
    assert table in out and "8 samples in " in out and "4 prefills of contexts" in out and "\r" not in err
    assert fakes == {"load": ("there", "cpu", "float16"), "data_dir": pathlib.Path("data")}
    assert cli.main(["report", str(tmp_path / "a")]) == 0
    assert capsys.readouterr().out.strip() == table.strip()
    for name in FORMATS:
        assert cli.main(["report", str(tmp_path / "a"), "--format", name]) == 0
        assert capsys.readouterr().out == f"{tmp_path / 'a' / name}\n"
    assert "unknown format 'lmeval': did you mean 'lm-eval'" in complaint(
        capsys, "report", tmp_path / "a", "--format", "lmeval"
    )
    assert cli.main([*asks, "--resume", "--data-dir", "data", "--out", str(tmp_path / "a")]) == 0
    assert "0 samples in " in capsys.readouterr().out
    assert cli.main([*asks, "--seed", "1", "--batch", "3", "--out", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "env.json").read_text())["batch"] == 3
    assert "seed: 1\n" in (tmp_path / "b" / "config.yaml").read_text()


def test_compare_and_training_get_their_arguments(monkeypatch, capsys):
    from attnlab.evals.harness import compare

    seen = []
    monkeypatch.setattr(compare, "compare", lambda a, b: f"{a} against {b}")
    assert cli.main(["compare", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out == "runs/a against runs/b\n"
    monkeypatch.setattr(train, "main", lambda *args, **options: seen.append((args, options)))
    assert cli.main(["train-testbed", "--preset", "h200", "--out", "x", "--resume", "--seed", "3"]) == 0
    assert seen == [(("h200", pathlib.Path("x")), dict(seed=3, resume=True, device="auto"))]


def test_a_suite_is_what_runs_by_default(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(SUITES, "text", SUITES["text"]._replace(tasks=("items", "recall"), samples=2, lengths=(16,)))
    monkeypatch.setitem(SUITES, "text", SUITES["text"]._replace(methods="full,reuse"))
    assert cli.main(["run", "--suite", "text"]) == 0
    assert "left out of items: method 'reuse' cannot serve items" in capsys.readouterr().err
    kept = {p.name.rsplit("-", 1)[0]: len(p.read_text().splitlines()) for p in tmp_path.glob("runs/text/samples/*")}
    assert kept == {"items-16-full": 2, "recall-16-full": 2, "recall-16-reuse": 2}
    assert "cannot serve items" in complaint(capsys, "run", "--suite", "text", "--methods", "full,reuse", "--out", "x")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "arguments are required"),
        (["rn"], "invalid choice: 'rn'"),
        (["run", "--suit-e", "x"], "unrecognized arguments"),
        (["run", "--suite", "quik"], "unknown suite 'quik': did you mean 'quick'?"),
        (["run", "--tasks", "testbed_singel"], "unknown task 'testbed_singel': did you mean 'testbed_single'"),
        (["run", "--methods", "mobaa"], "unknown method 'mobaa': did you mean 'moba'"),
        (["run", "--methods", "moba:blok=3"], "unknown option of method 'moba' 'blok': did you mean 'block'"),
        (["run", "--methods", "moba:block=x"], "option 'block' must be a whole number, got 'x'"),
        (["run", "--lengths", "1024,many"], "argument --lengths: must be whole numbers separated by commas"),
        (["run", "--samples", "few"], "argument --samples: invalid int value: 'few'"),
        (["run", "--methods", "full", "--model", "/no/such"], "model '/no/such' must be a folder"),
        (["run", "--out", __file__], "--out must be a folder"),
        (["report", "/no/such"], "/no/such"),
        (["train-testbed", "--out", "x", "--preset", "tpu"], "unknown preset 'tpu': did you mean 'cpu'?"),
        (["train-testbed"], "the following arguments are required: --out"),
    ],
)
def test_what_is_typed_wrong_is_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in complaint(capsys, *argv)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_cannot_be_are_one_line(fakes, capsys, tmp_path):
    out = ["--methods", "full", "--out", tmp_path / "x"]
    assert complaint(capsys, *SMALL, *out, "--samples", 0) == "samples must be at least 1, got 0"
    assert complaint(capsys, *SMALL, *out, "--batch", 0) == "batch must be at least 1, got 0"
    assert "takes 1 to 1048576 tokens" in complaint(capsys, *SMALL, *out, "--lengths", 1 << 21)
    assert complaint(capsys, *SMALL, *out, "--tasks", ",") == "tasks must be some that differ, got none"
    assert not (tmp_path / "x").exists()


def test_a_run_in_the_folder_of_another(fakes, capsys, tmp_path):
    out = ["--methods", "full", "--out", tmp_path]
    assert cli.main([*map(str, [*SMALL, *out])]) == 0
    capsys.readouterr()
    assert "has a run already: --resume" in complaint(capsys, *SMALL, *out)
    line = complaint(capsys, *SMALL, *out, "--resume", "--seed", 1, "--samples", 5)
    assert "of another configuration, in seed (0 there, now 1), samples (4 there, now 5)" in line
    (tmp_path / "config.yaml").unlink()
    assert "no config.yaml" in complaint(capsys, *SMALL, *out, "--resume")


def test_statuses(fakes, capsys, tmp_path, monkeypatch):
    def stop(error):
        def run(*_):
            raise error

        monkeypatch.setattr(runner, "run", run)

    stop(RunError("the disk is full"))
    assert complaint(capsys, *SMALL, "--out", tmp_path / "a", status=1) == "the disk is full"
    stop(KeyboardInterrupt())
    assert "interrupted; --resume goes on" in complaint(capsys, *SMALL, "--out", tmp_path / "b", status=130)
    stop(UsageError("no"))
    assert complaint(capsys, *SMALL, "--out", tmp_path / "c") == "no"


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    line = "transformers and matplotlib not installed: pip install 'attnlab[evals]'"
    assert complaint(capsys, "run") == line


def test_list_has_everything(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (*SUITES, *tasks.TASKS, *methods.METHODS):
        assert f"\n  {name} " in out
    assert "block=64, topk=8" in out


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_suites_name_what_there_is(suite):
    assert suite.tasks and set(suite.tasks) <= set(tasks.TASKS)
    assert methods.parse(suite.methods)[0].spec == "full"
    assert suite.samples > 0 and all(length > 0 for length in suite.lengths)


def test_lengths_of_a_suite_go_as_far_as_the_model():
    ruler = SUITES["ruler"]
    for most, expected in (
        (4096, [4096]),
        (40000, [4096, 8192, 16384, 32768]),
        (1 << 20, [4096 << i for i in range(6)]),
    ):
        assert list(ruler.lengths_for(evals_fakes.subject(max_length=most))) == expected
    with pytest.raises(UsageError, match="suite ruler begins at 4096 tokens, fake takes 4095: give --lengths"):
        ruler.lengths_for(evals_fakes.subject(max_length=4095))
    assert SUITES["quick"].lengths_for(evals_fakes.subject(max_length=1)) == SUITES["quick"].lengths


@pytest.fixture
def model(tmp_path):
    """The testbed before training, by path."""
    from attnlab.evals.testbed.model import seeded
    from attnlab.evals.testbed.recipe import PRESETS
    from attnlab.evals.testbed.vocabulary import tokenizer

    seeded(PRESETS["cpu"].sizes._replace(intermediate=64), 0).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def same_files(a, b):
    """But for times: equal names and bytes."""
    names = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file() and p.name not in ("env.json", ".lock"))
    assert names == sorted(
        p.relative_to(b) for p in b.rglob("*") if p.is_file() and p.name not in ("env.json", ".lock")
    )
    for name in names:
        one, other = ((folder / name).read_bytes() for folder in (a, b))
        if name.suffix == ".jsonl":
            one, other = (
                [
                    json.dumps({k: v for k, v in json.loads(line).items() if k != "seconds"})
                    for line in text.splitlines()
                ]
                for text in (one, other)
            )
        assert one == other, name
    return names


def test_a_run_killed_in_the_middle_goes_on_to_the_same_bytes(model, tmp_path, one_thread, capsys):
    asks = ["run", "--model", str(model), "--tasks", "testbed_single,testbed_tracking", "--lengths", "128"]
    asks += ["--methods", "full,moba:block=16+topk=2", "--samples", "6", "--batch", "2", "--device", "cpu"]
    assert cli.main([*asks, "--out", str(tmp_path / "whole")]) == 0
    killed, at = tmp_path / "killed", random.randrange(1, 24)
    print(f"killed at {at} samples")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(at)}
    command = [sys.executable, "-m", "attnlab.evals", *asks, "--out", str(killed)]
    run = subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.PIPE)
    while run.poll() is None and sum(p.read_bytes().count(b"\n") for p in killed.glob("samples/*")) < at:
        time.sleep(1e-3)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    capsys.readouterr()
    assert cli.main([*asks, "--out", str(killed), "--resume"]) == 0
    names = [str(name) for name in same_files(tmp_path / "whole", killed)]
    assert {"config.yaml", "results.json", "table.md"} <= set(names) and len(names) > 3 + 4
