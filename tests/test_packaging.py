"""Wheel, sdist, editable install and bare checkout give the same modules and data, whoever else is called `kernels`."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("attnlab", "kernels", "reference", "evals")
WAYS = ("wheel", "sdist", "editable", "checkout")

pytest.importorskip("setuptools", minversion="77")
pytest.importorskip("pip")

LOOK = """
import importlib, importlib.util, json, os, site, sys
for name in [m for m in sys.modules if m.startswith("__editable___attnlab")]:  # this Python's own editable install
    sys.meta_path.remove(sys.modules.pop(name)._EditableFinder)
sys.path.insert(0, sys.argv[1])
site.addsitedir(sys.argv[1])
import attnlab
root = attnlab.__path__[0]
files = sorted(os.path.relpath(os.path.join(d, f), root) for d, _, fs in os.walk(root, followlinks=True) for f in fs)
files = [f for f in files if f.endswith((".py", ".cu", ".cuh", ".c", ".h", "py.typed", "verified.json"))]
modules = [
    ".".join(["attnlab", *f.removesuffix(".py").removesuffix("__init__").strip(os.sep).split(os.sep)]).strip(".")
    for f in files if f.endswith(".py")
]
missing = [m for m in modules if importlib.util.find_spec(m) is None]
for name in (
    "attnlab.rope", "attnlab.fusionrag", "attnlab.kernels.moba.spec", "attnlab.reference.moba", "attnlab.evals.measure"
):
    importlib.import_module(name)
from importlib import resources
data = json.loads(resources.files("attnlab.kernels").joinpath("verified.json").read_text())
device = {}
for n in ("cuda", "cpu"):
    names = (p.name for p in resources.files("attnlab.kernels." + n).iterdir())
    device[n] = sorted(name for name in names if not name.endswith((".py", "__")))
kernels = importlib.import_module("kernels")
print(json.dumps({
    "root": os.path.realpath(root), "files": files, "missing": missing, "data": sorted(data), "device": device,
    "theirs": getattr(kernels, "SOMEONE_ELSE", False),
    "ours": os.path.realpath(sys.modules["attnlab.kernels.moba.spec"].__file__),
}))
"""


def python(*args: str, cwd: Path, path: tuple[Path, ...] = ()) -> str:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    run = subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    out.mkdir(exist_ok=True)
    script = f"import sys; from setuptools import build_meta as b; print(b.build_{kind}(sys.argv[1]))"
    return out / python("-c", script, str(out), cwd=source).splitlines()[-1]


def pip_install(target: Path, *what: str) -> None:
    offline = ("--no-index", "--no-deps", "--no-build-isolation", "--no-compile", "--disable-pip-version-check")
    python("-m", "pip", "install", "-q", *offline, "--target", str(target), *what, cwd=target.parent)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a clone holds, so that builds leave the checkout alone."""
    tree = tmp_path_factory.mktemp("packaging") / "tree"
    tree.mkdir()
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    return tree


@pytest.fixture(scope="module")
def wheel(tree: Path) -> Path:
    return build("wheel", tree, tree.parent / "wheel")


@pytest.fixture(scope="module")
def wheel_from_sdist(tree: Path) -> Path:
    sdist = build("sdist", tree, tree.parent / "sdist")
    with tarfile.open(sdist) as archive:
        assert not [m.name for m in archive if m.issym()]
        archive.extractall(tree.parent / "unpacked")
    (unpacked,) = (tree.parent / "unpacked").iterdir()
    return build("wheel", unpacked, tree.parent / "rebuilt")


@pytest.fixture(scope="module")
def looks(tree: Path, wheel: Path, wheel_from_sdist: Path) -> dict[str, dict]:
    """What a fresh Python sees of attnlab, by the way it was installed, beside someone else's package `kernels`."""
    base = tree.parent
    other = base / "other"
    (other / "kernels").mkdir(parents=True)
    (other / "kernels" / "__init__.py").write_text("SOMEONE_ELSE = True\n")
    (base / "empty").mkdir()
    found = {}
    for way, what in {"wheel": [str(wheel)], "sdist": [str(wheel_from_sdist)], "editable": ["-e", str(tree)]}.items():
        pip_install(base / way, *what)
        found[way] = json.loads(python("-c", LOOK, str(base / way), cwd=base / "empty", path=(other,)))
    found["checkout"] = json.loads(python("-c", LOOK, str(base / "empty"), cwd=base / "empty", path=(tree, other)))
    return found


def in_tree(tree: Path) -> list[str]:
    """Every file users need, by its place in the package."""
    wanted = re.compile(r"\.(py|cu|cuh|c|h)$|py\.typed$|verified\.json$")
    roots = [("", tree / "attnlab"), *((f"{name}/", tree / name) for name in FOLDERS[1:])]
    return sorted(
        prefix + str(p.relative_to(root)) for prefix, root in roots for p in root.rglob("*") if wanted.search(p.name)
    )


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_same(looks: dict[str, dict], tree: Path, way: str) -> None:
    seen = looks[way]
    assert sorted(seen["files"]) == sorted(set(in_tree(tree)))
    assert seen["missing"] == []
    assert seen["data"] == sorted(json.loads((tree / "kernels" / "verified.json").read_text()))
    for folder, names in seen["device"].items():
        assert names == sorted(p.name for p in (tree / "kernels" / folder).glob("*.[ch]*"))
    home = tree if way in ("editable", "checkout") else tree.parent / way / "attnlab"
    assert Path(seen["ours"]) == (home / "kernels" / "moba" / "spec.py").resolve()


@pytest.mark.parametrize("way", WAYS)
def test_someone_elses_kernels_stay_theirs(looks: dict[str, dict], way: str) -> None:
    assert looks[way]["theirs"]


def test_sdist_rebuilds_the_same_wheel(wheel: Path, wheel_from_sdist: Path) -> None:
    with zipfile.ZipFile(wheel) as a, zipfile.ZipFile(wheel_from_sdist) as b:
        first, second = ({n: z.read(n) for n in z.namelist() if ".dist-info/" not in n} for z in (a, b))
    assert first == second
    assert all(name.startswith("attnlab/") for name in first)


def test_wheel_is_pure_and_carries_its_licence(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        (licence,) = (n for n in archive.namelist() if n.endswith("LICENSE"))
        assert b"Apache License" in archive.read(licence)
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in fields
    extras = set(re.findall(r"^Provides-Extra: (.+)$", fields, re.MULTILINE))
    assert extras == {
        "cuda",
        "triton",
        "flash",
        "faiss-cpu",
        "faiss-gpu",
        "hf",
        "embed",
        "evals",
        "notebooks",
        "ruler",
        "test",
    }
