"""Processes of `test_lamina_decoder.py` that kill themselves in mid-step, one after the other; the rest go on.

They have torchrun's environment variables, but are not started by torchrun, which would end the others too.
"""

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

from attnlab.lamina import SplitPlan, WorkerError, attention_worker, run, slices
from tests.lamina_scenarios import Ask, Scenario


class Life(NamedTuple):
    """A group, and the rank in it that dies in a call of a function."""

    plan: SplitPlan
    replicas: int
    victim: int | None = None
    role: str = ""


SCENARIO = Scenario(SplitPlan("head", 1), asks=(Ask(5), Ask(1, 20), Ask(13), Ask(21, 12)))
LIVES = (
    Life(SplitPlan("sequence", 2, block=4), 2, 3, "attention"),
    Life(SplitPlan("head", 1), 2, 1, "model"),
    Life(SplitPlan("request", 1), 1),
)
CALLS = 100  # the one of its attention, or of its k and v projections, that the victim dies in


def die_in(module, name, out):
    """Let this process be killed within its `CALLS`-th call of a function."""
    whole, calls = getattr(module, name), []

    def wrapper(*args, **kwargs):
        calls.append(None)
        if len(calls) == CALLS:
            out.write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)

    setattr(module, name, wrapper)


def lives(folder, ports):
    """What became of a process: its errors, and on the leader the tokens of each request."""
    out = Path(folder, os.environ["RANK"])  # where it writes the time of its death
    made = {}  # of each request's first id, all tokens
    waiting = [(i, SCENARIO.prompt(ask), ask.new) for i, ask in enumerate(SCENARIO.asks)]
    errors = []
    for life, port in zip(LIVES, ports):
        rank = int(os.environ["RANK"])
        if rank == life.victim:
            die_in(
                *((attention_worker, "split_decode") if life.role == "attention" else (slices.Slices, "key_value")), out
            )
        names = {}

        def body(decoder, waiting=waiting, names=names):
            names.update({decoder.submit(prompt, new): name for name, prompt, new in waiting})
            while decoder.requests:
                for id, token in decoder.step():
                    made.setdefault(names[id], []).append(token)

        os.environ |= {"WORLD_SIZE": str(life.replicas + life.plan.shards), "MASTER_PORT": str(port)}
        try:
            run(SCENARIO.model, life.plan, body, replicas=life.replicas, timeout=5.0, page_size=4, eos=())
        except WorkerError as e:
            about = {"at": time.monotonic(), "text": str(e), "rank": e.rank, "role": e.role}
            errors.append(about | {"made": {name: len(tokens) for name, tokens in made.items()}})
            waiting = [(names[r.id], r.tokens, r.remaining) for r in e.requests]
            for name, tokens, _ in waiting:  # the broken step may have made tokens that it did not return
                made[name] = list(tokens[SCENARIO.asks[name].prompt :])
            os.environ["RANK"] = str(rank - (rank > life.victim))
    return errors, [made[name] for name in sorted(made)]
