"""Groups of real processes: who is who, commands, tensors, and what becomes of the others when one is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from attnlab.lamina import Group, SplitPlan
from tests.lamina_bodies import again, join, lose, rebuild, slow, talk, unlike, visit
from tests.lamina_processes import Failure, free_port, good, run

TIMEOUT = 2.0  # of groups that lose a process
LATE = TIMEOUT + 8.0  # no error may take longer, on a machine with better things to do


def test_roles_commands_replies_and_tensors() -> None:
    leader, replica, *workers = good(run(talk, 4))
    assert leader["who"] == (0, 4, "model", 0, None, (0, 1), (2, 3))
    assert replica["who"] == (1, 4, "model", 1, None, (0, 1), (2, 3))
    assert [worker["who"][2:5] for worker in workers] == [("attention", None, 0), ("attention", None, 1)]
    assert leader["replies"] == [{"rank": rank, "long": "y" * 9000} for rank in (1, 2, 3)]
    for other in (replica, *workers):
        assert other["commands"] == [{"op": "short"}, {"op": "long", "text": "x" * 20_000}, {"op": "close"}]
    sent = leader["report"]["sent"]
    assert sent["q"] == 3 * 10 * 4 and sent["kv"] == 3 * 7 * 2 and "lse" not in sent
    assert workers[0]["report"]["received"]["q"] == 40 and workers[0]["report"]["received"]["kv"] == 14
    assert leader["report"]["received"]["command"] > 3 * 9000 and replica["report"]["received"]["command"] > 20_000
    assert set(replica["report"]["waited"]) == {"q", "kv"}


def test_many_sends_ahead_of_a_slow_receiver() -> None:
    """More messages and bytes than may be on their way wait for the receiver; none is lost or overwritten."""
    good(run(slow, 2))


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP", "raise", "leave"])
def test_everybody_learns_who_was_lost(how: str) -> None:
    """Rank 0 waits for rank 2, rank 1 waits for rank 0: both must name rank 2."""
    victims = (2,) if how.startswith("SIG") else ()
    results = run(lose, 3, how, 2, {0: 2, 1: 0}, TIMEOUT, lost=victims)
    text = {
        "SIGKILL": "rank 2 (attention) is gone: its connection closed",
        "SIGSTOP": "rank 2 (attention) does not answer",
        "raise": "rank 2 (attention) raised KeyError: 'own fault'",
        "leave": "rank 2 (attention) left before the group was closed",
    }[how]
    for rank, waited_for in ((0, "2 (attention)"), (1, "0 (model)")):
        seconds, message, culprit, role = good(results)[rank] if how != "raise" else results[rank]
        assert message.startswith(text), message
        assert f"rank {rank} ({'model' if rank == 0 else 'attention'}) had waited " in message
        assert message.endswith(f" s for q of rank {waited_for}")
        assert (culprit, role) == (2, "attention")
        assert seconds < LATE
    if how == "raise":
        assert isinstance(results[2], Failure) and results[2].kind == "KeyError"


@pytest.mark.parametrize("how", ["SIGKILL", "raise"])
def test_idle_workers_notice_that_the_leader_is_gone(how: str) -> None:
    results = run(lose, 3, how, 0, {}, 1000.0, lost=(0,) if how == "SIGKILL" else ())
    for seconds, message, culprit, role in results[1:]:
        assert message.startswith("rank 0 (model) " + ("is gone" if how == "SIGKILL" else "raised KeyError"))
        assert (culprit, role) == (0, "model")
        assert seconds < LATE


def test_an_idle_worker_notices_that_another_one_is_gone() -> None:
    results = run(lose, 3, "SIGKILL", 2, {}, 1000.0, lost=(2, 0))
    assert results[1][1].startswith("rank 2 (attention) is gone") and results[1][0] < LATE


def test_a_stopped_leader_stops_nobody_else() -> None:
    results = run(lose, 3, "SIGSTOP", 0, {1: 0, 2: 1}, TIMEOUT, lost=(0,))
    for seconds, message, culprit, role in good(results)[1:]:
        assert message.startswith("rank 0 (model) does not answer")
        assert (culprit, role) == (0, "model") and seconds < LATE


def test_the_survivors_make_a_new_group() -> None:
    """After a failure, and after a clean close, in the same processes: another world, another port."""
    results = good(run(rebuild, 3, free_port(), lost=(2,)))
    assert results[:2] == [("rank 2 (attention) is gone: its connection closed", 7.0)] * 2


def test_groups_follow_one_another_on_one_port() -> None:
    assert good(run(again, 2)) == [[float(n) for n in range(12)]] * 2


def test_a_process_group_that_is_up_is_used_and_left_up() -> None:
    assert good(run(visit, 2)) == [(True, 3.0)] * 2


def test_plans_must_be_the_leaders() -> None:
    leader, worker = run(unlike, 2)
    assert worker.kind == "ValueError"
    assert worker.text.startswith("Group: plan and replicas must be the leader's {") and "'block': 64" in worker.text
    assert leader.kind == "WorkerError" and "rank 1 (attention) raised ValueError: Group: plan" in leader.text


def test_processes_that_do_not_come_up() -> None:
    result = run(join, 2, lost=(1,))[0]
    assert result.kind == "WorkerError"
    assert result.text.startswith("rank 0 (model) could not join the other 1 within 1.0 s: ")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    values = dict(RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    "plan, options, text",
    [
        (
            SplitPlan("head", 2),
            dict(replicas=3),
            "Group: the world must have 5 processes, for replicas 3 and 2 shards, got 4",
        ),
        (SplitPlan("head", 3), dict(replicas=0), "Group: replicas must be a positive int, got 0"),
        (SplitPlan("head", 3), dict(timeout=0), "Group: timeout must be a positive number of seconds, got 0"),
        (SplitPlan("head", 3), dict(timeout=1e999), "Group: timeout must be a positive number of seconds, got inf"),
        (SplitPlan("head", 3), dict(join_timeout=0), "Group: join_timeout must be a positive number of seconds, got 0"),
        (SplitPlan("head", 3), dict(device="meta"), "Group: device must be on cpu (gloo) or cuda (NCCL), got meta"),
        (SplitPlan("head", 3), dict(device="tpu9x"), "Group: device must be a torch.device or its name, got 'tpu9x'"),
        (SplitPlan("head", 3), dict(trace=1), "Group: trace must be a bool, got 1"),
        ("head", {}, "Group: plan must be a SplitPlan, got str"),
    ],
)  # fmt: skip
def test_bad_arguments(environment: None, plan: SplitPlan, options: dict, text: str) -> None:
    with pytest.raises((ValueError, TypeError)) as e:
        Group(plan, **{"device": "cpu", **options})
    assert str(e.value) == text


def test_no_torchrun_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError) as e:
        Group(SplitPlan("head", 2), device="cpu")
    assert str(e.value) == (
        "Group: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set: "
        "start every process with torchrun --nproc-per-node 3 script.py, or set them in each"
    )


SCRIPT = """
import torch
from attnlab.lamina import Group, SplitPlan, WorkerError

group = Group(SplitPlan("head", 1), timeout=60.0, device="cpu")
if group.rank == 0:
    group.link.send(torch.ones(3), 1, "q")
    group.link.receive((1,), torch.float32, 1, "token").wait()
else:
    group.link.send(group.link.receive((3,), torch.float32, 0, "q").wait()[:1], 0, "token")
    try:
        group.next_command()
    except WorkerError as e:
        print(e)
"""


def test_torchrun_and_a_leader_that_ends_without_close(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).resolve().parent.parent
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    done = subprocess.run(
        [*torchrun, str(free_port()), str(tmp_path / "script.py")],
        env=os.environ | dict(PYTHONPATH=str(root), OMP_NUM_THREADS="1"),
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "rank 0 (model) ended without closing its group"
