"""`python -m attnlab.evals.readme`: rewrite the measured parts of README.md from the committed records.

With `--measure`, run what measures them first and commit the records to evals/results/. `--check` only says whether
README.md is up to date.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from attnlab.evals import report
from attnlab.evals.measure import ROOT

RESULTS = ROOT / "evals" / "results"
README = ROOT / "README.md"
PART = re.compile(r"(<!-- (accuracy|bench|demo|testbed|wave) begin[^\n]*-->\n).*?(<!-- \2 end -->)", re.DOTALL)


def parts(results: pathlib.Path) -> dict[str, str]:
    """The generated parts by name, from the records in `results`."""
    makers = {"accuracy": _accuracy, "bench": _bench, "demo": _demo, "testbed": _accuracy, "wave": _wave}
    found = {name: sorted(results.glob(f"{name}-*.json"), key=_cpu_first) for name in makers}
    return {name: "\n".join(map(make, found[name])) for name, make in makers.items()}


def render(text: str, results: pathlib.Path) -> str:
    """`text` with its marked parts replaced. Raises ValueError where a part has no markers."""
    made = parts(results)
    found = {match[2] for match in PART.finditer(text)}
    if missing := sorted(set(made) - found):
        raise ValueError(f"README.md has no markers for: {', '.join(missing)}")
    return PART.sub(lambda match: f"{match[1]}{made[match[2]]}{match[3]}", text)


def _cpu_first(path: pathlib.Path) -> tuple[bool, str]:
    return not path.stem.endswith("-cpu"), path.stem


def _load(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _bench(path: pathlib.Path) -> str:
    return report.markdown(_load(path))


def _accuracy(path: pathlib.Path) -> str:
    from attnlab.evals import accuracy

    return f"![{accuracy.CAPTION}](evals/results/{path.stem}.png)\n\n{accuracy.markdown(_load(path))}"


def _demo(path: pathlib.Path) -> str:
    from attnlab.evals import demo

    record = _load(path)
    return f"![{demo.CAPTION}](evals/results/{path.stem}.png)\n\n{demo.markdown(record)}"


def _wave(path: pathlib.Path) -> str:
    from attnlab.evals import wave_quality

    return wave_quality.markdown(_load(path))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="readme", description=__doc__)
    parser.add_argument("--measure", action="store_true", help="run benchmark, demo and wave_quality first, 20 minutes")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if README.md is out of date")
    options = parser.parse_args(argv)
    if not README.exists():
        print("readme: README.md lies in a checkout, and this is an installed package", file=sys.stderr)
        return 2
    if options.measure:
        from attnlab.evals import accuracy, bench, demo, wave_quality

        for made in (bench, demo, accuracy, wave_quality):
            if status := made.main(["--out", str(RESULTS)]):
                return status
    old = README.read_text(encoding="utf-8")
    new = render(old, RESULTS)
    if options.check:
        if old != new:
            print("readme: README.md is out of date: python -m attnlab.evals.readme", file=sys.stderr)
        return int(old != new)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
