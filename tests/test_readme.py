"""README.md: its code runs, its links lead somewhere, its measured parts are what the committed records say."""

import pathlib
import re

import pytest

from attnlab.evals import readme

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
@pytest.mark.filterwarnings("ignore")
def test_code_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "transformers" in code:
        pytest.importorskip("transformers")
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_code_blocks():
    assert len(BLOCKS) == 9


def test_measured_parts_are_the_records():
    assert readme.render(TEXT, readme.RESULTS) == TEXT, "python -m attnlab.evals.readme rewrites them"


def test_files_and_targets_named_exist():
    for image in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (ROOT / image).is_file(), image
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", TEXT)) <= targets
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]+)`", TEXT):
        assert (ROOT / path).exists(), path
