"""Real processes under torchrun generate what one process does, move the bytes they must, and overlap."""

import fcntl
import functools
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import lamina_processes as processes
from tests import lamina_survivors as survivors
from tests.lamina_scenarios import RAGGED, SCENARIOS, STEPS, Ask
from tests.lamina_survivors import LIVES

ROOT = Path(__file__).resolve().parent.parent
GAP = 1e-3  # between the two best logits, of about 8: some thousand roundings of float32
START_S = 180.0  # hard limits: a quiet machine takes a tenth


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder of this run of the tests, one for all its workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="module")
def started(shared):
    """`started(world)`: what its scenarios gave, from one start of torchrun, for all workers and also if it failed."""

    @functools.lru_cache
    def start(world):
        out, failed = shared / f"lamina-{world}.json", shared / f"lamina-{world}.failed"
        with open(shared / f"lamina-{world}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists() and not failed.exists():
                failed.write_text("the test that started them was broken off")
                status, _, err = torchrun(world, "-m", "tests.lamina_scenarios", str(out))
                failed.write_text(err) if status else failed.unlink()
        assert not failed.exists(), failed.read_text()
        return json.loads(out.read_text())

    return start


@pytest.fixture(scope="module", autouse=True)
def compiled_once(shared):
    """Processes keep what they compile of torch and transformers, also where the environment forbids it."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.dont_write_bytecode:
            patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
            patch.setenv("PYTHONPYCACHEPREFIX", str(shared / "pycache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def torchrun(world, *command, limit=START_S):
    """Run to the end, or kill all of it. Returns (status, stdout, stderr)."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world), *command]
    process = subprocess.Popen(
        line, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail(f"{' '.join(command)} on {world} processes: not done after {limit} s\n{process.communicate()[1]}")
    return process.returncode, out, err


def without_best(ids, logits):
    return logits.scatter(1, logits.argmax(1, keepdim=True), -torch.inf)


@functools.lru_cache
def alone(model, prompt, new, second):
    """What transformers generates, greedily or taking the second best each time."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        logits_processor=[without_best] if second else [],
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack(out.logits).topk(2 + second).values
    assert best.diff().abs().min() > GAP, "choose another seed: a near tie decides nothing"
    return out.sequences[0, len(prompt) :].tolist()


def expected(scenario, ask):
    tokens = alone(scenario.model(), tuple(scenario.prompt(ask)), ask.new, "sample" in scenario.options)
    ends = [i for i, token in enumerate(tokens, 1) if token in scenario.options.get("eos", ())]
    stay = None if ask.leaves is None else ask.leaves - ask.joins
    return tokens[: min(ends, default=None)][:stay]


@pytest.mark.parametrize("name", SCENARIOS)
def test_tokens_are_one_process_s(name, started, one_thread):
    scenario = SCENARIOS[name]
    found = started(scenario.world)[name]
    assert "error" not in found, found["error"]
    for ask, made in zip(scenario.asks, found["tokens"], strict=True):
        tokens = expected(scenario, ask)
        assert [token for _, token in made] == tokens
        if "capacity" not in scenario.options:
            assert [step for step, _ in made] == list(range(ask.joins, ask.joins + len(tokens)))


@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.plan.by != "sequence"])
def test_bytes_are_the_formula_s(name, started):
    scenario = SCENARIOS[name]
    found, (heads, kv_heads) = started(scenario.world)[name], scenario.heads
    group = heads // kv_heads
    each = (2 + 2 / group) * scenario.dtype.itemsize * heads * 8 * 3  # width, layers
    assert sum(found["bytes"][kind] for kind in ("q", "kv", "out")) == found["decoded"] * each
    assert found["bytes"].get("lse", 0) == 0
    prompts = sum(ask.prompt for ask in scenario.asks)
    assert found["bytes"]["prompt"] == prompts * 2 * kv_heads * 8 * scenario.dtype.itemsize * 3


@pytest.mark.parametrize("name", [n for n, s in SCENARIOS.items() if s.plan.by == "sequence"])
def test_bytes_by_sequence_go_to_the_shards_that_hold_some_of_it(name, started):
    scenario = SCENARIOS[name]
    found, (heads, kv_heads) = started(scenario.world)[name], scenario.heads
    size, states = scenario.dtype.itemsize * 3, 0  # of a number in every layer
    for ask, made in zip(scenario.asks, found["tokens"], strict=True):
        for i in range(len(made) - 1):  # the token at this position is new, its shard among those asked
            states += sum(n > 0 for n in scenario.plan.count(ask.prompt + i + 1))
    assert found["bytes"]["q"] == found["bytes"]["out"] == states * heads * 8 * size
    assert found["bytes"]["lse"] == states * heads * size
    assert found["bytes"]["kv"] == found["decoded"] * 2 * kv_heads * 8 * size


def test_replicas_move_the_residual_stream_alone(started):
    for name, scenario in SCENARIOS.items():
        found = started(scenario.world)[name]
        moved = found["decoded"] * 3 * 32 * 4 if scenario.replicas > 1 else 0
        assert found["bytes"].get("hidden", 0) == moved, name


def test_requests_wait_for_room(started):
    """Four of 69, 65, 77 and 85 tokens, into 40 pages of 4: two at a time, in order."""
    first = [made[0][0] for made in started(3)["3 room for two"]["tokens"]]
    assert first[:2] == [0, 0]
    assert first == sorted(first)
    assert first[2] >= STEPS - 1
    running = [(made[0][0], made[-1][0]) for made in started(3)["3 room for two"]["tokens"]]
    for step in range(running[-1][1]):
        assert sum(a < step <= b for a, b in running) <= 2


def test_the_scenarios_are_what_they_are_for():
    groups = {s.heads[0] // s.heads[1] for s in SCENARIOS.values()}
    assert groups == {1, 2, 8}
    ways = itertools.product((3, 4), ("head", "request", "sequence"))
    assert {(s.world, s.plan.by) for s in SCENARIOS.values()} >= set(ways)
    assert any(ask.joins for ask in RAGGED) and any(ask.leaves for ask in RAGGED)


def test_attention_runs_while_the_slice_computes_k_and_v(started):
    """The trace's clock is one for all processes."""
    found = started(2)["overlap"]
    assert found["overlap"] > 0.5, found
    assert 0 < found["communication"] < 1
    assert all(busy > 0 for busy in found["busy"])


WRONG = {
    "no tokens": r"submit: prompt must have at least one token, got \[\]",
    "no such token": r"submit: prompt must hold token ids in \[0, 61\), got 61",
    "a negative token": r"submit: prompt must hold token ids in \[0, 61\), got -1",
    "text": "submit: prompt must be a sequence of ints or an integer tensor of one dimension, got 'hello'",
    "no new tokens": "submit: max_new_tokens must be a positive int, got 0",
    "too long for the model": "all new tokens but the last: 257 tokens, over 256: the model's context",
    "no room ever": r"must fit the attention workers, got 60 \+ 42 tokens, of which 101 are stored, .* 1 pages of 64",
    "no such request": "remove: id must be of a request under way, got 99",
    "one bad prompt of two": "submit: prompt must have at least one token",
    "no function": "sample must be callable or None, got int",
    "no ids": "eos must be a sequence of ints .* got 'end'",
    "no capacity": "capacity must be a positive int, got 0",
    "another model": "model must be of type llama, mistral, qwen2, qwen3, smollm3, got 'gpt_oss'",
    "a replica at the leader": "joined as a replica other than the leader, got rank 0",
    "others under way": r"generate: there must be no other requests, got \[\d+\]",
    "closed": "step: the decoder is closed",
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused(name, started):
    assert re.search(WRONG[name], started(2)["bad input"]["errors"][name])


def test_what_is_refused_leaves_no_trace(started, one_thread):
    found, scenario = started(2)["bad input"], SCENARIOS["2 head"]
    assert found["errors"].keys() == WRONG.keys()
    assert found["left"] == [[[1], 3]]  # of "others under way", which was submitted in good order
    assert found["made"] == [expected(scenario, Ask(n))[:7] for n in (5, 1)]
    assert found["empty"]


@pytest.mark.parametrize(
    ("world", "name", "message"),
    [
        (2, "gpt_oss", "DisaggregatedDecoder: model must be of type llama, mistral, qwen2, qwen3, smollm3, got 'gpt"),
        (3, "too many shards", "shards must be at most the 1 KV heads, got 2"),
        (3, "heads", r"sizes must sum to the 2 KV heads, got \(1, 2\)"),
        (3, "unlike replicas", "replica 1 must run the leader's model, got layers 2 for 3"),
        (3, "unlike weights", r"replica 1 must run the leader's model, got weights \d+ for \d+"),
        (3, "unlike sampling", "replica 1 must run the leader's model, got sampled False for True"),
        (3, "world", "the world must have 4 processes, for replicas 1 and 3 shards, got 3"),
    ],
)
def test_a_decoder_that_cannot_be_made_says_why(world, name, message, started):
    assert re.search(message, started(world)[name])


def test_survivors_of_killed_workers_go_on_to_the_same_tokens(tmp_path, one_thread):
    """First an attention worker dies, then a replica; each time the others make a smaller group."""
    ports = [processes.free_port() for _ in LIVES]
    found = processes.good(processes.run(survivors.lives, 4, tmp_path, ports, lost={1, 3}, seconds=START_S))
    died = [float((tmp_path / str(rank)).read_text()) for rank in (3, 1)]
    for errors, _ in (found[0], found[2]):
        for life, when, error in zip(LIVES, died, errors, strict=False):
            assert 0 <= error["at"] - when < 10
            assert (error["rank"], error["role"]) == (life.victim, life.role)
            assert f"rank {life.victim} ({life.role})" in error["text"]
        assert len(errors) == 2
    (early, late), made = found[0]
    assert 0 < early["made"][0] < late["made"][0] < STEPS  # both on the way
    assert made == [expected(survivors.SCENARIO, ask) for ask in survivors.SCENARIO.asks]


def test_the_example_checks_itself():
    status, out, err = torchrun(
        3, "-m", "attnlab.evals.lamina", "--tokens", "8", "--plan", "request", "--replicas", "2"
    )
    assert status == 0, err
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if line[:1].islower())
    assert lines["tokens"] == "32, 4 of 4 requests the same as in one process"
    assert lines["workers"] == "2 of the model, 1 of attention, split by request"


@pytest.mark.parametrize(
    ("world", "options", "message"),
    [
        (1, [], "--replicas 1 of 1 processes leave none for attention: --nproc-per-node 2 or more"),
        (None, [], "not started by torchrun: torchrun --nproc-per-node 3 -m attnlab.evals.lamina"),
        (None, ["--tokens", "0"], "--tokens must be a positive int, got 0"),
        (None, ["--model", "/nowhere"], "--model must be a folder, /nowhere is none"),
    ],
)
def test_the_example_says_what_is_wrong_in_a_line(world, options, message, monkeypatch, capsys):
    from attnlab.evals import lamina

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit):
        lamina.main(options)
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
