"""Compiling and caching the CUDA C++ sources: NVRTC and nvcc need no GPU."""

import multiprocessing
import re
import shutil
import subprocess
import sys

import pytest
import torch

from attnlab.kernels import cache as caches
from attnlab.kernels import configs
from attnlab.kernels.cuda import moba, module, states

needs_nvrtc = pytest.mark.skipif(bool(module.missing()), reason="needs NVRTC: attnlab[cuda]")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return caches.folder("cubin")


@pytest.fixture
def compiles(monkeypatch):
    """Names of the sources compiled during the test."""
    names, real = [], module._compile
    monkeypatch.setattr(module, "_compile", lambda source, *rest: names.append(source) or real(source, *rest))
    return names


def elf(code: bytes) -> bool:
    return code[:4] == b"\x7fELF"


@needs_nvrtc
def test_a_cubin_is_compiled_once(cache, compiles):
    code = module.cubin("layout.cu", 90)
    assert elf(code)
    assert module.cubin("layout.cu", 90) == code
    assert compiles == ["layout.cu"]
    assert len(list(cache.iterdir())) == 1


@needs_nvrtc
def test_architectures_and_defines_have_entries_of_their_own(cache, compiles):
    codes = {module.cubin("layout.cu", arch, defines) for arch in (80, 90) for defines in ((), (("UNUSED", 1),))}
    assert len(compiles) == 4
    assert len(codes) >= 2
    assert sorted(p.name.split("-")[1] for p in cache.iterdir()) == ["sm_80", "sm_80", "sm_90a", "sm_90a"]


@needs_nvrtc
@pytest.mark.parametrize("damage", [b"", b"short", None])
def test_a_damaged_entry_is_compiled_anew(cache, compiles, damage):
    code = module.cubin("layout.cu", 80)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] + b"\xff" if damage is None else damage)
    assert module.cubin("layout.cu", 80) == code
    assert len(compiles) == 2
    assert module.cubin("layout.cu", 80) == code
    assert len(compiles) == 2


@needs_nvrtc
def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path, monkeypatch, compiles):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert elf(module.cubin("layout.cu", 80))
    assert elf(module.cubin("layout.cu", 80))
    assert len(compiles) == 2


def _race(path, data, times):
    for _ in range(times):
        caches.write_atomically(path, data)


def test_racing_writers_leave_one_whole_entry(tmp_path):
    path = tmp_path / "folder" / "entry"
    entries = [bytes([i]) * 200_000 for i in range(3)]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_race, args=(path, data, 40)) for data in entries]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert seen | {path.read_bytes()} <= set(entries)
    assert list(path.parent.iterdir()) == [path]


@needs_nvrtc
def test_a_compile_error_names_the_source_and_the_target(cache):
    with pytest.raises(RuntimeError, match=r"(?s)gate\.cu does not compile for sm_90a .*Nothing"):
        module.cubin("gate.cu", 90, (("DEPTH", 16), ("ELEMENT", "Nothing")))
    assert not cache.exists() or not list(cache.iterdir())


def test_without_cuda_core_the_error_names_the_extra(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(module.importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"attnlab\[cuda\]"):
        module._core()
    module.versions.cache_clear()
    assert "attnlab[cuda]" in module.missing()[0]
    module.versions.cache_clear()


def test_cuda_core_is_not_imported_before_it_is_needed():
    code = "import sys, attnlab.kernels.cuda.moba; sys.exit('cuda.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("source", ["gate.cu", "layout.cu", "states.cu"])
def test_nvcc_agrees_and_reports_no_spills(source, tmp_path):
    row, types = configs.get("cuda.states", 90, 256, 4), (torch.bfloat16, torch.float32, torch.float8_e4m3fn)
    macros = {
        "gate.cu": (("DEPTH", 16), ("ELEMENT", moba.ELEMENTS[torch.bfloat16])),
        "states.cu": states.defines(types, states.widest(*types), row),
    }
    defines = [f"-D{name}={value}" for name, value in macros.get(source, ())]
    options = ["-std=c++17", "-arch=sm_90a", "-cubin", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = ["nvcc", *options, *defines, str(module.HERE / source), "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills
    assert set(spills) == {("0", "0")}
