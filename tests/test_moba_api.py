"""The public functions: errors, dispatch, registration with torch, gradients by finite differences."""

import json
import math

import pytest
import torch

import attnlab
from attnlab import dispatch, moba_selection
from attnlab.testing import gaussian, ragged

Q, K, V = gaussian(2, 16, 16, 4, 2, 8)
OPTIONS = dict(block_size=4, topk=2)


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


def packed(cu_q, cu_k, q=Q[:1], k=K[:1]):
    return dict(q=q, k=k, v=k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)


def replay(indices, **options):
    return dict(selection=attnlab.MoBASelection(indices, indices.float()), **options)


def bad_row(indices, at, row, rule, **options):
    """A replay of `indices` whose row `at` is `row`, and the error it gets."""
    indices = indices.clone()
    indices[at] = torch.tensor(row, dtype=torch.int32)
    message = f"selection.indices{list(at)} must be {rule}, each once, or -1, got {row}"
    return replay(indices, **options), ValueError, message


def own(block):
    return f"its own block {block}, then earlier ones"


TWO, FOUR = (attnlab.moba_select(Q, K, block_size=4, topk=n).indices for n in (2, 4))
ANY = attnlab.moba_select(Q, K, block_size=4, topk=2, causal=False).indices

BAD = [
    (dict(q=Q[0]), ValueError, "q must have shape [B, T, H, D], got [16, 4, 8]"),
    (dict(q=Q.tolist()), TypeError, "q must be a Tensor, got list"),
    (dict(k=K[:, :, 0]), ValueError, "k must have shape [B, T, H, D]"),
    (dict(k=K.half()), TypeError, "k must have q's dtype float32, got float16"),
    (dict(q=Q.int(), k=K.int(), v=V.int()), TypeError, "q must be float16, bfloat16, float32 or float64, got int32"),
    (dict(k=K.to("meta"), v=V.to("meta")), ValueError, "k must be on q's device cpu, got meta"),
    (dict(v=V.to("meta")), ValueError, "v must be on q's device cpu, got meta"),
    (dict(q=Q[:, :, :3]), ValueError, "q's heads must be a multiple of k's heads 2, got 3"),
    (dict(q=Q[:, :, :0]), ValueError, "q must have at least one head"),
    (dict(k=K[..., :4]), ValueError, "k must have q's head size 8, got 4"),
    (dict(k=K[:1]), ValueError, "k must have q's batch size 2, got 1"),
    (dict(v=V[:, :8]), ValueError, "v must have k's shape [2, 16, 2, 8], got [2, 8, 2, 8]"),
    (dict(block_size=-64), ValueError, "block_size must be a positive int, got -64"),
    (dict(block_size=0), ValueError, "block_size must be a positive int, got 0"),
    (dict(block_size=4.0), ValueError, "block_size must be a positive int, got 4.0"),
    (dict(block_size=True), ValueError, "block_size must be a positive int, got True"),
    (dict(topk=0), ValueError, "topk must be a positive int, got 0"),
    (dict(topk="8"), ValueError, "topk must be a positive int, got '8'"),
    (dict(sink_blocks=-1), ValueError, "sink_blocks must be a non-negative int, got -1"),
    (dict(local_blocks=0.5), ValueError, "local_blocks must be a non-negative int, got 0.5"),
    (dict(local_blocks=1, causal=False), ValueError, "local_blocks needs causal=True, got local_blocks=1"),
    (dict(workspace_bytes=0), ValueError, "workspace_bytes must be a positive int, got 0"),
    (dict(causal=1), TypeError, "causal must be a bool, got 1"),
    (dict(return_lse="yes"), TypeError, "return_lse must be a bool, got 'yes'"),
    (dict(deterministic=None), TypeError, "deterministic must be a bool, got None"),
    (dict(scale="1"), TypeError, "scale must be a number or None, got str"),
    (dict(scale=True), TypeError, "scale must be a number or None, got bool"),
    (dict(routing="token"), ValueError, "routing must be 'head' or 'group', got 'token'"),
    (dict(sinks=torch.zeros(2)), ValueError, "sinks must have shape [4] (one per query head), got [2]"),
    (dict(sinks=torch.zeros(4, dtype=torch.int64)), TypeError, "sinks must be a floating-point Tensor"),
    (dict(sinks=torch.zeros(4, device="meta")), ValueError, "sinks must be on q's device cpu, got meta"),
    (dict(k=K[:, :8], v=V[:, :8]), ValueError, "needs at least as many keys as queries, got Tq=16, Tk=8"),
    (dict(cu_seqlens_q=cu(0, 16)), ValueError, "cu_seqlens_q and cu_seqlens_k must be given together"),
    (
        dict(cu_seqlens_q=cu(0, 16), cu_seqlens_k=cu(0, 16)),
        ValueError,
        "packed sequences need a batch size of 1, got 2",
    ),
    (packed(cu(0, 16).long(), cu(0, 16)), TypeError, "cu_seqlens_q must be an int32 Tensor, got torch.int64"),
    (packed([0, 16], [0, 16]), TypeError, "cu_seqlens_q must be an int32 Tensor, got list"),
    (packed(cu(0, 16)[None], cu(0, 16)[None]), ValueError, "cu_seqlens_q must have shape [sequences + 1], got [1, 2]"),
    (packed(cu(0, 8, 16), cu(0, 16)), ValueError, "cu_seqlens_k must have cu_seqlens_q's shape [3], got [2]"),
    (packed(cu(0, 9, 8, 16), cu(0, 8, 9, 16)), ValueError, "cu_seqlens_q must start at 0 and never fall"),
    (packed(cu(1, 16), cu(0, 16)), ValueError, "cu_seqlens_q must start at 0 and never fall"),
    (packed(cu(0, 16), cu(0, 12)), ValueError, "cu_seqlens_k must end at 16 (the number of tokens), got 12"),
    (
        packed(cu(0, 12, 16), cu(0, 4, 16)),
        ValueError,
        "as many keys as queries in every sequence, got [(12, 4), (4, 12)]",
    ),
    (
        dict(backend="fast"),
        ValueError,
        "backend must be one of 'auto', 'cuda', 'triton', 'cpu', 'portable', 'reference', got 'fast'",
    ),
    (dict(selection=3), TypeError, "selection must be a MoBASelection, got int"),
    (replay(TWO.long()), TypeError, "selection.indices must be an int32 Tensor, got torch.int64"),
    (replay(TWO[0]), ValueError, "selection.indices must have shape [2, 16, 4, 2], got [16, 4, 2]"),
    (replay(TWO.to("meta")), ValueError, "selection.indices must be on q's device cpu, got meta"),
    bad_row(TWO, (1, 9, 3), [2, 2], own(2)),
    bad_row(TWO, (0, 9, 0), [1, 0], own(2)),
    bad_row(TWO, (0, 9, 0), [1, 2], own(2)),
    bad_row(TWO, (0, 9, 0), [-1, 1], own(2)),
    bad_row(TWO, (0, 9, 0), [2, 3], own(2)),
    bad_row(TWO, (0, 0, 1), [0, 1], own(0)),
    bad_row(FOUR, (1, 15, 0), [3, 1, -1, 1], own(3), topk=4),
    bad_row(ANY, (0, 0, 0), [0, 0], "blocks below 4", causal=False),
    bad_row(ANY, (0, 15, 1), [3, 4], "blocks below 4", causal=False),
    (packed(cu(0, 12), cu(0, 16)) | replay(TWO[:1]), ValueError, "cu_seqlens_q must end at 16"),
    (
        packed(cu(0, 5, 16), cu(0, 5, 16)) | replay(TWO[:1]),
        ValueError,
        "selection.indices[0, 5, 0] must be its own block 0",
    ),
]


@pytest.mark.parametrize("change, error, message", BAD, ids=[m[:60] for _, _, m in BAD])
@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
def test_bad_input(change, error, message, backend):
    with pytest.raises(error) as caught:
        attnlab.moba_attention(**dict(q=Q, k=K, v=V, backend=backend, **OPTIONS) | change)
    assert str(caught.value).startswith("moba_attention: ") and message in str(caught.value)


@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
@pytest.mark.parametrize(
    "change, message",
    [
        (dict(block_size=0), "block_size must be a positive int, got 0"),
        (dict(k=K[:, :8]), "needs at least as many keys as queries, got Tq=16, Tk=8"),
        (dict(q=Q[:1], k=K[:1], cu_seqlens_q=cu(0, 16), cu_seqlens_k=cu(0, 12)), "cu_seqlens_k must end at 16"),
    ],
)
def test_bad_input_of_select(change, message, backend):
    with pytest.raises(ValueError) as caught:
        attnlab.moba_select(**dict(q=Q, k=K, backend=backend, **OPTIONS) | change)
    assert str(caught.value).startswith("moba_select: ") and message in str(caught.value)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(window=0), ValueError, "window must be a positive int, got 0"),
        (dict(window=4, causal=False), ValueError, "window needs causal=True"),
        (
            dict(backend="cuda"),
            ValueError,
            "backend must be one of 'auto', 'triton', 'portable', 'reference', 'flash', got 'cuda'",
        ),
    ],
)
def test_bad_input_of_full_attention(change, error, message):
    with pytest.raises(error, match="full_attention: ") as caught:
        attnlab.full_attention(Q, K, V, **change)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "outs, lses, error, message",
    [
        (Q, Q[..., 0][:1], ValueError, "outs must have shape [N, ..., D]"),
        (Q.half(), Q[..., 0].half(), TypeError, "lses must be float32"),
        (Q.int(), Q[..., 0], TypeError, "outs must be a floating-point Tensor"),
        (Q, Q[..., 0].to("meta"), ValueError, "lses must be on the device of outs"),
    ],
)
def test_bad_input_of_merge_states(outs, lses, error, message):
    with pytest.raises(error) as caught:
        attnlab.merge_states(outs, lses)
    assert str(caught.value).startswith("merge_states: ") and message in str(caught.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_checked_values_are_checked_again_when_they_change(mode):
    with mode():
        good, other = ragged([8, 8])
        x = [t[:1] for t in (Q, K, V)]
        attnlab.moba_attention(*x, cu_seqlens_q=good, cu_seqlens_k=other, **OPTIONS)
        good[-1] = 12
        with pytest.raises(ValueError, match="cu_seqlens_q must end at 16"):
            attnlab.moba_attention(*x, cu_seqlens_q=good, cu_seqlens_k=other, **OPTIONS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("packs", [False, True])
def test_choices_are_checked_once_until_they_change(mode, packs, monkeypatch):
    checks, geometry = [], moba_selection.geometry
    monkeypatch.setattr(moba_selection, "geometry", lambda *args: checks.append(args) or geometry(*args))

    def attend(**change):
        return attnlab.moba_attention(q, k, v, selection=chosen, **OPTIONS | seqlens | change)

    with mode():
        q, k, v = (x[:1].clone().requires_grad_(mode is torch.enable_grad) for x in (Q, K, V))
        seqlens = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), ragged([7, 9]), strict=True)) if packs else {}
        chosen = attnlab.moba_select(q, k, **OPTIONS, **seqlens)
        for _ in range(3):
            attend()
        assert len(checks) == (3 if mode is torch.inference_mode else 1)
        other = dict(zip(seqlens, ragged([9, 7]), strict=True)) if packs else dict(block_size=5)
        with pytest.raises(ValueError, match=r"selection\.indices"):
            attend(**other)
        chosen.indices[0, -1, 0] = chosen.indices[0, -1, 0, 0].clone()
        with pytest.raises(ValueError, match="each once"):
            attend()


def test_lengths_checked_before_may_meet_inference_tensors():
    good, other = ragged([7, 9])
    x = [t[:1] for t in (Q, K, V)]
    want = attnlab.moba_attention(*x, cu_seqlens_q=good, cu_seqlens_k=other, **OPTIONS)
    with torch.inference_mode():
        assert torch.equal(attnlab.moba_attention(*x, cu_seqlens_q=good, cu_seqlens_k=other.clone(), **OPTIONS), want)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU could serve it")
def test_explicit_backend_says_why_not_and_never_falls_back():
    with pytest.raises(attnlab.BackendError) as caught:
        attnlab.moba_attention(Q, K, V, backend="cuda", **OPTIONS)
    text = str(caught.value)
    assert "backend='cuda' cannot serve this call" in text and "tensors are on cpu, CUDA kernels need cuda" in text
    assert all(f"\n  {name}: " in text for name in ("cuda", "triton", "cpu", "portable", "reference"))
    with pytest.raises(attnlab.BackendError, match="flash-attn needs cuda"):
        attnlab.full_attention(Q, K, V, backend="flash")


def test_explain():
    found = attnlab.explain(attnlab.moba_attention, Q.double(), K.double(), V.double(), **OPTIONS)
    assert found.chosen == "portable" and found.reasons["portable"] == []
    assert "dtype float64 is not one of" in found.reasons["triton"][-1]
    assert str(found).startswith("moba_attention: backend='auto' -> portable\n")
    assert attnlab.explain(attnlab.full_attention, Q, K, V, backend="flash").chosen is None
    with pytest.raises(ValueError, match="topk must be"):
        attnlab.explain(attnlab.moba_attention, Q, K, V, block_size=4, topk=0)
    with pytest.raises(TypeError, match="explain: 'sum' does not choose a backend"):
        attnlab.explain(torch.sum, Q)
    assert attnlab.moba_attention(Q, K, V, **OPTIONS).shape == Q.shape  # explaining has ended


@pytest.mark.parametrize(
    "capability, change, reasons",
    [
        ((8, 0), {}, []),
        ((7, 5), {}, ["needs compute capability 8.0 or later"]),
        ((9, 0), dict(head_dim=256), []),
        ((9, 0), dict(head_dim=257), ["head size 257 is over 256"]),
        ((9, 0), dict(dtype=torch.float64), ["dtype float64 is not one of float16, bfloat16, float32"]),
    ],
)
def test_reasons_of_gpu_kernels(capability, change, reasons, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    call = dispatch.Call("moba_attention", torch.device("cuda"), torch.bfloat16, 64)._replace(**change)
    assert dispatch.triton_reasons(call) == reasons
    assert [r for r in dispatch.cuda_reasons(call) if "not installed" not in r] == reasons


def test_auto_takes_a_gpu_kernel_only_where_it_is_verified(monkeypatch, tmp_path):
    call = dispatch.Call("moba_attention", torch.device("cuda"), torch.bfloat16, 64)
    able = {"triton": lambda _: [], "portable": lambda _: []}
    record = json.dumps(
        {"schema_version": 1, "verified": [{"kernel": "moba_attention", "backend": "triton", "gpu": "Some GPU"}]}
    )
    (tmp_path / "verified.json").write_text(record)
    monkeypatch.setattr(dispatch.resources, "files", lambda _: tmp_path)
    for name, chosen in (("Some GPU", "triton"), ("Other GPU", "portable")):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_, name=name: name)
        dispatch._verified.cache_clear()
        assert dispatch.pick(call, "auto", able) == chosen
        assert dispatch.pick(call, "triton", able) == "triton"
        assert dispatch.pick(call._replace(fn="full_attention"), "auto", able) == "portable"
    dispatch._verified.cache_clear()


def test_selection_replays():
    options = dict(block_size=4, topk=2, routing="group")
    selection = attnlab.moba_select(Q, K, **options)
    want = attnlab.moba_attention(Q, K, V, **options)
    assert torch.equal(attnlab.moba_attention(Q, K, V, selection=selection, **options), want)
    other = selection._replace(indices=selection.indices.roll(1, 0))
    assert not torch.equal(attnlab.moba_attention(Q, K, V, selection=other, **options), want)


@pytest.mark.parametrize(
    "options",
    [OPTIONS, dict(block_size=3, topk=2, routing="group", sink_blocks=1), dict(block_size=3, topk=2, causal=False)],
)
def test_gradcheck_portable(options):
    q, k, v = (x.requires_grad_() for x in gaussian(1, 7, 9, 2, 1, 3, dtype=torch.float64))
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def fn(q, k, v, sinks):
        return attnlab.moba_attention(q, k, v, sinks=sinks, return_lse=True, backend="portable", **options)

    assert torch.autograd.gradcheck(fn, (q, k, v, sinks))


@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
def test_no_gradient_through_the_gate(backend):
    x = [t.clone().requires_grad_() for t in (Q, K, V)]
    selection = attnlab.moba_select(*x[:2], backend=backend, **OPTIONS)
    assert not selection.scores.requires_grad
    free = torch.autograd.grad(attnlab.moba_attention(*x, backend=backend, **OPTIONS).square().sum(), x)
    fixed = attnlab.moba_attention(*x, backend=backend, selection=selection, **OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip(free, torch.autograd.grad(fixed.square().sum(), x), strict=True))


def results(backend):
    """All public functions, forward and backward."""
    x = [t.clone().requires_grad_() for t in (Q, K, V)]
    sparse = attnlab.moba_attention(*x, backend=backend, **OPTIONS)
    other = "portable" if backend == "cpu" else backend
    dense, lse = attnlab.full_attention(*x, return_lse=True, backend=other)
    merged, _ = attnlab.merge_states(torch.stack([sparse, dense]), torch.stack([lse, lse]), backend=other)
    scores = attnlab.moba_select(*x[:2], backend=backend, **OPTIONS).scores
    cache = attnlab.MoBACache(2, 16, 2, 8, block_size=4)
    cache.append(K, V)
    step = attnlab.moba_decode(Q[:, -1:], cache, topk=2, backend=backend)
    return sparse, dense, merged, scores, step, *torch.autograd.grad(merged.square().sum(), x)


@pytest.mark.parametrize("backend", ["cpu", "portable", "reference"])
def test_autocast_changes_nothing(backend):
    want = results(backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(backend)
    for name, a, b in zip(["sparse", "dense", "merged", "scores", "step", "dq", "dk", "dv"], found, want, strict=True):
        if backend != "reference" or not name.startswith("d"):  # autograd of the reference is PyTorch's own
            assert torch.equal(a, b), name


def flat_arguments(sinks):
    packs = [x.flatten(0, 1).clone().requires_grad_() for x in (Q, K, V)]
    return *packs, sinks, cu(0, 16, 32), cu(0, 16, 32)


SPEC = (4, 2, True, 0.3, False, 0, 0, 1 << 20, 16, False)  # ..., max_k, given


@pytest.mark.parametrize("backend", ["cpu", "portable"])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_opcheck(with_sinks, backend):
    q, k, v, sinks, cu_q, cu_k = flat_arguments(torch.zeros(4, requires_grad=True) if with_sinks else None)
    ops = torch.ops.attnlab
    torch.library.opcheck(ops.moba_select, (q.detach(), k.detach(), cu_q, cu_k, *SPEC, True, backend))
    indices, _ = ops.moba_select(q, k, cu_q, cu_k, *SPEC, False, backend)
    for replayed, held in ((False, indices), (True, indices.unflatten(0, (2, 16)))):
        torch.library.opcheck(ops.moba_attention, (q, k, v, sinks, held, cu_q, cu_k, *SPEC, replayed, backend))
    torch.library.opcheck(ops.full_attention, (q, k, v, sinks, cu_q, cu_k, True, None, 0.3, False, "portable"))
    outs, lses = torch.randn(3, 5, 8, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    torch.library.opcheck(ops.merge_states, (outs, lses, None, None, None, 1.0, False, outs.dtype, None, "portable"))


def test_compiles_whole_with_dynamic_lengths():
    def fn(q, k, v):
        return attnlab.moba_attention(q, k, v, return_lse=True, **OPTIONS)

    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    for t in (30, 41, 64):
        x = [y.requires_grad_() for y in gaussian(2, t, t, 4, 2, 8)]
        want, found = fn(*x), compiled(*x)
        assert all(torch.equal(a, b) for a, b in zip(want, found, strict=True))
        grads = [torch.autograd.grad(y[0].sum() + y[1].sum(), x) for y in (want, found)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_lengths_without_keys():
    q, k, v = gaussian(2, 3, 0, 2, 1, 8)
    out, lse = attnlab.moba_attention(q, k, v, causal=False, return_lse=True, **OPTIONS)
    assert (out == 0).all() and (lse == -math.inf).all()
    with_sink = attnlab.moba_attention(
        q, k, v, causal=False, return_lse=True, sinks=torch.tensor([1.0, 2.0]), **OPTIONS
    )
    assert (with_sink[0] == 0).all() and torch.equal(with_sink[1][0, 0], torch.tensor([1.0, 2.0]))
