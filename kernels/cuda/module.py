"""Compile, cache, load and launch the CUDA sources of this folder, with NVRTC through cuda.core.

A cubin is cached in the user's cache folder under the hash of everything it depends on, behind the digest of its own
bytes, and put there by atomic rename: writers may race, and a damaged entry is compiled anew.
"""

import functools
import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import cache

HERE = Path(__file__).parent
DIGEST = hashlib.sha256().digest_size
Defines = tuple[tuple[str, str | int], ...]
Argument = Tensor | int | float | None


class _Stream:
    """A torch stream as cuda.core takes foreign ones."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _core() -> Any:
    try:
        return importlib.import_module("cuda.core")
    except ImportError as error:
        raise ImportError('the CUDA C++ kernels need cuda.core: pip install "attnlab[cuda]"') from error


def missing() -> list[str]:
    """Why the sources of this folder cannot be compiled here; empty when they can."""
    try:
        versions()
    except ImportError as error:
        return [str(error)]
    except Exception as error:  # a library that is not found: each version of the loader has its own error
        return [f'NVRTC does not load ({error}): pip install "attnlab[cuda]"']
    return []


@functools.cache
def versions() -> str:
    core, nvrtc = _core(), importlib.import_module("cuda.bindings.nvrtc")
    _, major, minor = nvrtc.nvrtcVersion()
    return f"cuda.core {core.__version__}, nvrtc {major}.{minor}"


def arch(device: torch.device) -> int:
    """Compute capability as one number, 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def include_paths() -> list[str]:
    """Header folders of the nvidia-cuda-runtime and nvidia-cuda-cccl wheels, for sources that include any."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations or ()] if spec else []
    folders = [f for root in roots for f in sorted(root.glob("cu*/include"))]
    return [str(f) for f in folders] + [str(f / "cccl") for f in folders if (f / "cccl").is_dir()]


def cubin(source: str, capability: int, defines: Defines = ()) -> bytes:
    """The device code of file `source` for a compute capability, from the cache or from the compiler."""
    code, target = (HERE / source).read_text(), f"sm_{capability}" + "a" * (capability >= 90)
    key = hashlib.sha256(repr((code, target, defines, versions())).encode()).hexdigest()
    path = cache.folder("cubin") / f"{Path(source).stem}-{target}-{key[:32]}.cubin"
    found = _read(path)
    if found is None:
        found = _compile(source, code, target, defines)
        cache.write_atomically(path, hashlib.sha256(found).digest() + found)
    return found


def _compile(source: str, code: str, target: str, defines: Defines) -> bytes:
    core = _core()
    macros = [f"{name}={value}" for name, value in defines]
    options = core.ProgramOptions(
        name=source, std="c++17", arch=target, define_macro=macros or None, include_path=include_paths() or None
    )
    try:
        return bytes(core.Program(code, "c++", options).compile("cubin").code)
    except Exception as error:
        raise RuntimeError(f"{source} does not compile for {target} with {versions()}: {error}") from error


def _read(path: Path) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    digest, found = entry[:DIGEST], entry[DIGEST:]
    return found if hashlib.sha256(found).digest() == digest else None


@functools.cache
def _kernel(source: str, name: str, device: torch.device, defines: Defines) -> Any:
    code = cubin(source, arch(device), defines)
    return _core().ObjectCode.from_cubin(code, name=source).get_kernel(name)


def plain(x: Argument) -> int | float:
    """An argument of a kernel as a number: a tensor's address, 0 for None."""
    return x.data_ptr() if isinstance(x, Tensor) else x if isinstance(x, float) else int(x or 0)


def launch(
    source: str,
    name: str,
    grid: tuple[int, ...],
    block: int,
    arguments: tuple[Argument, ...],
    device: torch.device,
    defines: Defines = (),
) -> None:
    """Run kernel `name` of `source` on torch's current stream.

    Tensors go as pointers, None as null, ints as 64-bit, floats as doubles.
    """
    core = _core()
    values = [plain(x) for x in arguments]
    with torch.cuda.device(device):
        kernel = _kernel(source, name, device, defines)
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        core.launch(stream, core.LaunchConfig(grid=grid, block=block), kernel, *values)
