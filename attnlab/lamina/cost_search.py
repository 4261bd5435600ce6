"""The best number of batches, degrees of parallelism and devices for some traffic."""

import collections
import itertools
from collections.abc import Iterable

from ..dispatch import check_int
from .catalogue import check_number
from .cost import CostModel, _device
from .hardware import Hardware
from .traffic import Traffic

Pair = tuple[str | Hardware, str | Hardware]
AIMS = ("tokens_per_dollar", "tokens_per_second")


def ranked(
    cost: CostModel, traffic: float | Traffic, *, budget: float | None = None, pairs: Iterable[Pair] | None = None,
    batches: Iterable[int] = (1, 2, 3, 4), devices: int = 32, token_time: float | None = None,
    by: str = "tokens_per_dollar",
) -> list[CostModel]:  # fmt: skip
    """Every system that can serve `traffic` (or a context length) within the limits, the best first.

    Args:
        cost: whose model and options all of them have.
        budget: dollars per hour; None: what `cost` costs.
        pairs: `(compute, memory)` devices to try, as names or `Hardware`; None: those of `cost`.
        batches: numbers of rotated batches to try.
        devices: most devices of either kind.
        token_time: most seconds between two tokens of a request at the full batch; None: any.
        by: `"tokens_per_dollar"` or `"tokens_per_second"`; ties go to the lower price.

    Raises:
        ValueError: naming the argument, or that none fits and why.
    """
    fn = "ranked"
    budget = cost.price if budget is None else check_number(fn, "budget", budget)
    check_int(fn, "devices", devices, 1)
    limit = None if token_time is None else check_number(fn, "token_time", token_time)
    if by not in AIMS:
        raise ValueError(f"{fn}: by must be {' or '.join(AIMS)}, got {by!r}")
    counts, kinds = list(batches), [(cost.compute, cost.memory)] if pairs is None else list(pairs)
    found: list[CostModel] = []
    reasons: collections.Counter[str] = collections.Counter()
    for (compute, memory), n in itertools.product(kinds, counts):
        check_int(fn, "batches", n, 1)
        replicas, sides = max(1, n - 1), (_device(fn, compute), _device(fn, memory))
        for a, b in itertools.product(range(replicas, devices + 1, replicas), range(1, devices + 1)):
            if a // replicas * sides[0].memory * (1 - cost.reserve) < cost.model.weights:
                reasons["weights do not fit"] += 1
                continue
            made = cost.with_options(compute=sides[0], memory=sides[1], dop=(a, b), batches=n)
            if made.price > budget:
                reasons["over the budget"] += 1
            elif made.batch_limit(traffic) < n:
                reasons["fewer than a request a batch fits"] += 1
            elif limit is not None and made.iteration_time(made.batch_limit(traffic), traffic) > limit:
                reasons["too slow a token"] += 1
            else:
                found.append(made)
    if not found:
        why = ", ".join(f"{count}: {reason}" for reason, count in reasons.items())
        raise ValueError(f"{fn}: no system serves this within ${budget:.2f} an hour; {why or 'none to try'}")
    return sorted(found, key=lambda made: (-getattr(made, by)(traffic), made.price))
