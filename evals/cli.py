"""`attnlab-eval`: long-context accuracy of sparse attention, on the model that ships or on any by path."""

import argparse
import importlib.util
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from attnlab.evals.harness.errors import RunError, UsageError, unknown
from attnlab.evals.harness.suites import SUITES


class _Parser(argparse.ArgumentParser):
    """Its complaints are UsageErrors, so that they are one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 2 for what was typed wrong or is not there, 1 for a run that stopped midway, one line each."""
    try:
        options = parser().parse_args(argv)
        options.act(options)
    except (UsageError, RunError) as error:
        print(f"attnlab-eval: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        print("attnlab-eval: interrupted; --resume goes on", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    top = _Parser(prog="attnlab-eval", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _run_options(commands.add_parser("run", help="run a suite, or some tasks, under some methods"))
    listing = commands.add_parser("list", help="suites, tasks, methods with their options")
    listing.set_defaults(act=_list)
    report = commands.add_parser("report", help="the table of a run, made anew from its folder")
    report.add_argument("run", type=Path, metavar="RUN")
    report.add_argument("--format", help="write lm-eval's or kvpress's files into the run's folder instead")
    report.set_defaults(act=_report)
    compare = commands.add_parser("compare", help="two runs of the same prompts, sample by sample")
    compare.add_argument("runs", type=Path, nargs=2, metavar="RUN")
    compare.set_defaults(act=_compare)
    train = commands.add_parser("train-testbed", help="train the model that ships")
    train.add_argument("--preset", default="cpu", help="cpu or h200 (default cpu)")
    train.add_argument("--out", type=Path, required=True, help="folder for the model, its record and its checkpoints")
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    train.set_defaults(act=_train)
    return top


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--suite", default="quick", help=f"{', '.join(SUITES)} (default quick)")
    run.add_argument("--model", default="testbed", help="testbed, or a transformers folder (default testbed)")
    run.add_argument("--methods", help="as name:option=value+option=value, separated by commas (default the suite's)")
    run.add_argument("--out", type=Path, help="folder for the run (default runs/SUITE)")
    run.add_argument("--tasks", type=_names, help="instead of the suite's, separated by commas")
    run.add_argument("--lengths", type=_numbers, help="in tokens, instead of the suite's")
    run.add_argument("--samples", type=int, help="per task and length, instead of the suite's")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--batch", type=int, help="samples at a time (default 8, of long prompts fewer)")
    run.add_argument("--data-dir", type=Path, help="folder of the data files that some tasks need")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    run.add_argument("--dtype", default="auto", help="auto, float32, float16 or bfloat16")
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, maybe with more methods")
    run.set_defaults(act=_run)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers separated by commas, got {text!r}") from None


def _run(options: argparse.Namespace) -> None:
    """What can be wrong is found before the first forward, and what is quick to find, before the model is loaded."""
    if missing := [name for name in ("transformers", "matplotlib") if importlib.util.find_spec(name) is None]:
        raise UsageError(f"{' and '.join(missing)} not installed: pip install 'attnlab[evals]'")
    from attnlab.evals import methods, tasks
    from attnlab.evals.harness import folder, results, runner
    from attnlab.evals.methods import subject as models

    if options.suite not in SUITES:
        raise unknown("suite", options.suite, SUITES)
    suite = SUITES[options.suite]
    out = options.out or Path("runs", suite.name)
    folder.look(out, resume=options.resume)
    chosen = methods.parse(suite.methods if options.methods is None else options.methods)
    made = [tasks.make(name, options.data_dir) for name in (suite.tasks if options.tasks is None else options.tasks)]
    subject = models.load(options.model, options.device, options.dtype)
    lengths = suite.lengths_for(subject) if options.lengths is None else options.lengths
    samples = suite.samples if options.samples is None else options.samples
    plan = runner.Plan(subject, made, lengths, chosen, samples, options.seed, options.batch)
    plan = plan.checked(skip=options.methods is None)
    for task, skipped in plan.skips.items():
        for reason in skipped.values():
            print(f"attnlab-eval: left out of {task}: {reason}", file=sys.stderr)
    with folder.RunFolder(out, runner.config(plan, suite.name, options.data_dir), resume=options.resume) as held:
        spent = runner.run(plan, held)
        runner.finish(plan, held, spent)
    print(results.report(out))
    print(
        f"{spent.samples} samples in {spent.wall_s:.1f} s, {spent.model_s:.1f} s of them in the model; "
        f"{spent.prefills} prefills of contexts, shared by methods. All of it is in {out}"
    )


def _list(options: argparse.Namespace) -> None:
    from attnlab.evals.methods import METHODS, describe
    from attnlab.evals.tasks import TASKS

    print("Suites (--suite)")
    for suite in SUITES.values():
        print(f"  {suite.name:10} {suite.about}\n{'':13}{', '.join(suite.tasks)}")
    print("\nTasks (--tasks)")
    for name, entry in TASKS.items():
        print(f"  {name:22} {entry.about}")
    print("\nMethods (--methods name:option=value+option=value,...), options with their defaults")
    for name, kind in METHODS.items():
        print(f"  {name:22} {(inspect.getdoc(kind) or '').splitlines()[0]}")
        if options_of := describe(kind):
            print(f"{'':25}{options_of}")


def _report(options: argparse.Namespace) -> None:
    from attnlab.evals.harness import formats, results

    print(formats.write(options.run, options.format) if options.format else results.report(options.run))


def _compare(options: argparse.Namespace) -> None:
    from attnlab.evals.harness.compare import compare

    print(compare(*options.runs))


def _train(options: argparse.Namespace) -> None:
    from attnlab.evals.testbed import train

    train.main(options.preset, options.out, seed=options.seed, resume=options.resume, device=options.device)
