"""Compile, cache, load and call the C sources of this folder, with the machine's own C compiler.

They are built for the processor at hand. An entry of the cache is named by the hash of everything it depends on, what
the compiler says of its target included, and by the digest of its own bytes: a damaged one is compiled anew.
"""

import contextlib
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
COMPILERS = ("cc", "gcc", "clang")
OPTIONS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-pthread")
NATIVE = ("-march=native", "-mcpu=native")  # which of them a compiler knows depends on the architecture
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}  # as in simd.h
NO_MEMORY, BAD_INDEX = 1, 2  # as in parallel.h
Argument = Tensor | int | float | None


@functools.cache
def missing() -> str:
    """Why the sources of this folder cannot run here; empty when they can. The first call compiles them."""
    if sys.platform == "win32":
        return "the C kernels need a POSIX system"
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return str(error)
    return ""


def dense(x: Tensor) -> Tensor:
    """`x` with the elements of its last dimension next to each other, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def call(name: str, *arguments: Argument) -> None:
    """Run function `name`: tensors go as pointers, None as null, ints as 64-bit, floats as doubles.

    Raises MemoryError where the function could not get its working memory, ValueError where an index is out of range.
    """
    function = getattr(_library(), name)
    if not function.argtypes:  # told once, ctypes converts a number in a tenth of the time
        function.argtypes = [
            ctypes.c_void_p if x is None or isinstance(x, Tensor)
            else ctypes.c_double if isinstance(x, float)
            else ctypes.c_int64
            for x in arguments
        ]  # fmt: skip
    failed = function(*[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments])
    if failed == NO_MEMORY:
        raise MemoryError(f"the C kernel {name!r} could not allocate its working memory")
    if failed == BAD_INDEX:
        raise ValueError(f"the C kernel {name!r} was given a block or page that does not exist")


@functools.cache
def _library() -> ctypes.CDLL:
    compilers = [path for path in map(shutil.which, COMPILERS) if path]
    if not compilers:
        raise RuntimeError(f"no C compiler is found ({', '.join(COMPILERS)})")
    for compiler in compilers[:-1]:
        try:
            return _built(compiler)
        except RuntimeError:  # another one may know the language
            continue
    return _built(compilers[-1])


def _built(compiler: str) -> ctypes.CDLL:
    options, target = _target(compiler)
    texts = [path.read_text() for path in sorted(HERE.glob("*.[ch]"))]
    key = hashlib.sha256(repr((texts, OPTIONS, options, target)).encode()).hexdigest()[:32]
    for path in _entries(key):
        try:
            if path.stem == f"{key}-{_digest(path.read_bytes())}":
                return ctypes.CDLL(str(path))
        except OSError:  # gone, unreadable, or on a file system that runs nothing
            continue
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / "kernels.so"
        sources = [str(path) for path in sorted(HERE.glob("*.c"))]
        _run(compiler, *OPTIONS, *options, *sources, "-o", str(built), "-lm")
        code = built.read_bytes()
        with contextlib.suppress(RuntimeError):  # no home
            cache.write_atomically(cache.folder("cpu") / f"{key}-{_digest(code)}.so", code)
        return ctypes.CDLL(str(built))


def _entries(key: str) -> list[Path]:
    try:
        return sorted(cache.folder("cpu").glob(f"{key}-*.so"))
    except (OSError, RuntimeError):
        return []


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()[:32]


def _target(compiler: str) -> tuple[tuple[str, ...], str]:
    """The option that means this processor, and what the compiler then defines: its version, the target's features."""
    for option in NATIVE:
        try:
            return (option,), _run(compiler, option, "-dM", "-E", "-xc", "/dev/null")
        except RuntimeError:
            continue
    return (), _run(compiler, "-dM", "-E", "-xc", "/dev/null")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise RuntimeError(f"the C kernels do not compile here: {done.stderr.strip()[:2000]}")
    return done.stdout
