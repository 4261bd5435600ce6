"""What the processes of the distributed tests do: a model side of random numbers, and ways to fail."""

import os
import signal
import time
from typing import Any, NamedTuple

import torch

from attnlab import full_attention, merge_states
from attnlab.lamina import AttentionWorker, Group, SplitPlan, WorkerError
from attnlab.lamina.link import Link
from attnlab.lamina.placement import Placement
from attnlab.lamina.protocol import runner, steps
from attnlab.testing import assert_accurate


class Facts(NamedTuple):
    """A model's, as far as attention goes."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    layers: int = 2
    dtype: torch.dtype = torch.float32
    scale: float | None = None


def tensors(facts: Facts, id: int, layer: int, tokens: int) -> tuple[torch.Tensor, ...]:
    """q, k, v `[tokens, H, D]` of a request's first tokens: the same numbers in every process."""
    found = []
    for which, heads in enumerate((facts.heads, facts.kv_heads, facts.kv_heads)):
        g = torch.Generator().manual_seed(1000 * id + 10 * layer + which)
        x = torch.randn(256, heads, facts.head_dim, generator=g)[:tokens]
        found.append(x.to(facts.dtype))
    return tuple(found)


class FakeModel:
    """One replica, which knows the script: ("prefill", id, length, replica, shard) and ("round", drop, batches)."""

    def __init__(self, group: Group, facts: Facts, pause: float = 0.0) -> None:
        self.group, self.facts, self.pause = group, facts, pause
        self.replicas = len(group.models)
        self.placement = Placement(group.plan, self.replicas, facts.heads, facts.kv_heads)
        self.kv_sent: dict[tuple[int, int], float] = {}
        self.found: list[tuple[torch.Tensor, ...]] = []

    def tell(self, message: dict) -> None:
        if self.group.rank == 0:
            self.group.command(message)
        elif self.group.next_command() != message:
            raise AssertionError("the leader's command differs from the script")

    def play(self, script: list[tuple]) -> None:
        facts = self.facts._replace(dtype=str(self.facts.dtype).removeprefix("torch."))._asdict()
        self.tell({"op": "model", **facts})
        if self.group.rank == 0:
            self.group.replies(limit=False)
        else:
            self.group.reply({})
        for op, *args in script:
            getattr(self, op)(*args)
        if self.found:
            got, truth, plain = (torch.cat(x, -1) for x in zip(*self.found, strict=True))
            if got.dtype == torch.float64:  # the truth has no more digits
                torch.testing.assert_close(got, truth)
            else:
                assert_accurate(got, truth, plain)

    def prefill(self, id: int, length: int, replica: int, shard: int | None) -> None:
        self.tell({"op": "prefill", "id": id, "length": length, "replica": replica, "shard": shard})
        self.placement.admit(id, length, shard)
        if replica != self.group.rank:
            return
        for layer in range(self.facts.layers):
            _, k, v = tensors(self.facts, id, layer, length)
            for part in self.placement.prompt(id):
                x = torch.stack([k, v])[:, part.tokens, part.kv_heads]
                self.group.link.send(x, part.rank, "prompt")

    def round(self, drop: list[int], batches: list[list[int]]) -> None:
        self.tell({"op": "round", "drop": drop, "batches": batches, "tokens": [[0] * len(ids) for ids in batches]})
        self.placement.drop(drop)
        parts = [self.placement.parts(ids) for ids in batches]
        for k, j in steps(self.facts.layers + 1, len(batches)):
            if runner(k, j, self.replicas) != self.group.rank or not batches[j]:
                continue
            if k > 0:
                self.join(k - 1, batches[j], parts[j])
            if k < self.facts.layers:
                self.ask(k, j, batches[j], parts[j])
        self.placement.advance([id for ids in batches for id in ids])

    def ask(self, layer: int, j: int, ids: list[int], parts: list) -> None:
        q, k, v = self.last(layer, ids)
        for part in parts:
            self.group.link.send(q[part.rows, part.heads], part.rank, "q")
        time.sleep(self.pause)
        self.kv_sent[layer, j] = time.monotonic()
        for part in parts:
            self.group.link.send(torch.stack([k, v])[:, part.new, part.kv_heads], part.rank, "kv")

    def last(self, layer: int, ids: list[int]) -> tuple[torch.Tensor, ...]:
        rows = [[x[-1] for x in tensors(self.facts, id, layer, self.placement.lengths[id] + 1)] for id in ids]
        return tuple(torch.stack(x) for x in zip(*rows, strict=True))

    def join(self, layer: int, ids: list[int], parts: list) -> None:
        """Receive a layer's answers; note them beside attention over the whole history."""
        facts, link = self.facts, self.group.link
        sequence = self.group.plan.by == "sequence"
        wide = torch.promote_types(facts.dtype, torch.float32)
        outs = torch.zeros(len(parts), len(ids), facts.heads, facts.head_dim, dtype=wide)
        lses = torch.full(outs.shape[:3], -torch.inf, dtype=wide)
        for n, part in enumerate(parts):
            heads = part.heads.stop - part.heads.start
            shape = (part.size, heads, facts.head_dim)
            out = link.receive(shape, wide if sequence else facts.dtype, part.rank, "out").wait()
            outs[n, part.rows, part.heads] = out.to(wide)
            lses[n, part.rows, part.heads] = 0.0
            if sequence:
                lses[n, part.rows] = link.receive(shape[:2], wide, part.rank, "lse").wait()
        out = merge_states(outs, lses)[0].to(facts.dtype)
        for row, id in enumerate(ids):
            q, k, v = (x[None] for x in tensors(facts, id, layer, self.placement.lengths[id] + 1))
            truth = full_attention(q[:, -1:].double(), k.double(), v.double(), scale=facts.scale, backend="reference")
            plain = full_attention(q[:, -1:], k, v, scale=facts.scale, backend="reference")
            self.found.append((out[row].flatten(), truth.flatten(), plain.flatten()))


def log_links() -> dict[str, list]:
    """What this process sends and posts, in order, by the other side."""
    log: dict[str, list] = {"sent": [], "posted": []}
    send, receive = Link.send, Link.receive

    def logged_send(self, x, to, kind):
        log["sent"] += [(to, kind, list(x.shape))] if x.numel() else []
        send(self, x, to, kind)

    def logged_receive(self, shape, dtype, source, kind):
        log["posted"] += [(source, kind, list(shape))] if torch.Size(shape).numel() else []
        return receive(self, shape, dtype, source, kind)

    Link.send, Link.receive = logged_send, logged_receive
    return log


def attend(plan: SplitPlan, replicas: int, facts: Facts, script: list[tuple], **options: Any) -> dict[str, Any]:
    """The fake model against real attention workers: reports, logs of the links, and when k, v were sent."""
    log = log_links()
    group = Group(plan, replicas=replicas, timeout=20.0, device="cpu", trace=True)
    pause = options.pop("pause", 0.0)
    if group.role == "attention":
        AttentionWorker(group, **options).serve()
        return dict(report=group.report(), log=log)
    with group:
        model = FakeModel(group, facts, pause)
        model.play(script)
        if group.rank > 0 and (last := group.next_command()) != {"op": "close"}:
            raise AssertionError(f"not the end: {last}")
    return dict(report=group.report(), log=log, kv_sent=model.kv_sent)


def lose(how: str, victim: int, waits: dict[int, int], timeout: float) -> tuple[float, str, int, str]:
    """Rank `victim` is lost while each other waits for a tensor of `waits[rank]`, or for a command."""
    group = Group(SplitPlan("head", 2), timeout=timeout, device="cpu")
    start = time.monotonic()
    try:
        with group:
            if group.rank == victim:
                time.sleep(0.2)
                if how == "raise":
                    raise KeyError("own fault")
                if how == "leave":
                    group.close()
                    return 0.0, "left", 0, ""
                os.kill(os.getpid(), getattr(signal, how))
            if group.rank not in waits:
                group.next_command()
                raise AssertionError("a command came")
            group.link.receive((4,), torch.float32, waits[group.rank], "q").wait()
    except RuntimeError as e:
        return time.monotonic() - start, str(e), e.rank, e.role
    raise AssertionError("nothing was raised")


def talk() -> dict[str, Any]:
    """Commands and replies, short and long; tensors from the leader, in two kinds at once, and an empty one."""
    group = Group(SplitPlan("head", 2), replicas=2, timeout=20.0, device="cpu")
    who = (group.rank, group.world, group.role, group.replica, group.shard, group.models, group.workers)
    found: dict[str, Any] = dict(who=who)
    with group:
        if group.rank == 0:
            group.command({"op": "short"})
            group.command({"op": "long", "text": "x" * 20_000})
            found["replies"] = group.replies()
            for to in range(1, 4):
                group.link.send(torch.arange(20.0)[::2], to, "q")
                group.link.send(torch.zeros(0, 3), to, "lse")
                group.link.send(torch.full((7,), to, dtype=torch.bfloat16), to, "kv")
        else:
            commands = [group.next_command(), group.next_command()]
            group.reply({"rank": group.rank, "long": "y" * 9000})
            q = group.link.receive((10,), torch.float32, 0, "q")
            lse = group.link.receive((0, 3), torch.float32, 0, "lse")
            kv = group.link.receive((7,), torch.bfloat16, 0, "kv")
            assert lse.wait().shape == (0, 3)
            assert torch.equal(q.wait(), torch.arange(0.0, 20.0, 2.0)) and q.wait() is q.wait()
            assert kv.wait().eq(group.rank).all()
            found["commands"] = [*commands, group.next_command()]
        found["report"] = group.report()
    group.close()
    return found


def slow() -> None:
    """200 small messages and four of 24 MiB to a receiver that starts late."""
    with Group(SplitPlan("head", 1), timeout=60.0, device="cpu") as group:
        sizes = [5] * 200 + [6 << 20] * 4
        if group.rank == 0:
            for n, size in enumerate(sizes):
                group.link.send(torch.full((size,), float(n)), 1, "prompt")
            assert group.link.receive((1,), torch.float32, 1, "token").wait().item() == 1.0
            return
        time.sleep(0.5)
        for n, size in enumerate(sizes):
            assert group.link.receive((size,), torch.float32, 0, "prompt").wait().eq(n).all()
        group.link.send(torch.ones(1), 0, "token")
        assert group.next_command() == {"op": "close"}


def rebuild(port: int) -> tuple[str, float]:
    """Rank 2 dies; the others close, make a smaller group on another port, close that and make one more there."""
    group = Group(SplitPlan("head", 2), timeout=20.0, device="cpu")
    if group.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    text, found = "", 0.0
    try:
        group.link.receive((4,), torch.float32, 2 if group.rank == 0 else 0, "q").wait()
    except RuntimeError as e:
        text = str(e).split(". ")[0]
    group.close()
    group.close()
    for value in (3.0, 4.0):
        os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(port))
        with Group(SplitPlan("sequence", 1), timeout=20.0, device="cpu") as group:
            found += pass_on(group, value)
    return text, found


def again() -> list[float]:
    """Groups one after the other, some left by an error, where the store still holds the addresses of those before."""
    found = []
    for value in range(12):
        try:
            with Group(SplitPlan("head", 1), timeout=20.0, device="cpu", join_timeout=20.0) as group:
                found.append(pass_on(group, float(value)))
                if group.rank and value % 3 == 0:  # after the tensor, so that it is never lost
                    raise KeyError(value)
                if group.rank:
                    group.next_command()
        except (KeyError, WorkerError):
            continue
    return found


def pass_on(group: Group, value: float) -> float:
    if group.rank == 0:
        group.link.send(torch.full((1,), value), 1, "q")
        return value
    return group.link.receive((1,), torch.float32, 0, "q").wait().item()


def visit() -> tuple[bool, float]:
    torch.distributed.init_process_group("gloo")
    with Group(SplitPlan("head", 1), timeout=20.0, device="cpu") as group:
        found = pass_on(group, 3.0)
    torch.distributed.barrier()
    up = torch.distributed.is_initialized()
    torch.distributed.destroy_process_group()
    return up, found


def unlike() -> None:
    block = 64 if os.environ["RANK"] == "0" else 32
    with Group(SplitPlan("sequence", 1, block=block), timeout=20.0, device="cpu") as group:
        group.replies() if group.rank == 0 else group.next_command()


def join() -> None:
    if os.environ["RANK"] == "1":
        time.sleep(1000)
    Group(SplitPlan("head", 1), device="cpu", join_timeout=1.0)
