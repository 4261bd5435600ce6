"""What the processes of `test_lamina_decoder.py` run: `torchrun -m tests.lamina_scenarios OUT`, all of one world size.

Rank 0 writes a JSON of each scenario's name and what came of it; the test compares.
"""

import functools
import json
import sys
import time
from dataclasses import asdict, dataclass, field

import pytest
import torch
import torch.distributed as dist

from attnlab.lamina import DisaggregatedDecoder, ModelWorker, SplitPlan, WorkerError, run
from attnlab.lamina.slices import Slices

VOCAB = 61  # of tests.hf_models, which is imported where a model is built: transformers takes seconds
STEPS = 64
SEEDS = {  # of prompts whose greedy tokens are never near ties
    ("llama", 4, 2): 11,
    ("llama", 8, 1): 8,
    ("llama", 16, 2): 1,
    ("llama", 4, 4): 5,
    ("mistral", 4, 2): 3,
    ("qwen3", 8, 1): 1,
}


@dataclass(frozen=True)
class Ask:
    """A request: the length of its prompt, how many tokens, and the steps before which it joins and leaves."""

    prompt: int
    new: int = STEPS
    joins: int = 0
    leaves: int | None = None


@dataclass(frozen=True)
class Scenario:
    plan: SplitPlan
    replicas: int = 1
    kind: str = "llama"
    heads: tuple[int, int] = (4, 2)  # query heads, KV heads
    asks: tuple[Ask, ...] = (Ask(5), Ask(1), Ask(13), Ask(21))
    page_size: int = 8
    options: dict = field(default_factory=dict)  # of `run`
    dtype: torch.dtype = torch.float32

    @property
    def world(self):
        return self.replicas + self.plan.shards

    def model(self):
        return model_of(self.kind, *self.heads, self.dtype)

    def prompt(self, ask):
        """The same ids for all prompts of a length and model."""
        seed = SEEDS.get((self.kind, *self.heads), 0)
        g = torch.Generator().manual_seed(1000 * seed + ask.prompt)
        return torch.randint(1, VOCAB, (ask.prompt,), generator=g).tolist()


def second_best(logits):
    return logits.topk(2).indices[:, 1]


RAGGED = (
    Ask(5, leaves=9),
    Ask(17),
    Ask(1, 1),
    Ask(2, 30, joins=3),
    Ask(11, 20, joins=9),
    Ask(9, joins=12, leaves=50),
    Ask(3, 1, joins=30),
)
SEQUENCE = functools.partial(SplitPlan, "sequence", block=4)
SCENARIOS = {
    "2 head": Scenario(SplitPlan("head", 1), asks=RAGGED),
    "2 request": Scenario(SplitPlan("request", 1), heads=(8, 1)),
    "2 sequence": Scenario(SEQUENCE(1), heads=(4, 4), kind="qwen3"),
    "2 one request": Scenario(SplitPlan("head", 1), asks=(Ask(1),)),
    "3 head": Scenario(SplitPlan("head", 2), asks=RAGGED),
    "3 head, G 1": Scenario(SplitPlan("head", 2, sizes=(1, 3)), heads=(4, 4), kind="qwen2"),
    "3 head, G 8": Scenario(SplitPlan("head", 2), heads=(16, 2)),
    "3 head, layers without rope": Scenario(SplitPlan("head", 2), kind="smollm3"),
    "3 head, one without": Scenario(SplitPlan("head", 2, sizes=(0, 2)), kind="mistral"),
    "3 request": Scenario(SplitPlan("request", 2), asks=RAGGED, heads=(4, 4)),
    "3 request, G 8": Scenario(SplitPlan("request", 2, sizes=(1, 3)), heads=(8, 1)),
    "3 sequence": Scenario(SEQUENCE(2), asks=RAGGED),
    "3 sequence, G 8": Scenario(SEQUENCE(2, sizes=(1, 3)), heads=(8, 1), kind="qwen3"),
    "3 sequence, one without": Scenario(SEQUENCE(2, sizes=(1, 0))),
    "3 double": Scenario(SEQUENCE(2), asks=(Ask(5, 12), Ask(1, 12)), dtype=torch.float64),
    "3 room for two": Scenario(SplitPlan("head", 2), page_size=4, options={"capacity": 160}),
    "3 replicas 2": Scenario(SplitPlan("head", 1), 2, asks=RAGGED),
    "4 replicas 2, head": Scenario(SplitPlan("head", 2), 2, asks=RAGGED),
    "4 replicas 2, request": Scenario(SplitPlan("request", 2), 2, heads=(4, 4)),
    "4 replicas 2, sequence": Scenario(SEQUENCE(2), 2, heads=(8, 1), asks=RAGGED),
    "4 replicas 3": Scenario(SplitPlan("request", 1), 3, kind="qwen3", asks=RAGGED),
    "4 replicas 3, fewer requests than batches": Scenario(SplitPlan("head", 1), 3, asks=(Ask(5), Ask(2))),
    "3 sampled": Scenario(SplitPlan("head", 1), 2, asks=(Ask(5, 12), Ask(1, 9)), options={"sample": second_best}),
    "2 end of sequence": Scenario(SplitPlan("head", 1), options={"eos": (7, 30)}),
    "4 sequence": Scenario(SEQUENCE(3, sizes=(2, 1, 1)), heads=(4, 4)),
}


def build(*args, **changes):
    from tests import hf_models

    return hf_models.build(*args, **changes)


@functools.lru_cache
def model_of(kind, heads, kv_heads, dtype):
    torch.set_num_threads(1)
    return build(kind, num_attention_heads=heads, num_key_value_heads=kv_heads).to(dtype)


def play(scenario, decoder):
    """Step through a scenario: `(step, token)` of every ask, and the decoder's counters."""
    found, ids, step = {}, {}, 0
    while decoder.requests or len(ids) < len(scenario.asks):
        for i, ask in enumerate(scenario.asks):
            if ask.joins == step:
                ids[i] = decoder.submit(scenario.prompt(ask), ask.new)
                found[ids[i]] = []
            if ask.leaves == step:
                decoder.remove(ids[i])
        for id, token in decoder.step():
            found[id].append((step, token))
        step += 1
    stats = asdict(decoder.stats())
    return {"tokens": [found[ids[i]] for i in range(len(ids))], "bytes": stats["bytes"], "decoded": stats["decoded"]}


def overlap(decoder):
    """One request, so that attention is free when a q comes, and k and v that take long on any machine."""
    decoder.submit([1] * 100, 12)
    decoder.step()
    before = decoder.stats()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slices, "key_value", slow(Slices.key_value))
        while decoder.requests:
            decoder.step()
    stats = decoder.stats().since(before)
    return {"overlap": stats.overlap, "communication": stats.communication, "busy": stats.attention_busy}


def slow(compute):
    def computed(*args):
        time.sleep(0.05)
        return compute(*args)

    return computed


BAD = {
    "no tokens": lambda d: d.submit([], 3),
    "no such token": lambda d: d.submit([1, VOCAB], 3),
    "a negative token": lambda d: d.submit([-1], 3),
    "text": lambda d: d.submit("hello", 3),
    "no new tokens": lambda d: d.submit([1], 0),
    "too long for the model": lambda d: d.submit([1] * 200, 58),
    "no room ever": lambda d: d.submit([1] * 60, 42),
    "no such request": lambda d: d.remove(99),
    "one bad prompt of two": lambda d: d.generate([[1], []], 3),
    "no function": lambda d: DisaggregatedDecoder(d.group, d.model, sample=3),
    "no ids": lambda d: DisaggregatedDecoder(d.group, d.model, eos="end"),
    "no capacity": lambda d: DisaggregatedDecoder(d.group, d.model, capacity=0),
    "another model": lambda d: DisaggregatedDecoder(d.group, build("gpt_oss")),
    "a replica at the leader": lambda d: ModelWorker(d.group, d.model),
    "others under way": lambda d: (d.submit([1], 3), d.generate([[1]], 3)),
}


def bad_input(decoder):
    """The error of each call; none of them leaves a trace, and the decoder goes on."""
    found = {}
    for name, call in BAD.items():
        try:
            call(decoder)
        except (ValueError, TypeError) as e:
            found[name] = f"{type(e).__name__}: {e}"
    left = [(r.tokens, r.remaining) for r in decoder.requests]
    decoder.remove(decoder.requests[0].id)
    made = decoder.generate([SCENARIOS["2 head"].prompt(Ask(n)) for n in (5, 1)], 7)
    decoder.close()
    try:
        decoder.step()
    except RuntimeError as e:
        found["closed"] = f"{type(e).__name__}: {e}"
    return {"errors": found, "left": left, "made": made, "empty": decoder.requests == ()}


def refused(make, plan, replicas=1):
    """What a decoder that cannot be made says, on the leader."""
    try:
        run(make, plan, lambda decoder: None, replicas=replicas)
    except (ValueError, TypeError, WorkerError) as e:
        return f"{type(e).__name__}: {e}"
    return "made"


def sampling_alone():
    """The leader samples, the other replica does not."""
    sample = None if dist.get_rank() else second_best
    try:
        run(build, SplitPlan("head", 1), lambda decoder: None, replicas=2, sample=sample)
    except (ValueError, WorkerError) as e:
        return f"{type(e).__name__}: {e}"
    return "made"


def unlike():
    return build(num_hidden_layers=2 + int(dist.get_rank() == 0))


def trained():
    model = build()
    if dist.get_rank():
        model.lm_head.weight.data += 0.001
    return model


OTHERS = {
    2: {
        "overlap": lambda: run(build, SplitPlan("head", 1), overlap, trace=True),
        "bad input": lambda: run(SCENARIOS["2 head"].model, SplitPlan("head", 1), bad_input, eos=(), capacity=100),
        "gpt_oss": lambda: refused(lambda: build("gpt_oss"), SplitPlan("head", 1)),
    },
    3: {
        "too many shards": lambda: refused(lambda: build(num_key_value_heads=1), SplitPlan("head", 2)),
        "heads": lambda: refused(build, SplitPlan("head", 2, sizes=(1, 2))),
        "unlike replicas": lambda: refused(unlike, SplitPlan("head", 1), replicas=2),
        "unlike weights": lambda: refused(trained, SplitPlan("head", 1), replicas=2),
        "unlike sampling": sampling_alone,
        "world": lambda: refused(build, SplitPlan("head", 3)),
    },
    4: {},
}


def main(out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world, found = dist.get_world_size(), {}
    for name, scenario in SCENARIOS.items():
        if scenario.world == world:
            found[name] = attempt(
                name,
                lambda scenario=scenario: run(
                    scenario.model,
                    scenario.plan,
                    functools.partial(play, scenario),
                    replicas=scenario.replicas,
                    page_size=scenario.page_size,
                    **{"eos": (), **scenario.options},
                ),
            )
    for name, call in OTHERS[world].items():
        found[name] = attempt(name, call)
    if dist.get_rank() == 0:
        with open(out, "w", encoding="utf-8") as f:
            json.dump(found, f)
    dist.destroy_process_group()


def attempt(name, call):
    print(
        f"{time.monotonic():.1f} rank {dist.get_rank()}: {name}", file=sys.stderr
    )  # read when a start runs out of time
    try:
        return call()
    except Exception as e:
        return {"error": f"{type(e).__name__}: {e}"}


if __name__ == "__main__":
    main(*sys.argv[1:])
