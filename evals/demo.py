"""`python -m attnlab.evals.demo`: accuracy of every method on the testbed model, and speed on long real text.

First the suite `quick` of `attnlab-eval`, then 32K bytes of Python's own library through a Llama, dense and sparse: a
table, a figure and a record each.
"""

import argparse
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnlab.evals import accuracy, demo_model, figures, report
from attnlab.evals.demo_model import Pass, Variant
from attnlab.evals.measure import environment, ratio, spread
from attnlab.progress import Progress

CAPTION = "Seconds per forward pass against tokens, dense and MoBA, both axes logarithmic"
DENSE = Variant("SDPA dense")
ROUNDS = 3
BUDGET_S = 75.0  # after its first round, a length is not begun again that would end later
Record = dict[str, Any]
Passes = dict[tuple[int, Variant], list[Pass]]


def variants(quick: bool) -> list[Variant]:
    """Dense first, then the plans."""
    routings = ((64, 8), (64, 3), (16, 8)) if quick else ((512, 8), (512, 3), (128, 8))
    return [DENSE, *(Variant(f"MoBA B={b} k={k}", b, k) for b, k in routings)]


def measure(model: Any, ids: Tensor, chosen: list[Variant]) -> Passes:
    """Every variant at four lengths, in rounds; one logits tensor per variant is kept, that of the full length."""
    tokens = ids.shape[1]
    lengths = [tokens // 8, tokens // 4, tokens // 2, tokens]
    progress = Progress(len(chosen) * (1 + ROUNDS * len(lengths)))
    passes: Passes = {(n, v): [] for n in lengths for v in chosen}
    for variant in chosen:
        progress.step(f"warm-up, {variant.name}")
        demo_model.run(model, variant, ids[:, : lengths[0]])
    begun, costs = time.monotonic(), dict.fromkeys(lengths, 0.0)
    for i, length in ((i, n) for i in range(ROUNDS) for n in lengths):
        start = time.monotonic()
        if i and start - begun + costs[length] > BUDGET_S:
            continue
        for variant in chosen[i:] + chosen[:i]:
            progress.step(f"{length} tokens, {variant.name}")
            done = demo_model.run(model, variant, ids[:, :length])
            keep = length == tokens and i == 0
            passes[length, variant].append(done if keep else done._replace(logits=done.logits.new_empty(0)))
        costs[length] = time.monotonic() - start
    progress.close()
    return passes


def rows(passes: Passes) -> list[dict[str, Any]]:
    """One row per length and variant; the full length's rows hold the agreement with dense."""
    tokens = max(length for length, _ in passes)
    edges = [0, tokens // 8, tokens // 4, tokens // 2, tokens]
    made = []
    for (length, variant), done in passes.items():
        seconds = [p.seconds for p in done]
        p20, p50, p80, n = spread(seconds)
        row = {"variant": variant.name, "tokens": length, "p20_s": p20, "p50_s": p50, "p80_s": p80, "n": n}
        row["speedup"] = ratio([p.seconds for p in passes[length, DENSE]], seconds).p50
        peaks = [p.peak_bytes for p in done if p.peak_bytes is not None]
        row["peak_mib"] = max(peaks) / 2**20 if peaks else None
        if length == tokens and variant != DENSE:
            row["agreement"] = demo_model.agreement(passes[length, DENSE][0].logits, done[0].logits, edges)
        made.append(row)
    return made


def exactness(model: Any, ids: Tensor, block_size: int) -> dict[str, Any]:
    """With k at the number of blocks MoBA is dense attention: logits must agree to rounding.

    Errors are against the same model in float64; MoBA's may be twice SDPA's, plus rounding.
    """
    tokens = ids.shape[1]
    everything = Variant("MoBA, k = all blocks", block_size, -(-tokens // block_size))
    dense, sparse = (demo_model.run(model, variant, ids).logits.double() for variant in (DENSE, everything))
    exact = demo_model.run(model.double(), DENSE, ids).logits
    model.float()
    errors = [(x - exact).abs().max().item() for x in (dense, sparse)]
    bound = 2 * errors[0] + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    same = (dense.argmax(-1) == sparse.argmax(-1)).double().mean().item()
    names = ("tokens", "block_size", "topk", "sdpa_error", "moba_error", "bound", "top1", "holds")
    values = (tokens, block_size, everything.topk, *errors, bound, same, errors[1] <= bound)
    return dict(zip(names, values, strict=True))


def markdown(record: Record) -> str:
    """The table, where the agreement fell, and the exactness line."""
    tokens = max(row["tokens"] for row in record["rows"])
    full = [row for row in record["rows"] if row["tokens"] == tokens]
    sparse = [row for row in full if "agreement" in row]
    head = ("attention", "seconds (p20-p80)", "speed-up", "peak memory, MiB", "top-1 as dense", "logits error")
    main = report.table(head, map(_line, full))
    stretches = [f"{_k(s['start'])}-{_k(s['end'])}" for s in sparse[0]["agreement"]["stretches"]]
    where = report.table(
        ("top-1 as dense, by position", *stretches),
        [(row["variant"], *(f"{s['top1']:.1%}" for s in row["agreement"]["stretches"])) for row in sparse],
    )
    e = record["exactness"]
    verdict = "agrees to rounding" if e["holds"] else "DISAGREES"
    exact = (
        f"k = all {e['topk']} blocks of {e['block_size']}, {e['tokens']} tokens: {verdict}; largest logit error "
        f"against float64 {e['moba_error']:.1e}, SDPA's own {e['sdpa_error']:.1e}, allowed {e['bound']:.1e}.\n"
    )
    return f"{tokens} bytes of Python's own library. {report.machine(record)}\n\n{main}\n{where}\n{exact}"


def _line(row: dict[str, Any]) -> tuple[str, ...]:
    times = f"{row['p50_s']:.2f} ({row['p20_s']:.2f}-{row['p80_s']:.2f})"
    peak = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    a = row.get("agreement")
    agreed = (f"{a['top1']:.1%}", f"{a['error']:.1%}") if a else ("", "")
    return row["variant"], times, f"{row['speedup']:.1f}x", peak, *agreed


def _k(tokens: int) -> str:
    return f"{tokens / 1024:g}K" if tokens else "0"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--tokens", type=int, help="length of the text (default 32768; 2048 under --quick)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (default 2)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/demo"), help="folder for the record")
    parser.add_argument("--quick", action="store_true", help="a short text and small blocks: seconds")
    parser.add_argument("--only", choices=("accuracy", "speed"), help="one half")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if options.tokens is None:
        options.tokens = 2048 if options.quick else 32768
    if options.tokens < 1024 or options.tokens % 8:
        parser.error(f"--tokens must be a multiple of 8 and at least 1024, got {options.tokens}")
    if options.layers < 1:
        parser.error(f"--layers must be a positive int, got {options.layers}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, {options.out} is a file")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if missing := [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]:
        parser.error(f"{' and '.join(missing)} not installed: pip install 'attnlab[evals]'")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, 1 when MoBA over all blocks is not dense attention, 2 for options that make no sense."""
    options = parse(argv)
    if options.only != "speed":
        try:
            sizes = ["--samples", "2", "--lengths", "256"] if options.quick else []
            found = accuracy.measure(options.out, ["--suite", "quick", "--device", options.device, *sizes])
        except RuntimeError as e:
            print(f"demo: {e}", file=sys.stderr)
            return 2
        print(accuracy.markdown(found))
    return 0 if options.only == "accuracy" else _speed(options)


def _speed(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    try:
        ids = demo_model.stdlib_text(options.tokens).to(device)
    except ValueError as e:
        print(f"demo: {e}", file=sys.stderr)
        return 2
    model, chosen = demo_model.build(options.layers, options.tokens, device), variants(options.quick)
    record: Record = {"environment": environment(device), "shape": demo_model.describe(options.layers)}
    record["rows"] = rows(measure(model, ids, chosen))
    record["exactness"] = exactness(model, ids[:, : options.tokens // 8], chosen[1].block_size)
    print(markdown(record))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"demo-{report.slug(record)}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    figures.time_against_length(record, path.with_suffix(".png"))
    print(f"wrote {path}\nwrote {path.with_suffix('.png')}")
    if not record["exactness"]["holds"]:
        print("demo: MoBA over all blocks must equal dense attention to rounding, and does not", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
