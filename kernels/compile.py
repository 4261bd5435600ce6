"""Build every production configuration of every kernel for GPUs this machine lacks, and hold them to their limits.

    python -m attnlab.kernels.compile [--arch 80,90,100,120] [--head-dim 64,96,128,256] [--dtype bf16,fp32]
                                      [--only TEXT] [--json FILE] [--jobs N] [--quiet]

Fails where a kernel does not compile, needs more shared memory than the architecture has, spills (backward kernels
may), or does without Hopper's tensor cores where it should use them. Results are cached by the hash of their inputs.

A Triton file takes part by having `production(arch: int, head_dim: int, dtype: str) -> list[dict]`, with `arch` one of
80, 90, 100, 120 and `dtype` one of "fp16", "bf16", "fp32". Each dict is a job:

    name        what the table calls it, e.g. "moba.forward[head]"
    fn          the @triton.jit function
    signature   {argument: "*fp16" | "*fp32" | "*i32" | "i32" | "i64" | "fp32" | "constexpr" | ...}
    constexprs  {argument: value} for each "constexpr"
    options     {"num_warps": int, "num_stages": int}
    dot         True where sm_90 must use its tensor cores (HGMMA)
    divisible   optional: integer arguments a launch passes as multiples of 16; pointers always are
"""

import argparse
import hashlib
import importlib
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import cache, configs
from .cuda import module, states

HERE = Path(__file__).parent
STATIC_RESERVED = 1 << 10  # the driver's part of shared memory, which cuobjdump counts on sm_90 and later
FAILED = "does not compile"
CUDA_NAMES = {"fp16": "Half", "bf16": "Brain", "fp32": "float"}


class Job(NamedTuple):
    """One kernel for one target. `at` is its place in what `production` returns, or the defines of a .cu file."""

    name: str
    file: str
    arch: int
    head_dim: int
    dtype: str
    at: Any
    key: str


class Built(NamedTuple):
    """What a compiled kernel needs, and what is wrong with that."""

    name: str
    arch: int
    head_dim: int
    dtype: str
    registers: int
    spills: int  # bytes of local memory a thread
    shared: int  # bytes a program
    hgmma: int
    seconds: float
    problems: list[str]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr((Path(__file__).read_text(), *parts)).encode()).hexdigest()


def _source(job: dict, arch: int) -> tuple[Any, dict, Any]:
    """triton.compile's source, options and target of a production job."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, signature = job["fn"].arg_names, job["signature"]
    if set(names) != set(signature):
        raise ValueError(f"signature and arguments differ in {sorted(set(names) ^ set(signature))}")
    aligned = [n for n in names if signature[n].startswith("*") or n in job.get("divisible", ())]
    source = ASTSource(
        fn=job["fn"],
        signature={n: signature[n] for n in names},
        constexprs=job["constexprs"],
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    return source, job["options"], GPUTarget("cuda", arch, 32)


def triton_files() -> list[str]:
    """Modules of this package that have a `production`."""
    files = sorted(
        f for folder in ("fusionrag", "lamina", "moba", "retroinfer", "states") for f in (HERE / folder).glob("*.py")
    )
    return [f"{f.parent.name}.{f.stem}" for f in files if "\ndef production(" in f.read_text()]


def production(file: str, arch: int, head_dim: int, dtype: str) -> list[dict]:
    return importlib.import_module(f".{file}", __package__).production(arch, head_dim, dtype)


def triton_jobs(file: str, archs: list[int], dims: list[int], dtypes: list[str]) -> Iterator[Job]:
    import triton

    for target in itertools.product(archs, dims, dtypes):
        try:
            for place, job in enumerate(production(file, *target)):
                source, options, _ = _source(job, target[0])
                key = _digest(triton.__version__, source.hash(), sorted(options.items()), target[0], file, job["dot"])
                yield Job(job["name"], file, *target, place, key)
        except Exception:  # building the same job will say what is wrong
            yield Job(file, file, *target, -1, _digest(file, target))


def cuda_jobs(archs: list[int], dtypes: list[str]) -> Iterator[Job]:
    """One build serves all head sizes; a build per dtype where elements are read, and per dtype of merged states."""
    for arch in archs:
        depth = tuple(configs.get("cuda.gate", arch, 256, 4).items())
        builds = [("gate.cu", t, (("ELEMENT", CUDA_NAMES[t]), *depth)) for t in dtypes]
        threads = (("THREADS", configs.get("cuda.buffer", arch, 1, 1)["THREADS"]),)
        builds += [("states.cu", name, defines) for name, defines in _states_builds(arch, dtypes)]
        for file, dtype, defines in [*builds, ("layout.cu", "i32", ()), ("buffer.cu", "bytes", threads)]:
            key = _digest((HERE / "cuda" / file).read_text(), defines, arch, module.missing() or module.versions())
            yield Job(f"cuda.{file[:-3]}", file, arch, 256, dtype, defines, key)


def _states_builds(arch: int, dtypes: list[str]) -> Iterator[tuple[str, module.Defines]]:
    """Results in the dtype of the states, in float32 and in 8 bits, in whole units; and element by element."""
    row, torch_types = configs.get("cuda.states", arch, 256, 4), {v: k for k, v in states.ELEMENTS.items()}
    for name in dtypes:
        dtype = torch_types[CUDA_NAMES[name]]
        results = {name: dtype, "fp32": torch.float32} | ({"fp8": torch.float8_e4m3fn} if arch >= 89 else {})
        for result, to in results.items():
            for unit in (states.widest(dtype, to), 1):
                yield f"{name}->{result}/{unit}", states.defines((dtype, dtype, to), unit, row)


def build(job: Job) -> Built:
    """Compile one job and read its resources; never raises for what is wrong with the kernel."""
    start = time.perf_counter()
    registers = spills = shared = hgmma = 0
    problems, dot = [], False
    try:
        if job.file.endswith(".cu"):
            usage = _usage(module.cubin(job.file, job.arch, job.at), False)
            registers, spills, shared, _ = usage
            shared -= STATIC_RESERVED if job.arch >= 90 and shared else 0
        else:
            registers, spills, shared, hgmma, dot = _build_triton(job)
    except Exception as error:  # a compiler error of any kind is this job's finding
        lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
        problems.append(f"{FAILED}: {type(error).__name__}: {' ... '.join(dict.fromkeys((lines[0], lines[-1])))}")
    else:
        limit = configs.SHARED_LIMIT[configs.family(job.arch)]
        if shared > limit:
            problems.append(f"shared memory {shared} > {limit}")
        if spills and "backward" not in job.file:
            problems.append(f"spills {spills} bytes")
        if dot and job.arch == 90 and not hgmma:
            problems.append("no HGMMA")
    seconds = round(time.perf_counter() - start, 2)
    return Built(job.name, job.arch, job.head_dim, job.dtype, registers, spills, shared, hgmma, seconds, problems)


def _build_triton(job: Job) -> tuple[int, int, int, int, bool]:
    import triton

    jobs = production(job.file, job.arch, job.head_dim, job.dtype)
    if job.at < 0:
        for made in jobs:
            _source(made, job.arch)
    made = jobs[job.at]
    source, options, target = _source(made, job.arch)
    kernel = triton.compile(source, target=target, options=options)
    sass = made["dot"] and job.arch == 90
    registers, spills, _, hgmma = _usage(kernel.asm["cubin"], sass)
    return registers, spills, kernel.metadata.shared, hgmma, made["dot"]


def _usage(cubin: bytes, sass: bool) -> tuple[int, int, int, int]:
    """Registers, local bytes, static shared bytes (the most of any kernel in a cubin), HGMMA instructions if asked."""
    import triton.backends.nvidia

    tool = str(Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        code = ""
        if sass:
            code = subprocess.run([tool, "--dump-sass", file.name], check=True, capture_output=True, text=True).stdout

    def most(field: str) -> int:
        return max(int(x) for x in re.findall(rf"\b{field}:(\d+)", text))

    return most("REG"), most("STACK") + most("LOCAL"), most("SHARED"), code.count("HGMMA")


def _cached(job: Job) -> Path:
    return cache.folder("compile") / f"{job.key[:40]}.json"


def _built(jobs: list[Job], workers: int) -> Iterator[tuple[Job, Built]]:
    """Results as they come, from this process if one worker will do."""
    if workers <= 1:
        yield from ((job, build(job)) for job in jobs)
        return
    # Workers import the kernels anew: forking a process that runs LLVM's threads is not safe.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(build, job): job for job in jobs}
        for done in as_completed(futures):
            yield futures[done], done.result()


def build_all(jobs: list[Job], workers: int) -> list[Built]:
    """Results in the order of `jobs`. Jobs of the same key (no use for a head size, say) are built once."""
    unique = {job.key: job for job in jobs}
    found: dict[str, Built] = {}
    for key, job in unique.items():
        try:
            found[key] = Built(*json.loads(_cached(job).read_text()))
        except (OSError, ValueError, TypeError):
            continue
    todo = [job for key, job in unique.items() if key not in found]
    for job, result in _built(todo, min(workers, len(todo))):
        found[job.key] = result
        if not any(p.startswith(FAILED) for p in result.problems):  # the fault may be the machine's
            cache.write_atomically(_cached(job), json.dumps(result).encode())
    return [found[j.key]._replace(name=j.name, head_dim=j.head_dim, dtype=j.dtype) for j in jobs]


def table(results: list[Built]) -> str:
    head = ("kernel", "sm", "d", "dtype", "registers", "spills", "shared KB", "HGMMA", "s", "")
    rows = [
        (r.name, r.arch, r.head_dim, r.dtype, r.registers, r.spills, f"{r.shared / 1024:.1f}", r.hgmma or "", r.seconds,
         "; ".join(r.problems) or "ok")
        for r in results
    ]  # fmt: skip
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    lines = ["  ".join(str(x).ljust(w) for x, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    # Interpreted kernels cannot be compiled, and triton looks when the kernels' files are imported: below.
    os.environ.pop("TRITON_INTERPRET", None)
    parser = argparse.ArgumentParser(prog="python -m attnlab.kernels.compile", description=__doc__.splitlines()[0])

    def several(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser.add_argument("--arch", type=several, default=[80, 90, 100, 120])
    parser.add_argument("--head-dim", type=several, default=[64, 96, 128, 256])
    parser.add_argument("--dtype", type=lambda text: text.split(","), default=["bf16", "fp32"])
    parser.add_argument("--only", default="", metavar="TEXT", help="kernels with TEXT in their name")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--quiet", action="store_true", help="list the failures alone")
    options = parser.parse_args(argv)
    start = time.perf_counter()
    jobs = [*cuda_jobs(options.arch, options.dtype)]
    for file in triton_files():
        jobs += triton_jobs(file, options.arch, options.head_dim, options.dtype)
    jobs = [job for job in jobs if options.only in job.name]
    results = build_all(jobs, options.jobs)
    failed = [r for r in results if r.problems]
    print(table(failed if options.quiet else results))
    print(f"{len(results)} builds of {len({r.name for r in results})} kernels, {len(failed)} failed, "
          f"{time.perf_counter() - start:.0f} s")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps([r._asdict() for r in results], indent=1) + "\n")
    return bool(failed) or not results


if __name__ == "__main__":
    sys.exit(main())
