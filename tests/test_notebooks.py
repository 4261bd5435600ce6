"""Every notebook runs from the top in its quick mode, and its committed outputs are whole, small and anybody's."""

import re
import resource
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

import attnlab
from attnlab.evals import notebooks

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 30
BYTES = 300_000
# What a machine's owner would not want told, and what a reader should not have to wonder about.
PRIVATE = re.compile(r"/(home|root|tmp|work|usr|opt|Users|var)/|0x[0-9a-f]{8,}|Warning\b", re.IGNORECASE)

every = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def outputs(notebook):
    return [(i, output) for i, cell in enumerate(notebook.cells) for output in cell.get("outputs", ())]


def complaints(notebook):
    """Of outputs: errors, what went to stderr, and text that tells of the machine."""
    found = []
    for i, output in outputs(notebook):
        if output.output_type == "error":
            found.append(f"cell {i}: {output.ename}: {output.evalue}")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"cell {i}: stderr: {output.text}")
        texts = [output.get("text", "")] + [x for kind, x in output.get("data", {}).items() if "image" not in kind]
        found += [f"cell {i}: {match.group()!r} in its output" for x in texts if (match := PRIVATE.search(str(x)))]
    return found


def figures(notebook):
    return [output for _, output in outputs(notebook) if "image/png" in output.get("data", {})]


def test_there_are_notebooks():
    assert {path.name for path in PATHS} >= {"1_moba.ipynb", "4_lamina.ipynb"}


@every
def test_it_runs(path):
    def spent():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    notebook = notebooks.execute(path, quick=True, timeout=120)
    seconds = spent() - before  # of processors: a busy machine makes it no longer
    assert not complaints(notebook)
    assert figures(notebook)
    assert seconds < SECONDS


@every
def test_committed_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "executed from the top, once"
    assert [cell.source for cell in code if "parameters" in cell.metadata.get("tags", ())] == [notebooks.PARAMETERS]
    assert not complaints(notebook)
    assert figures(notebook)
    assert path.stat().st_size <= BYTES
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    assert "version" not in notebook.metadata.language_info


def made(folder, *sources, parameters=notebooks.PARAMETERS):
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    notebook.cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(notebook, folder / "made.ipynb")
    return folder / "made.ipynb"


def test_quick_replaces_the_parameters(tmp_path):
    path = made(tmp_path, "print(QUICK)", "import sys, attnlab; print(sys.executable, attnlab.__file__, sep='\\n')")
    before = path.read_bytes()
    full, quick = (notebooks.execute(path, quick=q) for q in (False, True))
    assert [nb.cells[1].outputs[0].text for nb in (full, quick)] == ["False\n", "True\n"]
    assert path.read_bytes() == before
    assert full.cells[2].outputs[0].text.splitlines() == [sys.executable, attnlab.__file__]
    assert len(complaints(quick)) == 1  # the paths just printed


def test_outputs_are_kept_clean(tmp_path):
    path = made(tmp_path, "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])")
    assert notebooks.main([str(tmp_path), "--write"]) == 0
    notebook = nbformat.read(path, as_version=4)
    (figure,) = figures(notebook)
    assert set(figure.data) == {"image/png"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert [cell.metadata for cell in notebook.cells] == [{"tags": ["parameters"]}, {}]


def test_an_error_stops_it(tmp_path):
    path = made(tmp_path, "1 / 0")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        notebooks.execute(path)


@pytest.mark.parametrize("parameters", ["QUICK = True", "QUICK = False\nx = 1"])
def test_quick_needs_its_cell(tmp_path, parameters):
    with pytest.raises(ValueError, match="needs one cell tagged 'parameters'"):
        notebooks.execute(made(tmp_path, parameters=parameters), quick=True)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "folder must be one of notebooks, nowhere is none"),
        ([".", "--quick", "--write"], "--write keeps the outputs of full-size problems: not with --quick"),
    ],
)
def test_bad_options_give_one_clear_line(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as exit:
        notebooks.main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"notebooks: error: {complaint}"
