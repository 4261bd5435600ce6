"""Stands in for kernels/cuda/module.py's launch: the .cu files run on the CPU, as fibers under emulation.h."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from attnlab.kernels.cuda import module

HERE = Path(__file__).parent
KERNELS = {
    "buffer.cu": ("buffer_admit", "buffer_fetch"),
    "gate.cu": ("gate",),
    "layout.cu": ("layout_count", "layout_place"),
    "states.cu": ("merge_states", "append_token"),
}
COMPILER = shutil.which("g++") or shutil.which("clang++")


class Emulator:
    """Builds each (source, defines) once, into `folder`; `falling` turns the order in which threads run around."""

    def __init__(self, folder: Path, sources: Path = module.HERE) -> None:
        self.folder, self.sources, self.falling = folder, sources, False
        self.libraries: dict[tuple, ctypes.CDLL] = {}

    def library(self, source: str, defines: module.Defines) -> ctypes.CDLL:
        key = (source, defines)
        if key not in self.libraries:
            stem = self.folder / f"{len(self.libraries)}_{Path(source).stem}"
            lines = [f"#define {name} {value}" for name, value in defines]
            lines += [f'#include "{HERE / "emulation.h"}"', f'#include "{self.sources / source}"']
            lines += [f"EMULATE({name})" for name in KERNELS[source]]
            stem.with_suffix(".cpp").write_text("\n".join(lines) + "\n")
            options = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas"]
            build = [COMPILER, *options, str(stem.with_suffix(".cpp")), "-o", str(stem.with_suffix(".so"))]
            made = subprocess.run(build, capture_output=True, text=True)
            if made.returncode:
                raise RuntimeError(made.stderr)
            self.libraries[key] = ctypes.CDLL(str(stem.with_suffix(".so")))
        return self.libraries[key]

    def launch(
        self,
        source: str,
        name: str,
        grid: tuple[int, ...],
        block: int,
        arguments: tuple[module.Argument, ...],
        device: torch.device,
        defines: module.Defines = (),
    ) -> None:
        values = [module.plain(x) for x in arguments]
        packed = struct.pack("".join("d" if isinstance(x, float) else "q" for x in values), *values)
        dims = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        run = getattr(self.library(source, defines), f"run_{name}")
        if run(packed, dims, ctypes.c_uint(block), ctypes.c_bool(self.falling)):
            raise RuntimeError(f"{name}: threads wait for each other at different places")
