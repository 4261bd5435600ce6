"""Compile, cache, load and call the C sources of this folder, with the machine's own C compiler.

They are built for the processor at hand. An entry of the cache is named by the hash of everything it depends on, what
the compiler says of its target included, and by the digest of its own bytes: a damaged one is compiled anew.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .. import cache

HERE = Path(__file__).parent
SOURCES = ("gate.c", "attend.c", "decode.c")
OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")  # which of them a compiler knows depends on the architecture
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in simd.h
Argument = Tensor | int | float | None


@functools.cache
def missing() -> str:
    """Why the sources of this folder cannot run here; empty when they can. The first call compiles them."""
    if sys.platform == "win32":
        return "the C kernels need a POSIX system"
    if _compiler() is None:
        return "no C compiler is found (cc, gcc or clang)"
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def call(name: str, *arguments: Argument) -> None:
    """Run function `name`: tensors go as pointers, None as null, ints as 64-bit, floats as doubles.

    Raises MemoryError where the function could not get its working memory.
    """
    values = [
        ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor)
        else ctypes.c_void_p(None) if x is None
        else ctypes.c_double(x) if isinstance(x, float)
        else ctypes.c_int64(x)
        for x in arguments
    ]  # fmt: skip
    if getattr(_library(), name)(*values):
        raise MemoryError(f"the C kernel {name!r} could not allocate its working memory")


@functools.cache
def _library() -> ctypes.CDLL:
    options, target = _target()
    texts = [(HERE / name).read_text() for name in (*SOURCES, "simd.h", "parallel.h")]
    key = hashlib.sha256(repr((texts, OPTIONS, options, target)).encode()).hexdigest()[:32]
    for path in sorted(cache.folder("cpu").glob(f"{key}-*.so")):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            return ctypes.CDLL(str(path))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "kernels.so"
        _run(*OPTIONS, *options, *(str(HERE / name) for name in SOURCES), "-o", str(built), "-lm")
        code = built.read_bytes()
        cache.write_atomically(cache.folder("cpu") / f"{key}-{_digest(code)}.so", code)
        return ctypes.CDLL(str(built))


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:32]


def _target() -> tuple[tuple[str, ...], str]:
    """The option that means this processor, and what the compiler then defines: its version, the target's features."""
    for option in NATIVE:
        try:
            return (option,), _run(option, "-dM", "-E", "-xc", "/dev/null")
        except RuntimeError:
            continue
    return (), _run("-dM", "-E", "-xc", "/dev/null")


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)


def _run(*options: str) -> str:
    done = subprocess.run([str(_compiler()), *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the C kernels do not compile here: {done.stderr.strip()[:2000]}")
    return done.stdout
