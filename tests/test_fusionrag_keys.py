"""`rotate_keys` and `scatter_kv` on every backend: against float64 and RoPE at the target, and what they leave alone.

Without a GPU Triton interprets, where bfloat16 is wrong: the other backends take it there.
"""

import pytest
import torch

from attnlab import BackendError, explain
from attnlab.fusionrag import SlotTable, rotate_keys, scatter_kv
from attnlab.kernels.fusionrag import portable_keys
from attnlab.kernels.fusionrag.portable_keys import turn
from attnlab.reference import rope as reference
from attnlab.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    RopeConfig,
    YarnScaling,
    apply_rope,
    shift_rope,
)
from attnlab.testing import assert_accurate
from tests.test_rope import true_frequencies

BACKENDS = ["reference", "portable", "triton"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PAIRS = [(b, t) for b in BACKENDS for t in DTYPES if b != "triton" or t != torch.bfloat16 or torch.cuda.is_available()]
SEQ_LEN = 60_000
ROPES = {
    "standard": RopeConfig(10000.0, 16),
    "linear": RopeConfig(10000.0, 16, scaling=LinearScaling(4.0)),
    "dynamic": RopeConfig(10000.0, 16, scaling=DynamicScaling(2.0, 4096)),
    "yarn": RopeConfig(500000.0, 32, scaling=YarnScaling(8.0, 64)),
    "llama3": RopeConfig(500000.0, 16, scaling=Llama3Scaling(8.0, 1.0, 4.0, 512)),
    "partial": RopeConfig(10000.0, 20, 12),
    "interleaved": RopeConfig(10000.0, 16, interleaved=True),
    "partial interleaved": RopeConfig(10000.0, 22, 12, True, YarnScaling(4.0, 64)),
}


def randn(*shape, dtype=torch.float64, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)


def same_bits(x, y):
    return x.shape == y.shape and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_equals_rope_at_the_target(backend, name):
    rope = ROPES[name]
    x = randn(2, 7, 3, rope.head_dim)
    old, new = torch.arange(14).view(2, 7) * 31, torch.arange(7) * 17 + 40_000
    rotated = apply_rope(x, old, rope, seq_len=SEQ_LEN)
    frequencies = true_frequencies(rope, SEQ_LEN)
    for shift in (5000, new, new - old, (old, new), (old, old - 9)):
        where = old + shift if isinstance(shift, int) else shift[1] if isinstance(shift, tuple) else old + shift
        truth = reference.apply_rope(x, where, frequencies, rope.attention_factor, rope.interleaved)
        moved = rotate_keys(rotated, shift, rope, seq_len=SEQ_LEN, backend=backend)
        torch.testing.assert_close(moved, truth, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
def test_rounds_once(backend, name, dtype, device):
    rope = ROPES[name]
    k = randn(2, 13, 3, rope.head_dim, dtype=dtype, device=device)
    new = torch.arange(26, device=device).view(2, 13) * 401
    frequencies = rope.inverse_frequencies(seq_len=SEQ_LEN, device=device)
    shifts = {
        -777: torch.full((1, 1), -777, device=device) * frequencies,
        new[0]: new[0, :, None] * frequencies,
        new: new[..., None] * frequencies,
        (new[1], new): (new[..., None] * frequencies).double() - (new[1, :, None] * frequencies).double(),
    }
    for shift, angles in shifts.items():
        truth = reference.turn(k.double(), angles, 1.0, rope.interleaved)
        plain = turn(k, angles.cos().float(), angles.sin().float(), rope.interleaved)
        moved = rotate_keys(k, shift, rope, seq_len=SEQ_LEN, backend=backend)
        assert moved.dtype == dtype
        assert_accurate(moved, truth, plain, roundings=0.5)
        assert same_bits(moved[..., rope.dim :], k[..., rope.dim :])
        if backend == "portable":
            assert same_bits(moved, plain) and same_bits(moved, shift_rope(k, shift, rope, seq_len=SEQ_LEN))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("backend, dtype", PAIRS, ids=str)
def test_there_and_back_within_one_rounding(backend, name, dtype, device):
    rope = ROPES[name]
    k = randn(1, 20, 3, rope.head_dim, dtype=dtype, device=device)
    old, new = torch.arange(20, device=device) * 7, torch.arange(20, device=device) + 30_000
    for there, back in (((old, new), (new, old)), (4321, -4321), (new, -new)):
        moved = rotate_keys(k, there, rope, seq_len=SEQ_LEN, backend=backend)
        found = rotate_keys(moved, back, rope, seq_len=SEQ_LEN, backend=backend)
        rotary = k[..., : rope.dim].double()
        a, b = rotary.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else rotary.chunk(2, -1)
        pair = torch.hypot(a, b).repeat_interleave(2, -1) if rope.interleaved else torch.hypot(a, b).repeat(1, 1, 1, 2)
        # Half a rounding of the pair's length each way, and float32's own: sine, cosine, two products and a sum.
        allowed = pair * (torch.finfo(dtype).eps + 5 * torch.finfo(torch.float32).eps)
        assert ((found[..., : rope.dim].double() - rotary).abs() <= allowed).all()
        assert same_bits(found[..., rope.dim :], k[..., rope.dim :])


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("backend", [b for b, dtype in PAIRS if dtype == torch.bfloat16])
def test_a_bfloat16_key_moves_within_3e_3(backend, theta, device):
    """Against the key a float32 model would have at the target; the stored key and the moved one are each rounded."""
    rope, x = RopeConfig(theta, 128), randn(1, 128, 4, 128, dtype=torch.float32)
    old = torch.arange(128) + 200
    stored = apply_rope(x, old, rope).bfloat16()

    def move(shift):
        shift = shift if isinstance(shift, int) else tuple(p.to(device) for p in shift)
        return rotate_keys(stored.to(device), shift, rope, backend=backend).cpu().double()

    for far in (1, 700, 8000, 32_000):
        truth = apply_rope(x, old + far, rope).double()
        for shift in (far, (old, old + far)):
            assert (move(shift) - truth).norm() <= 3e-3 * truth.norm()
        exact = reference.shift_rope(stored.double(), torch.full((128,), far), true_frequencies(rope))
        assert (move(far) - exact).norm() <= 3e-3 * exact.norm()


def pools(kind, count, heads, dim, dtype, device):
    """A pool of `count` rows with its strides, full of what nobody may touch."""
    if kind == "dense":
        return randn(count, heads, dim, dtype=dtype, device=device, seed=5)
    if kind == "layers":
        return randn(count, 3, heads, dim, dtype=dtype, device=device, seed=5)[:, 1]
    return randn(heads, count, dim + 8, dtype=dtype, device=device, seed=5)[..., 8:].transpose(0, 1)


@pytest.mark.parametrize("kind", ["dense", "layers", "heads first"])
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_into_slots_and_nothing_else(backend, index, kind, device):
    for rope in (ROPES["standard"], ROPES["partial interleaved"]):
        k = randn(13, 2, 3, rope.head_dim, dtype=torch.float16, device=device).transpose(0, 1)
        shift = torch.arange(26, device=device).view(2, 13)
        slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:26].view(2, 13).to(device, index)
        slots[0, 3:7] = slots[1, 12] = -1
        out = pools(kind, 40, 3, rope.head_dim, torch.float16, device)
        whole = out._base if out._base is not None else out
        before, kept = whole.clone(), slots >= 0
        assert rotate_keys(k, shift, rope, out=out, slots=slots, backend=backend) is out
        assert same_bits(out[slots[kept].long()], rotate_keys(k, shift, rope, backend=backend)[kept])
        out[slots[kept].long()] = before.as_strided(out.shape, out.stride(), out.storage_offset())[slots[kept].long()]
        assert same_bits(whole, before)


@pytest.mark.parametrize("kind", ["dense", "layers", "heads first"])
@pytest.mark.parametrize("backend, dtype", [*PAIRS, ("reference", torch.float64), ("portable", torch.float64)], ids=str)
def test_scatter_writes_its_slots_and_nothing_else(backend, dtype, kind, device):
    k = randn(2, 3, 13, 20, dtype=dtype, device=device).transpose(1, 2)
    v = randn(2, 13, 3, 40, dtype=dtype, device=device, seed=1)[..., ::2]
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:26].view(2, 13).int().to(device)
    slots[1, :5] = slots[0, 12] = -1
    k_pool, v_pool = pools(kind, 40, 3, 20, dtype, device), pools("dense", 40, 3, 20, dtype, device) + 1
    wanted = [k_pool.clone(), v_pool.clone()]
    for b, t in torch.cartesian_prod(torch.arange(2), torch.arange(13)).tolist():
        if slots[b, t] >= 0:
            wanted[0][slots[b, t]], wanted[1][slots[b, t]] = k[b, t], v[b, t]
    assert scatter_kv(k, v, k_pool, v_pool, slots, backend=backend) is None
    assert same_bits(k_pool, wanted[0]) and same_bits(v_pool, wanted[1])


@pytest.mark.parametrize("shape", [(3, 20), (2, 16), (50, 1), (9, 3)], ids=str)
def test_runs_of_slots(shape, monkeypatch):
    """Chunks go to the pool a row at a time, the single tokens of many rows together."""
    rope = ROPES["standard"]
    k = randn(*shape, 2, rope.head_dim, dtype=torch.float32)
    first = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))[:, None]
    slots, shift = 4 + first * shape[1] + torch.arange(shape[1]), torch.arange(k[..., 0, 0].numel()).view(shape)
    steps, real = [], portable_keys.turn
    monkeypatch.setattr(portable_keys, "turn", lambda x, *options: (steps.append(len(x)), real(x, *options))[1])
    found = {}
    for backend in ("reference", "portable"):
        pool, k_pool, v_pool = (randn(slots.numel() + 9, 2, rope.head_dim, seed=5, dtype=k.dtype) for _ in range(3))
        rotate_keys(k, shift, rope, out=pool, slots=slots, backend=backend)
        scatter_kv(k, k + 1, k_pool, v_pool, slots, backend=backend)
        found[backend] = pool, k_pool, v_pool
    torch.testing.assert_close(found["portable"], found["reference"], rtol=1e-5, atol=1e-5)
    assert sum(steps) == shape[0] and all(n == 1 or n * shape[1] <= 16 for n in steps)
    assert len(steps) <= 1 + shape[0] * shape[1] / 8


@pytest.mark.parametrize("name", ["standard", "partial", "interleaved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_turns_a_pool_in_place(backend, name, device):
    rope = ROPES[name]
    pool = randn(50, 3, rope.head_dim, dtype=torch.float32, device=device)
    wanted = pool.clone()
    wanted[10:50] = rotate_keys(pool[None, 10:50], 99, rope, backend=backend)
    rotate_keys(pool[None, 10:50], 99, rope, out=pool, slots=torch.arange(10, 50, device=device)[None], backend=backend)
    assert same_bits(pool, wanted)


@pytest.mark.parametrize("backend", ["portable", "triton"])
def test_far_slots(backend, device):
    """Slots whose offset does not fit 31 bits, in memory that is hardly touched."""
    far, rope = 2**26, ROPES["standard"]
    pools = torch.empty(far + 20, 2, 1, 16, dtype=torch.float16, device=device).unbind(1)
    k, v = (randn(1, 20, 1, 16, dtype=torch.float16, device=device, seed=seed) for seed in range(2))
    slots = torch.arange(far, far + 20, dtype=torch.int32, device=device)[None]
    scatter_kv(k, v, *pools, slots, backend=backend)
    assert same_bits(pools[0][far:], k[0]) and same_bits(pools[1][far:], v[0])
    rotate_keys(k, 5, rope, out=pools[0], slots=slots, backend=backend)
    assert same_bits(pools[0][far:], rotate_keys(k, 5, rope, backend=backend)[0])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_keys(backend, shape, device):
    rope, k = ROPES["standard"], torch.zeros(*shape, 3, 16, device=device)
    assert rotate_keys(k, 3, rope, backend=backend).shape == k.shape
    pool, slots = torch.ones(5, 3, 16, device=device), torch.zeros(shape, dtype=torch.int32, device=device)
    rotate_keys(k, 3, rope, out=pool, slots=slots, backend=backend)
    scatter_kv(k, k, pool, pool.clone(), slots, backend=backend)
    assert (pool == 1).all()


@pytest.mark.parametrize("name", ["standard", "partial interleaved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_the_turn_back(backend, name, device):
    rope, shift = ROPES[name], torch.arange(5, device=device) * 11
    if backend != "triton":
        k = randn(2, 5, 2, rope.head_dim, device=device).requires_grad_()
        assert torch.autograd.gradcheck(lambda k: rotate_keys(k, shift, rope, backend=backend), (k,))
    k = randn(2, 5, 2, rope.head_dim, dtype=torch.float32, device=device).requires_grad_()
    grad = randn(2, 2, 5, rope.head_dim, dtype=torch.float32, device=device, seed=1).transpose(1, 2)
    (found,) = torch.autograd.grad(rotate_keys(k, (shift, shift * 3), rope, backend=backend), k, grad)
    plain = shift_rope(grad, (shift * 3, shift), rope)
    assert_accurate(found, plain.double(), plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, device):
    k, slots = torch.randn(2, 4, 3, 16, device=device), torch.arange(8, device=device).view(2, 4)
    angles, pool = torch.randn(4, 8, device=device), torch.zeros(9, 3, 16, device=device)
    ops = torch.ops.attnlab
    torch.library.opcheck(ops.rotate_keys_into.default, (k, angles, slots, pool, True, backend))
    torch.library.opcheck(ops.scatter_kv.default, (k, k, pool, pool.clone(), slots, backend))
    if backend == "triton":
        torch.library.opcheck(ops.rotate_keys.default, (k.requires_grad_(), angles, False))


def test_compiles_whole():
    rope = ROPES["partial"]
    k, slots = randn(1, 6, 3, 20, dtype=torch.float32), torch.tensor([[4, -1, 0, 2, 1, 6]])

    @torch.compile(fullgraph=True, backend="aot_eager")
    def fn(k, pool):
        moved = rotate_keys(k, 7, rope)
        rotate_keys(k, 7, rope, out=pool, slots=slots)
        scatter_kv(moved, k, pool, v_pool := pool.clone(), slots)
        return moved, v_pool

    pool = torch.zeros(8, 3, 20)
    moved, v_pool = fn(k, pool)
    assert same_bits(moved, rotate_keys(k, 7, rope))
    kept = slots >= 0
    assert same_bits(pool[slots[kept]], moved[kept]) and same_bits(v_pool[slots[kept]], k[kept])
    assert (pool[[3, 5, 7]] == 0).all()


def test_slots_are_read_once_and_those_of_a_table_never(monkeypatch):
    k, pool = torch.randn(1, 4, 2, 8), torch.zeros(9, 2, 8)
    reads, real = [], torch.Tensor.aminmax
    monkeypatch.setattr(torch.Tensor, "aminmax", lambda x: reads.append(1) or real(x))

    def write(slots):
        before = len(reads)
        scatter_kv(k, k, pool, pool.clone(), slots)
        rotate_keys(k, 1, RopeConfig(1e4, 8), out=pool, slots=slots)
        return len(reads) - before

    slots = torch.arange(4)[None]
    assert [write(slots), write(slots)] == [1, 0]
    slots += 1
    assert write(slots) == 1
    slots[0, 0] = 9
    with pytest.raises(ValueError, match=r"slots must be -1 or in 0..8, got 9"):
        write(slots)
    for inference in (False, True):
        with torch.inference_mode(inference):
            table = SlotTable(1, 9, 9)
            assert write(table.extend(4)) == 0
            assert write(table.own(torch.arange(4)[None])) == 0
            table.reserve(2)
    short = SlotTable(1, 9, 8).extend(4)  # slots of another pool are looked at
    assert write(short) == 1


def test_explain_and_refusals():
    rope, k = RopeConfig(1e4, 8), torch.randn(1, 4, 2, 8)
    assert explain(rotate_keys, k, 3, rope).chosen == "portable"
    slots, pool = torch.arange(4)[None], torch.zeros(5, 8, 2).transpose(1, 2)
    assert explain(rotate_keys, k, 3, rope, out=pool, slots=slots).chosen == "portable"
    assert explain(scatter_kv, k, k, pool, pool, slots).reasons["portable"] == []
    for call, name in (
        (lambda: rotate_keys(k, 3, rope, out=pool, slots=slots, backend="triton"), "out"),
        (lambda: scatter_kv(k, k, pool, pool, slots, backend="triton"), "k_slots"),
    ):
        with pytest.raises(BackendError, match=f"the last dimension of {name} is not dense"):
            call()
    with pytest.raises(BackendError, match="dtype float64"):
        rotate_keys(k.double(), 3, rope, backend="triton")


K, POOL, ROPE = torch.zeros(2, 3, 2, 8), torch.zeros(9, 2, 8), RopeConfig(1e4, 8)
SLOTS = torch.zeros(2, 3, dtype=torch.int32)
INTO = dict(out=POOL, slots=SLOTS)
FLOATS = "must be float16, bfloat16, float32 or float64, got torch.int32"
BAD_ROTATE = [
    (dict(k=None), TypeError, "k must be a Tensor, got NoneType"),
    (dict(k=K.int()), TypeError, f"k {FLOATS}"),
    (dict(k=K[0]), ValueError, "k must have shape [B, T, Hkv, D] with Hkv, D >= 1, got [3, 2, 8]"),
    (dict(k=K[:, :, :0]), ValueError, "k must have shape [B, T, Hkv, D] with Hkv, D >= 1, got [2, 3, 0, 8]"),
    (dict(rope=1e4), TypeError, "rope must be a RopeConfig, got float"),
    (dict(rope=RopeConfig(1e4, 16)), ValueError, "rope must have k's head size 8, got head_dim=16"),
    (dict(shift=1.0), TypeError, "shift must be an integer Tensor, got float"),
    (dict(shift=True), TypeError, "shift must be an integer Tensor, got bool"),
    (dict(shift=torch.zeros(3)), TypeError, "shift must have an integer dtype, got torch.float32"),
    (dict(shift=SLOTS[:, :2]), ValueError, "shift must have shape [3] or [2, 3], got [2, 2]"),
    (dict(shift=SLOTS.to("meta")), ValueError, "shift must be on cpu, got meta"),
    (dict(shift=(SLOTS,)), ValueError, "shift must be a number, a tensor or (from, to), got 1 items"),
    (dict(shift=(SLOTS, SLOTS[0, :1])), ValueError, "to must have shape [3] or [2, 3], got [1]"),
    (dict(out=POOL), ValueError, "out and slots must be given together"),
    (dict(slots=SLOTS), ValueError, "out and slots must be given together"),
    (INTO | dict(out=POOL.tolist()), TypeError, "out must be a Tensor, got list"),
    (INTO | dict(out=POOL.half()), TypeError, "out must have k's dtype torch.float32, got torch.float16"),
    (INTO | dict(out=POOL[:, :1]), ValueError, "out must have shape [N, 2, 8], got [9, 1, 8]"),
    (INTO | dict(out=POOL[None]), ValueError, "out must have shape [N, 2, 8], got [1, 9, 2, 8]"),
    (INTO | dict(out=POOL.to("meta")), ValueError, "out must be on k's device cpu, got meta"),
    (INTO | dict(slots=[0]), TypeError, "slots must be an int32 or int64 Tensor, got list"),
    (INTO | dict(slots=SLOTS.bool()), TypeError, "slots must be an int32 or int64 Tensor, got torch.bool"),
    (INTO | dict(slots=SLOTS[0]), ValueError, "slots must have shape [2, 3], got [3]"),
    (INTO | dict(slots=SLOTS.to("meta")), ValueError, "slots must be on k's device cpu, got meta"),
    (INTO | dict(slots=SLOTS - 2), ValueError, "slots must be -1 or in 0..8, got -2"),
    (INTO | dict(slots=SLOTS + 9), ValueError, "slots must be -1 or in 0..8, got 9"),
    (INTO | dict(k=K.clone().requires_grad_()), ValueError, "k must not require a gradient: write under torch.no_grad"),
    (INTO | dict(out=POOL.clone().requires_grad_()), ValueError, "out must not require a gradient"),
    (dict(backend="cuda"), ValueError, "backend must be one of 'auto', 'triton', 'portable', 'reference', got 'cuda'"),
]
BAD_SCATTER = [
    (dict(k=[1]), TypeError, "k must be a Tensor, got list"),
    (dict(v=K.int()), TypeError, f"v {FLOATS}"),
    (dict(k=K[0]), ValueError, "k must have shape [B, T, Hkv, D] with Hkv, D >= 1, got [3, 2, 8]"),
    (dict(v=K.half()), TypeError, "v must have k's dtype torch.float32, got torch.float16"),
    (dict(v=K.to("meta")), ValueError, "v must be on k's device cpu, got meta"),
    (dict(v=K[:, :2]), ValueError, "v must have k's shape [2, 3, 2, 8], got [2, 2, 2, 8]"),
    (dict(k_slots=None), TypeError, "k_slots must be a Tensor, got NoneType"),
    (dict(v_slots=POOL.half()), TypeError, "v_slots must have v's dtype torch.float32, got torch.float16"),
    (dict(k_slots=POOL[..., :4]), ValueError, "k_slots must have shape [N, 2, 8], got [9, 2, 4]"),
    (dict(v_slots=POOL[:8]), ValueError, "v_slots must have as many rows as k_slots 9, got 8"),
    (dict(slots=SLOTS.float()), TypeError, "slots must be an int32 or int64 Tensor, got torch.float32"),
    (dict(slots=SLOTS + 100), ValueError, "slots must be -1 or in 0..8, got 100"),
    (dict(v=K.clone().requires_grad_()), ValueError, "v must not require a gradient: write under torch.no_grad()"),
    (dict(backend="cpu"), ValueError, "backend must be one of 'auto', 'triton', 'portable', 'reference', got 'cpu'"),
]
CALLS = [
    ("rotate_keys", lambda **x: rotate_keys(**dict(k=K, shift=1, rope=ROPE) | x), BAD_ROTATE),
    ("scatter_kv", lambda **x: scatter_kv(**dict(k=K, v=K, k_slots=POOL, v_slots=POOL, slots=SLOTS) | x), BAD_SCATTER),
]


@pytest.mark.parametrize(
    "fn, call, change, error, message",
    [pytest.param(fn, call, *row, id=f"{fn}: {row[2][:60]}") for fn, call, rows in CALLS for row in rows],
)
def test_bad_input(fn, call, change, error, message):
    with pytest.raises(error) as caught:
        call(**change)
    assert str(caught.value).startswith(fn) and message in str(caught.value)


def test_dynamic_scaling_needs_seq_len():
    with pytest.raises(ValueError, match="dynamic scaling needs seq_len"):
        rotate_keys(torch.zeros(1, 2, 1, 16), 1, ROPES["dynamic"])
