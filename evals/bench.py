"""`python -m attnlab.evals.bench`: this library against dense SDPA and FlexAttention, in one process."""

import argparse
import functools
import itertools
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import torch

from attnlab.evals import bench_cases as bc
from attnlab.evals import bench_fusion, bench_lamina, bench_wave, report
from attnlab.evals.bench_check import Disagreement, check
from attnlab.evals.bench_flex import flex_contenders
from attnlab.evals.measure import Spread, environment, in_child, interleave, ratio, spread
from attnlab.moba_decoding import BACKENDS as DECODERS
from attnlab.progress import Progress

Row = dict[str, Any]
LEAST_SAMPLE_S = 0.05
PARTS = (bc, bench_wave, bench_fusion, bench_lamina)
KINDS = tuple(kind for part in PARTS for kind in part.KINDS)
SHAPES = ("shape", "wave_shape", "fusion_shape", "lamina_shape")
PLAIN = ("sdpa", "faiss", "flex dense", "flex same blocks", "prefill", "one call", "copy", "one process")


class Bench:
    """A run's options, and the rows and notes it has gathered."""

    def __init__(self, device: torch.device, cases: list[bc.Case], quick: bool, repeats: int | None):
        self.device, self.quick, self.repeats = device, quick, repeats
        self.cases = cases
        self.notes: list[str] = []
        self.shape, self.backends = self._serving(bc, "attnlab ")
        self.wave_shape, self.wave_backends = self._serving(bench_wave, "RetroInfer, ")
        self.fusion_shape, self.fusion_backends = self._serving(bench_fusion, "FusionRAG, ")
        self.lamina_shape, self.lamina_backends = self._serving(bench_lamina, "Lamina, ")
        self.stages: list[Row] = []
        self.rows: list[Row] = []
        self.progress = Progress(self._steps())

    def _serving(self, part: Any, title: str) -> tuple[bc.Shape, Any]:
        """A part's shape on this device and the backends that can be timed; the others are noted."""
        shape = part.GPU_SHAPE if self.device.type == "cuda" else part.CPU_SHAPE
        found, refused = part.serving(shape, self.device)
        self.notes += [f"{title}{name}: skipped, {why}" for name, why in refused.items()]
        return shape, found

    def run(self) -> None:
        """Check, then measure every case. Raises Disagreement before the first timing."""
        kinds = list(dict.fromkeys(case.kind for case in self.cases))
        for case in self._checked():
            for backend in self._contending(case):
                self.progress.step(f"check {case} [{backend}]")
                check(case, self._shape(case), self.device, backend)
        for kind in kinds:
            getattr(self, f"_{kind}")([case for case in self.cases if case.kind == kind])
        self.progress.close()

    def _shape(self, case: bc.Case) -> bc.Shape:
        if case.kind in bench_wave.KINDS:
            return self.wave_shape
        if case.kind in bench_lamina.KINDS:
            return self.lamina_shape
        return self.fusion_shape if case.kind in bench_fusion.KINDS else self.shape

    def _contending(self, case: bc.Case) -> list[str]:
        """The backends timed on a case; what takes minutes, on a CPU, is for the first alone."""
        if case.kind in bench_wave.KINDS:
            return ["portable"] if case.kind == "wave_int8" else self.wave_backends
        if case.kind in bench_fusion.KINDS:
            return self.fusion_backends[:1] if case.kind in bench_fusion.RATES else self.fusion_backends
        if case.kind in bench_lamina.KINDS:
            return self.lamina_backends[case.kind]
        if case.kind == "decode":
            return [name for name in self.backends if name in DECODERS]
        alone = self.device.type == "cpu" and case.kind in ("flex", "memory", "growth")
        return self.backends[:1] if alone else self.backends

    def _checked(self) -> list[bc.Case]:
        """MoBA's cases, and one of those whose check is the same for all."""
        alike = (bench_wave.KINDS, [k for k in bench_fusion.KINDS if k not in bench_fusion.RATES], bench_fusion.RATES)
        alike += tuple([kind] for kind in bench_lamina.KINDS)
        again = [case for kinds in alike for case in [c for c in self.cases if c.kind in kinds][1:]]
        return [case for case in self.cases if case not in again]

    def record(self) -> dict[str, Any]:
        """Everything a table needs."""
        about = {"environment": environment(self.device)}
        about |= {name: str(getattr(self, name)) for name in SHAPES}
        about["kv_bytes"] = bench_lamina.kv_bytes(self.lamina_shape)
        return about | {"quick": self.quick, "notes": self.notes, "rows": self.rows, "stages": self.stages}

    def _forward(self, cases: list[bc.Case]) -> None:
        qkv = bc.make_qkv(self.shape, cases[0].length, self.device)
        contenders = {"sdpa": functools.partial(bc.sdpa, *bc.heads_first(*qkv))}
        for case in cases:
            named = bc.forward_contenders(case, qkv, self.backends)
            contenders |= {f"{case} [{name}]": fn for name, fn in named.items()}
        samples = self._time(contenders, cases[0])
        for case in cases:
            ours = {name: samples[f"{case} [{name}]"] for name in self.backends}
            self._speed_rows(case, {"sdpa": samples["sdpa"], **ours})

    def _training(self, cases: list[bc.Case]) -> None:
        for case in cases:
            qkv = bc.make_qkv(self.shape, case.length, self.device)
            self._speed_rows(case, self._time(bc.training_contenders(case, qkv, self.backends), case))
        if self.device.type == "cpu":
            self.notes.append("FlexAttention, training: skipped, it has no backward on the CPU")

    def _decode(self, cases: list[bc.Case]) -> None:
        for case in cases:
            contenders = bc.decode_contenders(case, self.shape, self.device, self._contending(case))
            self._speed_rows(case, self._time(contenders, case, LEAST_SAMPLE_S))

    def _flex(self, cases: list[bc.Case]) -> None:
        if self.quick:
            self.notes.append("FlexAttention: skipped under --quick, compiling it takes half a minute")
            return
        for case in cases:
            qkv = bc.make_qkv(self.shape, case.length, self.device)
            ours = bc.forward_contenders(case, qkv, self._contending(case))
            try:
                flex = flex_contenders(case, qkv)
            except Exception as e:  # torch.compile's failures share no type
                self.notes.append(f"FlexAttention: skipped, {(str(e).strip().splitlines() or [type(e).__name__])[0]}")
                return
            self._agree(case, flex["flex same blocks"](), ours[self.backends[0]]())
            dense = functools.partial(bc.sdpa, *bc.heads_first(*qkv))
            self._speed_rows(case, self._time({"sdpa": dense, **flex, **ours}, case))

    def _agree(self, case: bc.Case, flex: torch.Tensor, ours: torch.Tensor) -> None:
        error = (flex.transpose(1, 2).double() - ours.double()).abs().max().item()
        if not error <= 16 * torch.finfo(ours.dtype).eps * ours.abs().max().item():
            raise Disagreement(f"{case}: FlexAttention with the same blocks differs by {error:.1e}")

    def _memory(self, cases: list[bc.Case]) -> None:
        for case in cases:
            for name in self._contending(case):
                self._memory_row(case, name, case.length)
        # A fixed multiple of q's size at any length, and dense takes minutes at the full one.
        self._memory_row(cases[0], "sdpa", cases[0].length // 4)

    def _memory_row(self, case: bc.Case, contender: str, length: int) -> None:
        self.progress.step(f"memory T={length} [{contender}]")
        routing = {**case.routing, "shape": vars(self.shape), "device": str(self.device)}
        peak = in_child("attnlab.evals.bench_cases:forward_peak", length=length, contender=contender, **routing)
        if peak["bytes"] is None:
            self.notes.append(f"memory [{contender}]: skipped, this system has no high-water mark to read")
            return
        held, share = peak["bytes"] / 2**20, peak["bytes"] / peak["q_bytes"]
        target = None if contender == "sdpa" else case.target
        met = None if target is None else share <= target
        figure = Spread(share, share, share, 1)
        self.rows.append(_row(case, contender, "MiB", Spread(held, held, held, 1), figure, target, met, length=length))

    def _growth(self, cases: list[bc.Case]) -> None:
        for case in cases:
            backends = self._contending(case)
            samples = self._time(bc.growth_contenders(case, self.shape, self.device, backends), case)
            for backend in backends:
                for part in ("whole", "gate", "rest"):
                    goal = case.target if part == "rest" and backend == backends[0] else None
                    self._growth_rows(case, backend, part, samples, goal)

    def _growth_rows(
        self, case: bc.Case, backend: str, part: str, samples: dict[str, list[float]], target: float | None
    ) -> None:
        lengths = bc.growth_lengths(case)
        each = {n: [s / n * 1e9 for s in samples[f"{part} {backend} {n}"]] for n in lengths}
        medians = {n: spread(values).p50 for n, values in each.items()}
        growth = max(medians.values()) / min(medians.values())
        for length, values in each.items():
            last = length == lengths[-1]
            figure = Spread(growth, growth, growth, len(values)) if last else None
            goal = target if last else None
            met = None if goal is None else growth <= goal
            row = _row(case, backend, "ns/token", spread(values), figure, goal, met, length=length)
            self.rows.append(row | {"part": part})

    def _wave_decode(self, cases: list[bc.Case]) -> None:
        for case in cases:
            contenders = bench_wave.decode_contenders(case, self.wave_shape, self.device, self.wave_backends)
            self._speed_rows(case, self._time(contenders, case, LEAST_SAMPLE_S))

    def _wave_build(self, cases: list[bc.Case]) -> None:
        for case in cases:
            contenders = bench_wave.build_contenders(case, self.wave_shape, self.device, self.wave_backends)
            samples = self._time(contenders, case)
            samples["sdpa"] = [s * bench_wave.SHORTER**2 for s in samples["sdpa"]]
            for name, seconds in samples.items():
                share = None if name == "sdpa" else ratio(seconds, samples["sdpa"])
                target = case.target if share else None
                met = None if share is None or target is None else share.p50 <= target
                self.rows.append(_row(case, name, "ms", spread([s * 1e3 for s in seconds]), share, target, met))

    def _wave_faiss(self, cases: list[bc.Case]) -> None:
        if why := bench_wave.no_faiss(self.device):
            self.notes.append(f"faiss: skipped, {why}")
            return
        for case in cases:
            contenders = bench_wave.faiss_contenders(case, self.wave_shape)
            self._speed_rows(case, self._time(contenders, case), base="faiss")

    def _wave_growth(self, cases: list[bc.Case]) -> None:
        for case in cases:
            samples = self._time(
                bench_wave.growth_contenders(case, self.wave_shape, self.device, self.wave_backends), case
            )
            for backend in self.wave_backends:
                self._growth_rows(case, backend, "whole", samples, case.target)

    def _wave_memory(self, cases: list[bc.Case]) -> None:
        for case in cases:
            for name in self._contending(case):
                self.progress.step(f"{case} [{name}]")
                meta, kv = (n / 2**20 for n in bench_wave.memory(case, self.wave_shape, self.device, name))
                share = Spread(meta / kv, meta / kv, meta / kv, 1)
                met = None if case.target is None else share.p50 <= case.target
                for what, held, figure in (("KV", kv, None), (name, meta, share)):
                    goal = (case.target, met) if figure else (None, None)
                    self.rows.append(_row(case, what, "MiB", Spread(held, held, held, 1), figure, *goal))

    _wave_int8 = _wave_memory

    def _selective(self, cases: list[bc.Case]) -> None:
        for case in cases:
            contenders = bench_fusion.contenders(case, self.fusion_shape, self.device, self.fusion_backends)
            self._speed_rows(case, self._time(contenders, case))
            if case.kind == "selective":
                share = bench_fusion.future(case, self.fusion_shape)
                self.notes.append(
                    f"{case}: of what a bottom-right mask lets its rows attend, {share:.1%} lies ahead of them"
                )

    _selective_mask = _selective

    def _selective_memory(self, cases: list[bc.Case]) -> None:
        for case, name in itertools.product(cases, ("sdpa", *self.fusion_backends)):
            self.progress.step(f"{case} [{name}]")
            options = {"shape": vars(self.fusion_shape), "device": str(self.device), "contender": name}
            peak = in_child("attnlab.evals.bench_fusion:selective_peak", length=case.length, **options)
            if peak["bytes"] is None:
                self.notes.append(f"{case} [{name}]: skipped, this system has no high-water mark to read")
                continue
            held, share = peak["bytes"] / 2**20, peak["bytes"] / peak["pairs"]
            target = None if name == "sdpa" else case.target
            met = None if target is None else share <= target
            figure = Spread(share, share, share, 1)
            self.rows.append(_row(case, name, "MiB", Spread(held, held, held, 1), figure, target, met))

    def _ttft(self, cases: list[bc.Case]) -> None:
        for case in cases:
            for backend in self._contending(case):
                with bench_fusion.prompts(case.length, bench_fusion.CHUNK, self.device, backend) as made:
                    contenders, reports = made.contenders(bench_fusion.RATES[case.kind], backend)
                    self._speed_rows(case, self._time(contenders, case), base="prefill")
                where = {"kind": case.kind, "length": case.length, "contender": f"attnlab {backend}"}
                self.stages.append(where | bench_fusion.stages(reports[1:]))

    _ttft_15 = _ttft_0 = _ttft

    def _lamina(self, cases: list[bc.Case]) -> None:
        for case in cases:
            contenders = bench_lamina.contenders(case, self.lamina_shape, self.device, self._contending(case))
            samples = self._time(contenders, case, LEAST_SAMPLE_S)
            self._speed_rows(case, samples, base=bench_lamina.BASES[case.kind])

    _split_decode = _split_decode_mha = _split_head = _split_sequence = _merge_states = _lamina

    def _lamina_decode(self, cases: list[bc.Case]) -> None:
        for case in cases:
            self.progress.step(str(case))
            found = bench_lamina.two_processes(bench_lamina.REQUESTS, case.length, self.repeats or case.repeats)
            samples = {name: found.pop(name) for name in ("one process", bench_lamina.TWO)}
            self._speed_rows(case, samples, base="one process")
            self.stages.append({"kind": case.kind, "length": case.length} | found)

    def _time(self, contenders: bc.Contenders, case: bc.Case, least_s: float = 0.0) -> dict[str, list[float]]:
        def tick(name: str) -> None:
            self.progress.step(f"{case.kind} T={case.length}: {name}")

        return interleave(contenders, self.repeats or case.repeats, device=self.device, least_s=least_s, tick=tick)

    def _speed_rows(self, case: bc.Case, samples: dict[str, list[float]], base: str = "sdpa") -> None:
        for name, seconds in samples.items():
            figure = None if name == base else ratio(samples[base], seconds)
            target = case.target if name == self._contending(case)[0] else None
            met = None if target is None or figure is None else figure.p50 >= target
            taken = spread([s * 1e3 for s in seconds])
            self.rows.append(_row(case, name, "ms", taken, figure, target, met))

    def _steps(self) -> int:
        steps, dense_forward = 0, 1
        for case in self.cases:
            ours = len(self._contending(case))
            steps += ours * (case in self._checked())
            rounds = (self.repeats or case.repeats) + 1
            per_round = {"growth": 12 * ours, "wave_growth": 4 * ours}.get(case.kind, 1 + ours)
            if case.kind == "forward":
                per_round, dense_forward = ours + dense_forward, 0
            if case.kind == "flex":
                per_round = 0 if self.quick else 3 + ours
            if case.kind in ("memory", "wave_memory", "wave_int8"):
                per_round, rounds = ours, 1
            if case.kind == "selective_memory":
                per_round, rounds = 1 + ours, 1
            if case.kind == "lamina_decode":
                per_round, rounds = 1, 1
            steps += per_round * rounds
        return steps


def _row(
    case: bc.Case,
    contender: str,
    unit: str,
    taken: Spread,
    figure: Spread | None,
    target: float | None,
    met: bool | None,
    length: int | None = None,
) -> Row:
    name = contender if contender in (*PLAIN, "KV") else f"attnlab {contender}"
    row = {"kind": case.kind, "length": length or case.length, **case.routing, "contender": name, "part": "whole"}
    row |= {"unit": unit, "p20": taken.p20, "p50": taken.p50, "p80": taken.p80, "n": taken.n}
    low, middle, high = (None, None, None) if figure is None else figure[:3]
    return row | {"figure_p20": low, "figure": middle, "figure_p80": high, "target": target, "met": met}


def updated(old: dict[str, Any], new: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """`old` with the rows, stages and notes of `kinds` from `new`, and a note of when and where those were taken.

    Raises ValueError where the two are not of one machine, or not of the same shapes.
    """
    same = ("cpu", "gpu", "threads", "python", "versions")
    for name in same:
        if old["environment"][name] != new["environment"][name]:
            was, now = old["environment"][name], new["environment"][name]
            raise ValueError(f"updated: the record's {name} must be this run's {now!r}, got {was!r}")
    old = {name: new[name] for name in ("lamina_shape", "kv_bytes")} | old  # older records have neither
    for name in (*SHAPES, "kv_bytes", "quick"):
        if old[name] != new[name]:
            raise ValueError(f"updated: the record's {name} must be this run's {new[name]!r}, got {old[name]!r}")
    parts = {}
    for name in ("rows", "stages"):
        parts[name] = sorted(
            [row for row in old[name] if row["kind"] not in kinds] + new[name], key=lambda row: KINDS.index(row["kind"])
        )
    about = new["environment"]
    when = f"{', '.join(kinds)}: measured anew on {about['date']}, commit {about['commit']}"
    return old | parts | {"notes": [*dict.fromkeys([*old["notes"], *new["notes"], when])]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small lengths, seconds, no targets, no FlexAttention")
    parser.add_argument("--only", help="comma-separated kinds out of: " + ", ".join(KINDS))
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/bench"), help="folder for the record")
    parser.add_argument("--update", type=pathlib.Path, metavar="RECORD", help="a record whose other kinds are kept")
    parser.add_argument("--repeats", type=int, help="rounds per case instead of each case's own number")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be a positive int, got {options.repeats}")
    options.kinds = KINDS if options.only is None else tuple(options.only.split(","))
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"--only knows {', '.join(KINDS)}, got {', '.join(map(repr, unknown))}")
    if options.update is not None and not options.update.is_file():
        parser.error(f"--update must be the JSON of a record, {options.update} is no file")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is available")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out must be a folder, {options.out} is a file")
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when the library and the reference disagree. A missed target is reported, not an error."""
    options = parse(argv)
    device = torch.device(options.device)
    every = [case for part in PARTS for case in part.cases(device, options.quick)]
    chosen = [case for case in every if case.kind in options.kinds]
    bench = Bench(device, chosen, options.quick, options.repeats)
    try:
        bench.run()
    except Disagreement as e:
        print(f"\nbench: no speed is reported, results are wrong: {e}", file=sys.stderr)
        return 1
    record = bench.record()
    if options.update:
        record = updated(json.loads(options.update.read_text(encoding="utf-8")), record, options.kinds)
    print(report.markdown(record))
    for path in report.write(record, options.out, f"bench-{report.slug(record)}"):
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
