"""`make gpu`: the tests on this machine's GPU, then its sanitizers, then the record of what passed.

Nothing is installed and nothing is fetched. A (function, backend) pair enters `kernels/verified.json` for this GPU when
some test ran it there and passed, no test that ran it failed, no failed test names its backend, and no sanitizer
complained; `backend="auto"` uses what is listed.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from attnlab.dispatch import missing
from attnlab.evals.measure import ROOT, environment

GPU_BACKENDS = ("triton", "cuda")
TOOLS = ("memcheck", "racecheck")
IGNORED = ("tests/test_layering.py", "tests/test_packaging.py")  # they say nothing about a GPU
FOUND_ERRORS = 99
Row = dict[str, Any]


def run_tests(select: str | None) -> tuple[list[Row], int]:
    """One row per test (`gpu_record`), and pytest's exit status."""
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "tests.json")
        command = [sys.executable, "-m", "pytest", "-q", "--durations=10", "-p", "attnlab.evals.gpu_record"]
        command += ["--gpu-record", str(file), *(f"--ignore={path}" for path in IGNORED)]
        command += ["-k", select] if select else []
        status = subprocess.run(command, cwd=ROOT, env=_env()).returncode
        return (json.loads(file.read_text()) if file.exists() else []), status


def sanitize(backend: str) -> dict[str, str]:
    """What each tool of compute-sanitizer says of a small run: "clean", or why not."""
    program = _sanitizer()
    if program is None:
        return dict.fromkeys(TOOLS, "compute-sanitizer not found")
    # The caching allocator hands out slices of large blocks, where an access past the end is invisible.
    env = {**_env(), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    said = {}
    for tool in TOOLS:
        command = [program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS)]
        command += [sys.executable, "-m", "attnlab.evals.gpu", "--exercise", backend]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        said[tool] = {0: "clean", FOUND_ERRORS: "errors"}.get(done.returncode, f"did not run (exit {done.returncode})")
        print(f"{backend} {tool}: {said[tool]}", flush=True)
        if done.returncode:
            print("\n".join((done.stdout + done.stderr).splitlines()[-40:]), flush=True)
    return said


def exercise(backend: str) -> None:
    """Every kernel of a backend once, on shapes whose tiles are all partial."""
    import attnlab

    torch.manual_seed(0)
    for dtype, routing in ((torch.bfloat16, "head"), (torch.float16, "group")):
        q = torch.randn(2, 333, 4, 80, device="cuda", dtype=dtype, requires_grad=True)
        k, v = (torch.randn(2, 333, 2, 80, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
        sparse = attnlab.moba_attention(q, k, v, block_size=48, topk=3, routing=routing, backend=backend)
        sparse.float().square().sum().backward()
        _exercise_states(dtype, backend)
        if backend == "triton":
            dense = attnlab.full_attention(q, k, v, backend=backend)
            dense.float().square().sum().backward()
            _exercise_decode(k.detach(), v.detach(), q[:, :1].detach())
            _exercise_wave(k.detach(), v.detach(), q[:, :1].detach())
            _exercise_fusion(k.detach(), v.detach(), q.detach())
            _exercise_lamina(k.detach(), v.detach(), q.detach())
    torch.cuda.synchronize()


def _exercise_states(dtype: torch.dtype, backend: str) -> None:
    """Few states a row, and so many that threads share one; sizes with and without 16-byte units; a token in place."""
    import attnlab

    wide = torch.randn(40, 2, 9, 4, 97, device="cuda", dtype=dtype)
    lses, indptr = torch.randn(40, 2, 9, 4, device="cuda"), torch.tensor([0, 3, 3, 40], device="cuda")
    narrow = torch.cuda.get_device_capability() >= (8, 9)
    for d in (97, 80):
        outs = wide[..., :d].contiguous()
        for n in (2, 40):
            state = attnlab.merge_states(outs[:n], lses[:n], lse_base="2", lse_scale=0.5, backend=backend)
            attnlab.merge_states(outs[:n], lses[:n], out=(outs[1], lses[1]), backend=backend)
        attnlab.merge_states(outs, lses, indptr=indptr, out_dtype=torch.float32, backend=backend)
        if narrow:
            attnlab.merge_states(outs, lses, out_dtype=torch.float8_e4m3fn, out_scale=0.1, backend=backend)
        k, v = outs[5, :, :, :2], outs[6, :, :, 2:]
        attnlab.append_token(state, outs[7], k, v, out=state, backend=backend)


def _exercise_decode(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> None:
    import attnlab

    if not hasattr(attnlab, "MoBACache"):
        return
    cache = attnlab.MoBACache(k.shape[0], 400, k.shape[2], k.shape[3], block_size=48, dtype=k.dtype, device=k.device)
    cache.append(k, v)
    attnlab.moba_decode(q, cache, topk=3, backend="triton")


def _exercise_wave(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> None:
    """Before and after an update of the index, then through caches that have to make room."""
    import attnlab

    config = attnlab.WaveConfig(segment=200, retrieval_ratio=0.1, max_cluster=20, update_every=32)
    index = attnlab.WaveIndex.build(k, v, config, lengths=[333, 70], capacity=400, backend="triton")
    attnlab.wave_attention(q, index, return_error_bound=True, backend="triton")
    index.append(k[:, :40], v[:, :40])
    attnlab.wave_attention(q, index, backend="triton")
    if k.is_cuda and missing("cuda.core", "cuda"):
        return
    for policy in ("clock", "lru"):
        with attnlab.WaveBuffer(index, 0.3, policy, page=5) as buffer:
            for step in (q, -q, q):
                attnlab.wave_attention(step, index, buffer=buffer, backend="triton")
            buffer.check()


def _exercise_fusion(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> None:
    """Keys into slots, also turned; many rows and one each over every layout of the keys; what a question sees."""
    from attnlab.fusionrag import SlotTable, rotate_keys, scatter_kv, selective_attention, token_importance
    from attnlab.rope import RopeConfig

    (batch, tokens, *head), lengths, triton = k.shape, [333, 70], {"backend": "triton"}
    table = SlotTable(batch, tokens, 2 * batch * tokens, device=k.device)
    slots, counts = table.extend(lengths), table.lengths.clone()
    k_pool, v_pool = k.new_zeros(2, table.slots, *head)
    scatter_kv(k, v, k_pool, v_pool, slots, **triton)
    shift, many = torch.arange(tokens, device=k.device).expand(batch, -1), q[:, :101]
    at = torch.stack([torch.randint(-1, n, (many.shape[1],), device=k.device) for n in lengths])
    for interleaved in (False, True):
        rope = RopeConfig(10000.0, head[1], 64, interleaved)
        rotate_keys(k, (shift, shift + 9), rope, **triton)
        rotate_keys(k, shift, rope, out=k_pool, slots=slots, **triton)
        selective_attention(many, k, v, at, lengths=counts, shift=shift, rope=rope, **triton)
    pages = torch.zeros(2, 3 * batch, 128, *head, dtype=k.dtype, device=k.device)
    places = torch.arange(3 * batch, dtype=torch.int32, device=k.device).view(batch, 3)
    scatter_kv(k[:, :101], v[:, :101], k_pool, v_pool, table.own(at), **triton)
    for rows in (at, counts[:, None] - 1):
        some = q[:, : rows.shape[1]]
        selective_attention(some, k, v, rows, lengths=counts, **triton)
        selective_attention(some, *pages, rows, page_table=places, lengths=counts, **triton)
        pools = k_pool[:, None], v_pool[:, None]
        selective_attention(some, *pools, rows, page_table=table.table, lengths=counts, **triton)
    for normalize in ("chunk", "context"):
        token_importance([many, -many], [k, -k], [3, 100, 331], q_lengths=[99, 7], normalize=normalize, **triton)


def _exercise_lamina(k: torch.Tensor, v: torch.Tensor, q: torch.Tensor) -> None:
    """Few and many queries over every layout of the keys, whole and shared out, with and without a prefix."""
    from attnlab.lamina import shared_prefix_decode, split_decode

    lengths = torch.tensor([333, 70], dtype=torch.int32, device=k.device)
    for page in (None, 1, 128):
        cache, options = (k, v), {"lengths": lengths, "backend": "triton"}
        if page is not None:
            wide = -(-k.shape[1] // page)
            cache = tuple(x.new_zeros(2 * wide, page, *x.shape[2:]) for x in (k, v))
            table = torch.arange(2 * wide, dtype=torch.int32, device=k.device).flip(0).view(2, wide)
            options["page_table"] = table
        for tokens in (1, 7, 101):
            for splits in (None, 1, 5):
                split_decode(q[:, :tokens], *cache, splits=splits, **options)
                shared_prefix_decode(q[:, :tokens], k[0, :77], v[0, :77], *cache, splits=splits, **options)


def verdicts(rows: Iterable[Row], sanitizers: dict[str, dict[str, str]]) -> list[Row]:
    """`{kernel, backend, passed, failed, verified}` of every pair some test ran on the GPU."""
    rows = list(rows)
    failed = [row for row in rows if row["outcome"] == "failed"]
    pairs = sorted({(fn, backend) for row in rows for fn, backend in row["used"] if backend in GPU_BACKENDS})
    found = []
    for fn, backend in pairs:
        ran = [row for row in rows if [fn, backend] in [list(pair) for pair in row["used"]]]
        passes, fails = (sum(row["outcome"] == outcome for row in ran) for outcome in ("passed", "failed"))
        blamed = fails or any(backend in row["test"] for row in failed)
        dirty = any(said == "errors" for said in sanitizers.get(backend, {}).values())
        verified = bool(passes and not blamed and not dirty)
        found.append({"kernel": fn, "backend": backend, "passed": passes, "failed": fails, "verified": verified})
    return found


def save_verified(record: Row, file: pathlib.Path) -> None:
    """Replace this GPU's rows in `kernels/verified.json`, by atomic rename."""
    data = json.loads(file.read_text())
    stamp = {"gpu": record["gpu"], **{name: record[name] for name in ("driver", "commit", "date", "versions")}}
    rows = [row for row in data["verified"] if row["gpu"] != record["gpu"]]
    rows += [{"kernel": v["kernel"], "backend": v["backend"], **stamp} for v in record["kernels"] if v["verified"]]
    data["verified"] = sorted(rows, key=lambda row: (row["gpu"], row["kernel"], row["backend"]))
    fresh = file.with_suffix(".json.new")
    fresh.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(fresh, file)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description=__doc__)
    parser.add_argument("--select", help="run only tests matching this pytest -k expression; nothing is recorded")
    parser.add_argument("--no-sanitize", action="store_true", help="skip compute-sanitizer")
    parser.add_argument("--out", type=pathlib.Path, help="also copy the record and verified.json into this folder")
    parser.add_argument("--exercise", choices=GPU_BACKENDS, help="only run each kernel of a backend once")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"make gpu: no CUDA device is visible to PyTorch {torch.__version__}; nothing was run")
        return 2
    if args.exercise:
        exercise(args.exercise)
        return 0
    start = time.perf_counter()
    rows, status = run_tests(args.select)
    if args.select or not rows:
        return status
    sanitizers = {} if args.no_sanitize else {backend: sanitize(backend) for backend in GPU_BACKENDS}
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
    seconds = round(time.perf_counter() - start, 1)
    failures = [row["test"] for row in rows if row["outcome"] == "failed"]
    record = {**environment("cuda"), **counts, "seconds": seconds, "failures": failures}
    record |= {"sanitizers": sanitizers, "kernels": verdicts(rows, sanitizers)}
    _save(record, args.out)
    dirty = any(said == "errors" for tools in sanitizers.values() for said in tools.values())
    return status or int(dirty)


def _save(record: Row, out: pathlib.Path | None) -> None:
    verified = ROOT / "kernels" / "verified.json"
    save_verified(record, verified)
    name = "".join(c if c.isalnum() else "-" for c in record["gpu"].lower())
    file = ROOT / "evals" / "results" / f"gpu-{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    for v in record["kernels"]:
        print(f"{v['kernel']:20} {v['backend']:8} {v['passed']} passed, {v['failed']} failed", end="")
        print("" if v["verified"] else "  not verified")
    print(
        f"{record['gpu']}: {record['passed']} passed, {record['failed']} failed in {record['seconds']} s -> {file.name}"
    )
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, out)
        shutil.copy(verified, out)


def _env() -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return {**env, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def _sanitizer() -> str | None:
    """compute-sanitizer on the path, in CUDA_HOME, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), nvcc and str(pathlib.Path(nvcc).resolve().parent.parent)]
    places = [os.environ.get("PATH", ""), *(os.path.join(home, "bin") for home in homes if home)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


if __name__ == "__main__":
    sys.exit(main())
