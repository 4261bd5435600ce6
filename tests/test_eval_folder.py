"""A run's folder: what is refused, what is dropped, what is kept when the disk is full."""

import errno
import json
import os
import resource

import pytest

from attnlab.evals.harness import config as configuration
from attnlab.evals.harness import folder
from attnlab.evals.harness.errors import RunError, UsageError
from attnlab.evals.harness.folder import FIELDS, RunFolder

CONFIG = {
    "schema_version": configuration.VERSION,
    "suite": "quick",
    "model": "testbed",
    "fingerprint": "f",
    "device": "cpu",
    "dtype": "float32",
    "data_dir": None,
    "seed": 0,
    "samples": 4,
    "lengths": [128, 256],
    "tasks": ["needle", "niah@noise"],
    "methods": {"full": {}, "moba:block=16": {"block": 16}},
    "skips": {"niah@noise": ["moba:block=16"]},
}
CELL = ("needle", 128, "full")


def record(index, cell=CELL, **changes):
    values = dict.fromkeys(FIELDS) | dict(zip(("task", "length", "method"), cell)) | {"index": index}
    return values | {"prompt": f"p{index}", "prefills": 1} | changes


def fill(path, n=3, config=CONFIG):
    """A run that stopped after `n` samples of one file; its path."""
    with RunFolder(path, config, resume=False) as run:
        run.append(run.files[CELL], [record(i) for i in range(n)])
        return run.files[CELL].path


def test_a_resumed_run_knows_its_samples(tmp_path):
    fill(tmp_path / "a" / "x")
    with RunFolder(tmp_path / "a" / "x", CONFIG, resume=True) as run:
        file = run.files[CELL]
        assert (file.done, file.prompts, file.prefills, run.kept) == (3, ["p0", "p1", "p2"], [1, 1, 1], 3)
        run.append(file, [record(3)])
        assert [r["index"] for r in run.records()] == [0, 1, 2, 3]
    assert ("niah@noise", 128, "moba:block=16") not in run.files and len(run.files) == 6
    config, records = folder.read(tmp_path / "a" / "x")
    assert config == CONFIG and list(records) == [record(i) for i in range(4)]


def test_records_come_by_task_length_method_and_index(tmp_path):
    with RunFolder(tmp_path / "x", CONFIG, resume=False) as run:
        cells = list(run.files)
        for cell in reversed(cells):
            run.append(run.files[cell], [record(i, cell) for i in range(2)])
        found = [(r["task"], r["length"], r["method"], r["index"]) for r in run.records()]
    assert found == [(*cell, i) for cell in cells for i in range(2)]
    assert cells[:3] == [CELL, ("needle", 128, "moba:block=16"), ("needle", 256, "full")]


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = fill(tmp_path)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
    with RunFolder(tmp_path, CONFIG, resume=True) as run:
        assert run.files[CELL].done == 2
        run.append(run.files[CELL], [record(2)])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (1, "{}"),
        (1, "[1, 2]"),
        (1, "7"),
        (1, '{"task": "needle",'),
        (1, json.dumps(record(2))),
        (2, json.dumps(record(2, task="other"))),
        (2, json.dumps(record(2, method="moba:block=16"))),
        (2, json.dumps({**record(2), "more": 1})),
        (3, "\n".join(json.dumps(record(i)) for i in (3, 4))),
    ],
)
def test_a_line_that_is_none_of_the_file_is_refused(tmp_path, line, text):
    path = fill(tmp_path)
    lines = path.read_text().splitlines()
    lines[line:] = [text, *lines[line + 1 :]]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UsageError, match=f"line {5 if line == 3 else line + 1} is no sample"):
        RunFolder(tmp_path, CONFIG, resume=True)
    path.unlink()
    with RunFolder(tmp_path, CONFIG, resume=True) as run:  # and nothing stays locked
        assert run.kept == 0


def test_names_of_files_tell_methods_apart():
    specs = ["moba:block=64+topk=8", "moba:block=64-topk=8", "moba/block=64+topk=8", "moba:block=64+topk=8 "]
    names = {folder.sample_name("niah@noise", 4096, spec) for spec in specs}
    assert len(names) == 4
    assert min(names).startswith("niah@noise-4096-moba-block-64-topk-8-")
    long = [folder.sample_name("t", 1, "split:plan=" + "x/" * 200 + end) for end in "ab"]
    assert long[0] != long[1] and all(len(name) < 100 and "/" not in name for name in (*names, *long))


def test_a_folder_with_a_run_needs_resume(tmp_path):
    fill(tmp_path)
    with pytest.raises(UsageError, match="has a run already: --resume goes on with it"):
        RunFolder(tmp_path, CONFIG, resume=False)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["notes.txt", "results.json", "samples/a.jsonl"])
def test_files_without_a_configuration_are_no_run(tmp_path, name, resume):
    (tmp_path / "samples").mkdir()
    (tmp_path / name).write_text("x")
    with pytest.raises(UsageError, match=r"holds files but no config\.yaml"):
        RunFolder(tmp_path, CONFIG, resume=resume)
    assert not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_an_empty_or_hardly_begun_folder_is_fine(tmp_path, resume):
    (tmp_path / "config.yaml.part").write_text("sch")
    (tmp_path / "samples").mkdir()
    with RunFolder(tmp_path, CONFIG, resume=resume) as run:
        assert run.kept == 0
    assert folder.read_config(tmp_path) == CONFIG and not (tmp_path / "config.yaml.part").exists()


def test_foreign_files_are_refused(tmp_path):
    fill(tmp_path)
    for name in (".notes", "results.json.part", "table.md"):
        (tmp_path / name).write_text("x")
    with RunFolder(tmp_path, CONFIG, resume=True):
        pass
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match=r"thesis\.tex is no file of a run"):
        RunFolder(tmp_path, CONFIG, resume=True)
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / "samples" / "needle-128-wave-01234567.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"wave-01234567\.jsonl is no file of this run"):
        RunFolder(tmp_path, CONFIG, resume=True)


def test_out_may_be_no_file(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UsageError, match=r"--out must be a folder, .* is none: Not a directory"):
        RunFolder(tmp_path / "x", CONFIG, resume=True)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", r"config\.yaml is broken: schema_version None, this one reads 1"),
        ("suite\n", r"config\.yaml is broken"),
        ('schema_version: 1\nsuite: "qui', r"config\.yaml is broken"),
        ("schema_version: 99\n", "schema_version 99, this one reads 1"),
        ('schema_version: 1\nsuite: "quick"\n', r"broken: model, fingerprint, .* missing"),
        (configuration.dumps(CONFIG | {"methods": ["full"]}), r"broken: methods \['full'\]"),
    ],
)
def test_a_broken_configuration_is_one_line(tmp_path, text, complaint):
    fill(tmp_path)
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UsageError, match=complaint) as error:
        RunFolder(tmp_path, CONFIG, resume=True)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match=complaint):
        folder.read(tmp_path)
    with pytest.raises(UsageError, match="is no run's folder"):
        folder.read(tmp_path / "nothing")


CHANGES = {
    "suite": "ruler",
    "fingerprint": "g",
    "device": "cuda",
    "dtype": "bfloat16",
    "seed": 1,
    "samples": 5,
    "lengths": [256, 128],
    "tasks": ["needle"],
    "skips": {"needle": ["full"], "niah@noise": ["moba:block=16"]},
    "methods": {"full": {}, "moba:block=16": {"block": 32}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_another_configuration_is_refused_and_the_key_named(tmp_path, key):
    fill(tmp_path)
    with pytest.raises(UsageError, match=f"of another configuration, in {key}"):
        RunFolder(tmp_path, CONFIG | {key: CHANGES[key]}, resume=True)
    assert folder.read_config(tmp_path) == CONFIG


def test_all_differing_keys_are_listed():
    with pytest.raises(UsageError) as error:
        configuration.resumed(CONFIG, CONFIG | CHANGES, "x")
    assert all(key in str(error.value) for key in CHANGES)
    with pytest.raises(UsageError, match=r"methods \(without 'full' now\)"):
        configuration.resumed(CONFIG, CONFIG | {"methods": {"moba:block=16": {"block": 16}}}, "x")


def test_methods_may_be_added_and_files_moved(tmp_path):
    fill(tmp_path)
    more = CONFIG | {"methods": {"wave": {"a": 1}, **CONFIG["methods"]}, "model": "elsewhere", "data_dir": "there"}
    with RunFolder(tmp_path, more, resume=True) as run:
        assert list(run.config["methods"]) == ["full", "moba:block=16", "wave"]
        assert run.config["model"] == "testbed" and run.files[CELL].done == 3
        assert run.files["needle", 128, "wave"].done == 0
    assert folder.read_config(tmp_path) == run.config


def test_configuration_is_flat_and_survives():
    text = configuration.dumps(CONFIG | {"data_dir": 'a "b": é\n'})
    assert len(text.splitlines()) == len(CONFIG)
    assert configuration.loads(text) == CONFIG | {"data_dir": 'a "b": é\n'}


def test_one_process_at_a_time(tmp_path):
    with RunFolder(tmp_path, CONFIG, resume=False):
        for resume in (False, True):
            with pytest.raises(UsageError, match="is in use by another run" if resume else "has a run already"):
                RunFolder(tmp_path, CONFIG, resume=resume)
    with RunFolder(tmp_path, CONFIG, resume=True):
        pass


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_line_and_keeps_what_was_there(tmp_path, monkeypatch, code):
    path, write = fill(tmp_path), os.write
    before = path.read_bytes()
    room = [40]

    def full(fd, data):
        if not room[0]:
            raise OSError(code, os.strerror(code))
        done = write(fd, bytes(data[: room[0]]))
        room[0] -= done
        return done

    with RunFolder(tmp_path, CONFIG, resume=True) as run:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(RunError) as error:
            run.append(run.files[CELL], [record(3)])
    assert str(error.value) == f"cannot write {path}: {os.strerror(code)}; 3 samples are kept, --resume goes on"
    assert path.read_bytes() == before


def test_a_file_that_may_not_grow_is_left_whole(tmp_path):
    """By the system's own limit, which lets a part of a write through first."""
    path = fill(tmp_path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunFolder(tmp_path, CONFIG, resume=True) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 40, limits[1]))
        try:
            with pytest.raises(RunError, match="File too large; 3 samples are kept"):
                run.append(run.files[CELL], [record(3)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_other_files_are_written_whole_or_not_at_all(tmp_path, monkeypatch, call):
    with RunFolder(tmp_path, CONFIG, resume=False) as run:
        run.write_json("results.json", {"a": 1})

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, call, full)
        with pytest.raises(RunError, match=r"cannot write .*results\.json: No space left on device; no sample is kept"):
            run.write_json("results.json", {"a": 2})
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"cannot write /proc/none.*; no sample is kept"):
        RunFolder(folder.Path("/proc/none/x"), CONFIG, resume=False)


def test_no_score_that_is_none_gets_into_a_file(tmp_path):
    with RunFolder(tmp_path, CONFIG, resume=False) as run, pytest.raises(ValueError, match="not JSON compliant"):
        run.append(run.files[CELL], [record(0, seconds=float("nan"))])
