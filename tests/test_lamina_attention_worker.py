"""Attention workers, driven by a model side of random numbers, give attention over the whole history."""

import pytest
import torch

from attnlab.lamina import SplitPlan
from tests.lamina_bodies import Facts, attend
from tests.lamina_processes import Failure, good, run

# Requests join and leave, batches are ragged or empty, and a page or a block of the plan fills on the way.
SCRIPT = [
    ("prefill", 1, 5, 0, None),
    ("prefill", 2, 17, 0, None),
    ("round", [], [[1, 2], []]),
    ("prefill", 3, 1, 0, None),
    ("round", [], [[1], [2, 3]]),
    ("round", [2], [[3, 1]]),
    ("round", [], []),
    ("prefill", 2, 33, 0, None),
    *[("round", [], [[2], [1, 3]])] * 4,
    ("round", [1, 2, 3], []),
]


def scripted(placement: dict[int, tuple[int, int | None]]) -> list[tuple]:
    """SCRIPT with each request's replica and shard."""
    return [(*step[:3], *placement[step[1]]) if step[0] == "prefill" else step for step in SCRIPT]


def check_order(results: list[dict]) -> None:
    """On every pair and direction receives were posted as the other side sends: NCCL has no tags."""
    for source, sender in enumerate(results):
        for target, receiver in enumerate(results):
            sent = [rest for to, *rest in sender["log"]["sent"] if to == target]
            posted = [rest for of, *rest in receiver["log"]["posted"] if of == source]
            assert sent == posted, f"rank {source} to rank {target}"


def check_bytes(results: list[dict], facts: Facts, replicas: int) -> None:
    """What one side sent is what the other received; by head and by request the paper's formula holds exactly."""
    sent, received = {}, {}
    for result in results:
        for total, name in ((sent, "sent"), (received, "received")):
            for kind, size in result["report"][name].items():
                total[kind] = total.get(kind, 0) + size
    for total in (sent, received):
        total.pop("command")
    assert sent == received
    tokens = sum(len(ids) for op, *rest in SCRIPT if op == "round" for ids in rest[1])
    group, size = facts.heads // facts.kv_heads, facts.dtype.itemsize * facts.heads * facts.head_dim * facts.layers
    if "lse" not in sent:
        assert group * (sent["q"] + sent["kv"] + sent["out"]) == (2 * group + 2) * size * tokens


CASES = {
    "head": (SplitPlan("head", 2), 1, Facts(), {}),
    "head, an empty shard": (SplitPlan("head", 3, (2, 0, 2)), 2, Facts(heads=4, kv_heads=4), {}),
    "request": (SplitPlan("request", 2), 2, Facts(heads=8, kv_heads=1, dtype=torch.bfloat16), {}),
    "request, an idle shard": (SplitPlan("request", 3), 1, Facts(), {}),
    "sequence": (SplitPlan("sequence", 2, block=4), 1, Facts(scale=0.3, dtype=torch.float16), {}),
    "sequence, uneven": (SplitPlan("sequence", 3, (2, 0, 1), block=2), 2, Facts(heads=8, kv_heads=1), {}),
    "sequence, one": (SplitPlan("sequence", 1), 1, Facts(), {"backend": "reference"}),
    "double": (SplitPlan("sequence", 2, block=4), 1, Facts(dtype=torch.float64, layers=1), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_over_the_whole_history(case: str) -> None:
    plan, replicas, facts, options = CASES[case]
    first, second = (0, 1) if plan.by == "request" else (None, None)
    script = scripted({1: (0, first), 2: (replicas - 1, second), 3: (0, first)})
    options = dict(page_size=4) | options
    results = run(attend, replicas + plan.shards, plan, replicas, facts, script, **options)
    check_order(good(results))
    check_bytes(results, facts, replicas)


def test_a_shard_without_work_is_left_alone() -> None:
    plan = SplitPlan("request", 2)
    script = [("prefill", 1, 5, 0, 1), ("round", [], [[1]])]
    idle = good(run(attend, 3, plan, 1, Facts(), script))[1]
    assert idle["log"] == {"sent": [], "posted": []}
    assert idle["report"]["busy"] == {}


def test_previous_tokens_are_attended_before_the_new_key_is_sent() -> None:
    """The worker's events and the model's clock are of one machine."""
    script = [("prefill", 1, 30, 0, None), ("round", [], [[1]])]
    model, worker = good(run(attend, 2, SplitPlan("head", 1), 1, Facts(), script, pause=0.5))
    events = {(name, k, j): (start, end) for name, j, k, start, end in worker["report"]["events"]}
    for (k, j), sent in model["kv_sent"].items():
        assert events["attend", k, j][0] < sent < events["append", k, j][1]
    assert set(worker["report"]["busy"]) == {"attend", "append"}


def test_a_full_pool_fails_everywhere() -> None:
    script = [("prefill", 1, 8, 0, None), ("round", [], [[1]])]
    model, worker = run(attend, 2, SplitPlan("head", 1), 1, Facts(), script, page_size=4, capacity=10)
    assert isinstance(model, Failure) and isinstance(worker, Failure)
    assert worker.kind == "MemoryError"
    assert worker.text == "KVPool: request 1 needs 1 more pages of 4 tokens, 0 of 2 are free"
    assert model.kind == "WorkerError" and model.values["rank"] == 1 and model.values["role"] == "attention"
    assert "rank 1 (attention) raised MemoryError: KVPool: request 1 needs" in model.text


@pytest.mark.parametrize(
    "options, text",
    [
        (dict(page_size=0), "AttentionWorker: page_size must be a positive int, got 0"),
        (dict(capacity=-1), "AttentionWorker: capacity must be a positive int, got -1"),
        (dict(capacity=63), "AttentionWorker: capacity must be at least page_size 64, got 63"),
        (dict(backend="cuda9"), "AttentionWorker: backend must be one of 'auto', "),
    ],
)
def test_bad_options(options: dict, text: str) -> None:
    from types import SimpleNamespace

    from attnlab.lamina import AttentionWorker

    group = SimpleNamespace(shard=0, models=(0,), workers=(1,), rank=1, link=None)
    with pytest.raises(ValueError) as e:
        AttentionWorker(group, **options)
    assert str(e.value).startswith(text)
    with pytest.raises(ValueError, match=r"attention worker \(ranks \[1\]\), got rank 0"):
        AttentionWorker(SimpleNamespace(shard=None, workers=(1,), rank=0))
