"""The offline step: what is read of a model, chunks' keys and values alone and with neighbours, and resuming."""

import contextlib
import copy

import pytest
import torch

from attnlab.decoder_models import MODELS, dense, model_facts
from attnlab.fusionrag.models import KV, chunk_kv, run_behind, system_kv
from attnlab.fusionrag.neighbours import nearest
from attnlab.fusionrag.preprocess import moved, preprocess
from attnlab.fusionrag.store import ChunkKey, ChunkKV, ChunkStore
from attnlab.hf import MoBAPlan, set_plan
from attnlab.rope import RopeConfig
from attnlab.testing import assert_accurate
from tests.fusionrag_oracle import Written, model_of
from tests.hf_models import VOCAB, build

ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
}  # fmt: skip
KINDS = {
    "llama": ("llama", {}),
    "llama 1 kv head": ("llama", {"num_key_value_heads": 1}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}),
    "smollm3 without rope": ("smollm3", {"no_rope_layers": [0, 0, 0]}),
    **{f"llama {name}": ("llama", {"rope_parameters": {"rope_theta": 100.0, **rope}}) for name, rope in ROPES.items()},
}
SYSTEM = [7, 3, 11, 2, 29]
CHUNKS = [torch.randint(1, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 1, 14, 6, 11)]
LISTS = [[2, 1], [0], [3, 0, 1], [], [2, 3]]  # 0 and 2, and 0 and 1, wait for each other

OTHERS = [[4, 3], [2, 0], [], [1], [0]]

pytestmark = pytest.mark.usefixtures("one_thread")


def held(store, keys):
    return [(kv.k, kv.v, kv.neighbours) for kv in map(store.get, keys)]


def same(a, b):
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) and x[2] == y[2] for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def counted(model):
    """Lengths of the sequences that go through the model."""
    runs = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield runs
    hook.remove()


class Killed(Exception):
    pass


class Mortal(ChunkStore):
    """Dies at the put that is one too many."""

    left = 10**9

    def put(self, kv):
        if not self.left:
            raise Killed
        self.left -= 1
        super().put(kv)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_alone_is_its_part_of_a_full_prefill(kind, dtype):
    name, changes = KINDS[kind]
    model = model_of(name, dtype, **changes)
    facts = model_facts("f", model)
    found = chunk_kv(model, facts, system_kv(model, facts, SYSTEM), CHUNKS[0])
    with torch.no_grad():
        prefill = model(torch.tensor([SYSTEM + CHUNKS[0]]), use_cache=True).past_key_values.layers
    truths = Written(model).stored(CHUNKS[0], SYSTEM)
    for what, x, truth, plain in zip("kv", found, truths, ("keys", "values")):
        plain = torch.stack([getattr(layer, plain)[0].transpose(0, 1) for layer in prefill])
        assert x.dtype == dtype and not x.requires_grad
        assert_accurate(x, truth, plain[:, len(SYSTEM) :], what=f"{what} of {kind}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_with_neighbours_it_is_the_explicit_construction(kind, dtype):
    name, changes = KINDS[kind]
    model, store = model_of(name, dtype, **changes), ChunkStore()
    keys = preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, progress=False)
    exact, plain = Written(model), Written(model, dtype, moves=True)
    found = []
    for i, key in enumerate(keys):
        kv, others = store.get(key), [CHUNKS[j] for j in LISTS[i]]
        assert kv.neighbours == tuple(keys[j].digest for j in LISTS[i])
        found.append([(kv.k, kv.v), *(w.stored(CHUNKS[i], SYSTEM, others) for w in (exact, plain))])
    for what, *three in zip("kv", *(zip(*x) for x in zip(*found))):
        x, truth, p = (torch.cat(parts, 1) for parts in three)
        assert_accurate(x, truth, p, what=what)


def test_where_the_kernels_run(device):
    """Only there does a tensor left on the wrong device show."""
    here, there = build(), build().to(device)
    stores = [ChunkStore(), ChunkStore()]
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    for model, store, embeddings in zip((here, there), stores, (x, x.to(device))):
        keys = preprocess(model, store, CHUNKS, 2, system=SYSTEM, embeddings=embeddings, progress=False)
    for a, b in zip(*(held(store, keys) for store in stores), strict=True):
        for x, y in zip(a[:2], b[:2]):
            torch.testing.assert_close(x, y, rtol=0, atol=float(1e-4 * x.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "llama yarn", "smollm3"])
def test_without_a_prompt(kind):
    name, changes = KINDS[kind]
    model, store = build(name, **changes), ChunkStore()
    keys = preprocess(model, store, CHUNKS, LISTS, progress=False)
    kv, others = store.get(keys[2]), [CHUNKS[j] for j in LISTS[2]]
    truths, plains = (w.stored(CHUNKS[2], [], others) for w in (Written(model), Written(model, torch.float32, True)))
    for x, truth, plain in zip((kv.k, kv.v), truths, plains):
        assert_accurate(x, truth, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_stored_keys_serve_where_they_were_computed(kind):
    """Moved behind their neighbours again, stored keys and values are what the model itself has there."""
    name, changes = KINDS[kind]
    model, store = build(name, **changes), ChunkStore()
    keys = preprocess(model, store, CHUNKS, [[1], [], [], [], []], system=SYSTEM, progress=False)
    facts, base = model_facts("f", model), len(SYSTEM)
    chunk, other = store.get(keys[0]), store.get(keys[1])
    past = [system_kv(model, facts, SYSTEM), KV(moved(other.k, base, base, facts), other.v)]
    at = base + len(CHUNKS[1])
    own = run_behind(model, past, CHUNKS[0])
    torch.testing.assert_close(moved(chunk.k, base, at, facts), own.k, rtol=0, atol=4e-6 * own.k.abs().max())
    reused = run_behind(model, [*past, KV(moved(chunk.k, base, at, facts), chunk.v)], [5, 6])
    wanted = run_behind(model, past, CHUNKS[0] + [5, 6])
    for x, y in zip(reused, wanted):
        torch.testing.assert_close(x, y[:, -2:], rtol=0, atol=float(1e-5 * y.abs().max()))


def test_a_number_of_neighbours_are_the_nearest():
    model, x = build(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    lists, number = ChunkStore(), ChunkStore()
    keys = preprocess(model, lists, CHUNKS, nearest(x, 2), system=SYSTEM, progress=False)
    assert preprocess(model, number, CHUNKS, 2, system=SYSTEM, embeddings=x.numpy(), progress=False) == keys
    assert same(held(lists, keys), held(number, keys))
    preprocess(model, number, CHUNKS, system=SYSTEM, embeddings=x.tolist(), progress=False)  # 10, of which 4 exist
    assert [len(number.neighbours(key)) for key in keys] == [4] * 5


@pytest.mark.parametrize("folder", [False, True], ids=["scratch in memory", "scratch on disk"])
@pytest.mark.parametrize("puts", range(9))
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(puts, folder, tmp_path):
    model, whole = build(), ChunkStore()
    keys = preprocess(model, whole, CHUNKS, LISTS, system=SYSTEM, progress=False)
    path = tmp_path / "scratch" if folder else None
    store = Mortal(tmp_path / "store")
    store.left = puts
    stopped = pytest.raises(Killed) if puts < 8 else contextlib.nullcontext()  # 4 alone and 4 with neighbours
    with stopped:
        preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, scratch=ChunkStore(path), progress=False)
    store, scratch = ChunkStore(tmp_path / "store"), ChunkStore(path)
    with counted(model) as runs:
        preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, scratch=scratch, progress=False)
    assert same(held(store, keys), held(whole, keys))
    assert not scratch.keys()
    lost = 0 if folder else {5: 1, 6: 2, 7: 1}.get(puts, 0)  # replaced, and others wait for them
    assert len(runs) == (0 if puts == 8 else 1 + 8 - puts + lost)


def test_nothing_stays_in_scratch_of_a_run_that_goes_on_otherwise(tmp_path):
    model, store, scratch = build(), Mortal(), ChunkStore(tmp_path)
    store.left = 6
    with pytest.raises(Killed):
        preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, scratch=scratch, progress=False)
    assert scratch.keys()
    store.left = 99
    preprocess(model, store, CHUNKS, 0, system=SYSTEM, scratch=scratch, progress=False)
    assert not scratch.keys()


def test_work_is_done_once():
    model, store = build(), ChunkStore()
    with counted(model) as runs:
        keys = preprocess(model, store, [*CHUNKS, CHUNKS[2]], [*LISTS, LISTS[2]], system=SYSTEM, progress=False)
        assert runs == [len(SYSTEM)] + [len(CHUNKS[i]) for i in (0, 1, 2, 3, 0, 1, 2, 4)]  # 4 is nobody's neighbour
        assert keys[5] == keys[2] and len({key.digest for key in keys}) == 5
        runs.clear()
        assert preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, progress=False) == keys[:5]
        assert not runs
        others = preprocess(model, store, [torch.tensor(CHUNKS[0], dtype=torch.int32)], 0, progress=False)
        assert runs == [len(CHUNKS[0])]
        assert others[0].digest != keys[0].digest  # no prompt is another prompt


def test_other_neighbours_are_put_before_chunks_as_they_are_alone():
    model, fresh, used = build(), ChunkStore(), ChunkStore()
    keys = preprocess(model, fresh, CHUNKS, OTHERS, system=SYSTEM, progress=False)
    preprocess(model, used, CHUNKS, LISTS, system=SYSTEM, progress=False)
    preprocess(model, used, CHUNKS, OTHERS, system=SYSTEM, progress=False)
    assert same(held(used, keys), held(fresh, keys))
    alone = ChunkStore()
    preprocess(model, alone, CHUNKS, 0, system=SYSTEM, progress=False)
    preprocess(model, used, CHUNKS, 0, system=SYSTEM, progress=False)
    assert same(held(used, keys), held(alone, keys))


def test_what_a_store_or_scratch_lost_is_computed_again(tmp_path):
    model, whole = build(), ChunkStore()
    keys = preprocess(model, whole, CHUNKS, LISTS, system=SYSTEM, progress=False)
    store, small = ChunkStore(tmp_path, ram_bytes=0), ChunkStore(ram_bytes=1)
    preprocess(model, store, CHUNKS, 0, system=SYSTEM, progress=False)
    (tmp_path / f"{keys[3].digest}.safetensors").write_bytes(b"not one")
    altered = tmp_path / f"{keys[1].digest}.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"?")
    preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, scratch=small, progress=False)
    assert same(held(store, keys), held(whole, keys))
    size = whole.get(keys[2]).nbytes
    with pytest.warns(UserWarning, match="store's budget is too small: it dropped 4 of 5 chunks"):
        preprocess(model, ChunkStore(ram_bytes=size), CHUNKS, LISTS, system=SYSTEM, progress=False)


def test_scratch_may_not_be_the_store_s_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "link"):
        with pytest.raises(ValueError, match="preprocess: scratch must be another store than store"):
            preprocess(build(), ChunkStore(tmp_path), CHUNKS, LISTS, scratch=ChunkStore(path), progress=False)


def test_autocast_changes_nothing():
    model, plain, cast = build(), ChunkStore(), ChunkStore()
    keys = preprocess(model, plain, CHUNKS, LISTS, system=SYSTEM, progress=False)
    with torch.autocast("cpu", torch.bfloat16):
        preprocess(model, cast, CHUNKS, LISTS, system=SYSTEM, progress=False)
    for key in keys:
        assert torch.equal(cast.get(key).k, plain.get(key).k) and torch.equal(cast.get(key).v, plain.get(key).v)


@pytest.mark.parametrize("sparse", [False, True])
def test_the_model_is_left_as_it_was(sparse):
    model = build(attention_dropout=0.5).train()
    model.base_model.layers[1].eval()
    exact = ChunkStore()
    keys = preprocess(copy.deepcopy(model).eval(), exact, CHUNKS, LISTS, system=SYSTEM, progress=False)
    if sparse:
        set_plan(model, MoBAPlan(block_size=2, topk=1))
        model.set_attn_implementation("attnlab_moba")
    modes, weights = [m.training for m in model.modules()], copy.deepcopy(model.state_dict())
    chosen, store = model.config._attn_implementation, ChunkStore()
    found = preprocess(model, store, CHUNKS, LISTS, system=SYSTEM, progress=False)
    assert all(torch.equal(store.get(key).k, exact.get(old).k) for key, old in zip(found, keys))
    assert [m.training for m in model.modules()] == modes
    assert model.config._attn_implementation == chosen == ("attnlab_moba" if sparse else "sdpa")
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(Killed), dense(model):
        assert not torch.is_grad_enabled()
        raise Killed
    assert torch.is_grad_enabled() and model.training and model.config._attn_implementation == chosen


def test_neighbours_are_read_without_loading_the_chunk(tmp_path):
    key = ChunkKey.of([1, 2], model="m", rope=RopeConfig(theta=10.0, head_dim=4))
    k = torch.zeros(1, 2, 1, 4)
    for store in (ChunkStore(), ChunkStore(tmp_path), ChunkStore(tmp_path, ram_bytes=0)):
        store.clear()
        assert store.neighbours(key) is None
        store.put(ChunkKV(key, k, k, ("a", "b")))
        assert store.neighbours(key) == ("a", "b")
        store.put(ChunkKV(key, k, k))
        assert store.neighbours(key) == ()
        assert store.stats().hits == store.stats().misses == 0
    (file,) = tmp_path.glob("*.safetensors")
    other = ChunkKey.of([1, 3], model="m", rope=key.rope)
    file.rename(tmp_path / f"{other.digest}.safetensors")
    assert store.neighbours(other) is None and store.neighbours(key) is None
    file.write_bytes(b"cut")
    assert store.neighbours(key) is None
    with pytest.raises(TypeError, match=r"ChunkStore\.neighbours: expected a ChunkKey, got str"):
        store.neighbours("key")


def test_progress_is_for_those_who_ask(capsys):
    preprocess(build(), ChunkStore(), CHUNKS, LISTS, system=SYSTEM, progress=False)
    assert capsys.readouterr() == ("", "")
    preprocess(build(), ChunkStore(), CHUNKS, LISTS, system=SYSTEM)
    out, lines = capsys.readouterr()
    assert not out and lines.splitlines()[0].endswith("chunk 1 of 5 alone") and lines.splitlines()[-1].endswith("done")


def test_facts_of_each_type():
    for kind in MODELS:
        facts = model_facts("f", build(kind))
        assert (facts.layers, facts.heads, facts.kv_heads, facts.head_dim, facts.vocab) == (3, 4, 2, 8, VOCAB)
        assert facts.rope == RopeConfig(theta=2e6 if kind == "smollm3" else 1e4, head_dim=8)
        assert facts.rotary == (True, kind != "smollm3", True) and facts.device == torch.device("cpu")
    assert model_facts("f", build(rope_parameters={"rope_theta": 100.0, **ROPES["dynamic"]})).rope.scaling is None


@pytest.mark.parametrize(
    ("kind", "changes", "most", "why"),
    [
        ("llama", {}, 256, "the model's context"),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **ROPES["linear"]}}, 1024, "the model's context"),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **ROPES["llama3"]}}, 256, "the model's context"),
        (
            "llama",
            {"max_position_embeddings": 64, "rope_parameters": {"rope_theta": 100.0, **ROPES["yarn"]}},
            256,
            "the model's context",
        ),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **ROPES["yarn"]}}, 256, "the model's context"),
        ("llama", {"rope_parameters": {"rope_theta": 100.0, **ROPES["dynamic"]}}, 256, "dynamic NTK scaling"),
        ("mistral", {"sliding_window": 12}, 12, "the model's sliding window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, 9, "sliding window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, 256, "context"),
    ],
)
def test_lengths_a_model_cannot_take(kind, changes, most, why):
    model = build(kind, **changes)
    facts = model_facts("f", model)
    facts.check_length("f", "all", most)
    with pytest.raises(ValueError, match=rf"^f: all: {most + 1} tokens, over {most}: .*{why}"):
        facts.check_length("f", "all", most + 1)
    system = system_kv(model, facts, SYSTEM)
    ids = [1 + i % 7 for i in range(most - len(SYSTEM))]
    whole = run_behind(model, (), SYSTEM + ids)
    for x, y in zip(chunk_kv(model, facts, system, ids), whole):
        torch.testing.assert_close(x, y[:, len(SYSTEM) :], rtol=0, atol=float(1e-5 * y.abs().max()))
    with pytest.raises(ValueError, match="chunk_kv: system prompt and chunk: "):
        chunk_kv(model, facts, system, [*ids, 1])
    store = ChunkStore()
    with pytest.raises(ValueError, match=r"preprocess: chunks\[1\] behind the system prompt and 1 neighbours: "):
        preprocess(model, store, [ids[1:], [1, 2]], [[], [0]], system=SYSTEM, progress=False)
    assert not store.keys()


def test_a_dynamic_model_may_have_seen_a_long_sequence_before():
    model = build(rope_parameters={"rope_theta": 100.0, **ROPES["dynamic"]})
    fresh = run_behind(model, (), CHUNKS[0])
    model(torch.ones(1, 300, dtype=torch.int64))
    facts = model_facts("f", model)
    again = chunk_kv(model, facts, system_kv(model, facts, []), CHUNKS[0])
    assert torch.equal(again.k, fresh.k) and torch.equal(again.v, fresh.v)


def test_models_it_does_not_serve():
    with pytest.raises(ValueError, match="f: model must be of type llama, mistral, qwen2, qwen3, smollm3, got 'gpt"):
        model_facts("f", build("gpt_oss"))
    with pytest.raises(TypeError, match="f: model must be a transformers model, got Linear"):
        model_facts("f", torch.nn.Linear(2, 2))
    wrapped = torch.nn.Module()
    wrapped.config, wrapped.base_model = build().config, torch.nn.Module()
    with pytest.raises(TypeError, match="f: model must be a transformers model without adapters, got Module"):
        model_facts("f", wrapped)
    with pytest.raises(ValueError, match=r"f: model's rotary frequencies differ .*from_pretrained\(\.\.\., dtype="):
        model_facts("f", build().bfloat16())
    with pytest.raises(ValueError, match="f: model's rotary frequencies differ"):
        model_facts("f", build(rope_parameters={"rope_theta": 100.0, **ROPES["dynamic"]}).half())
    assert model_facts("f", model_of("llama", torch.bfloat16)).rope == model_facts("f", build().double()).rope
    with pytest.raises(ValueError, match="f: layer_types must be full_attention or sliding_attention, got 'chunked"):
        model_facts("f", build("qwen3", layer_types=["chunked_attention"] * 3, attention_chunk_size=8))
    with pytest.raises(ValueError, match="RopeConfig: rope_type must be default, linear"):
        longrope = {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "original_max_position_embeddings": 64}
        model_facts("f", build(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, **longrope}))
    split = build()
    split.base_model.layers[2].to("meta")
    with pytest.raises(ValueError, match="f: model must be on one device, got cpu and meta"):
        model_facts("f", split)


STORE = ChunkStore()
BAD = [
    (dict(store=None), TypeError, "store must be a ChunkStore, got NoneType"),
    (dict(scratch="x"), TypeError, "scratch must be a ChunkStore, got str"),
    (dict(store=STORE, scratch=STORE), ValueError, "scratch must be another store than store"),
    (dict(progress=1), TypeError, "progress must be a bool, got 1"),
    (dict(chunks=[]), ValueError, "chunks must hold at least one chunk, got none"),
    (dict(chunks="abc"), TypeError, "chunks must be a sequence of token id sequences, got str"),
    (dict(chunks=[1, 2]), TypeError, r"chunks\[0\] must be a sequence of ints .* got 1"),
    (dict(chunks=["abc"]), TypeError, r"chunks\[0\] must be a sequence of ints .* got 'abc'"),
    (dict(chunks=[[1], []]), ValueError, "chunks must hold at least one token each, got an empty one at 1"),
    (dict(chunks=[[1], [VOCAB]]), ValueError, r"chunks\[1\] must hold token ids in \[0, 61\), got 61"),
    (dict(chunks=[[3, -1]]), ValueError, r"chunks\[0\] must hold token ids in \[0, 61\), got -1"),
    (dict(chunks=[torch.ones(1, 3, dtype=torch.int64)]), TypeError, r"chunks\[0\] must be a sequence of ints"),
    (dict(chunks=[torch.ones(3)]), TypeError, r"chunks\[0\] must be a sequence of ints .*float32 tensor"),
    (dict(system=[99]), ValueError, r"system must hold token ids in \[0, 61\), got 99"),
    (dict(neighbours=-1), ValueError, "neighbours must be a non-negative int, got -1"),
    (dict(neighbours=True), ValueError, "neighbours must be a non-negative int, got True"),
    (dict(neighbours=1.5), TypeError, "neighbours must be an int or a list for each chunk, got float"),
    (dict(neighbours=2), ValueError, "embeddings must be given to find 2 neighbours of each chunk, got None"),
    (dict(neighbours=2, embeddings=torch.ones(4, 2)), ValueError, "embeddings must have 5 rows, one per chunk, got 4"),
    (dict(neighbours=2, embeddings="abc"), TypeError, r"embeddings must be an array \[N, E\], got str"),
    (dict(neighbours=2, embeddings=torch.zeros(5, 2)), ValueError, "embeddings must be finite and not zero, row 0"),
    (dict(embeddings=torch.ones(5, 2)), ValueError, "embeddings find neighbours where they are a number"),
    (dict(neighbours=[[1]]), ValueError, "neighbours must be 5 lists, one per chunk, got 1"),
    (dict(neighbours=[[5], [], [], [], []]), ValueError, r"neighbours\[0\] must be chunks in \[0, 5\), got 5"),
    (dict(neighbours=[[], [0, 1], [], [], []]), ValueError, r"neighbours\[1\] must be other chunks, got 1, the same"),
    (dict(neighbours=[[], [2, 0, 2], [], [], []]), ValueError, r"neighbours\[1\] must not repeat a chunk, got \[2, 0"),
    (dict(neighbours=[["a"], [], [], [], []]), TypeError, r"neighbours\[0\] must be a sequence of ints"),
    (dict(chunks=[[1], [2], [1]], neighbours=[[1], [], []]), ValueError, r"neighbours\[2\] must be as neighbours\[0\]"),
    (dict(chunks=[[1], [2], [1]], neighbours=[[2], [], [2]]), ValueError, r"neighbours\[0\] must be other chunks"),
    (dict(chunks=[[1], [2], [1]], neighbours=[[], [0, 2], []]), ValueError, r"neighbours\[1\] must not repeat a chunk"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "error", "message"), BAD)
def test_messages(given, error, message):
    given = dict(store=STORE, chunks=CHUNKS, neighbours=LISTS, progress=False) | given
    with pytest.raises(error, match=f"^preprocess: {message}"):
        preprocess(build(), **given)
    assert not STORE.keys()


def test_chunks_of_the_same_tokens_are_nobody_s_neighbour():
    model, store = build(), ChunkStore()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[5] = x[2]
    keys = preprocess(model, store, [*CHUNKS, CHUNKS[2]], 4, system=SYSTEM, embeddings=x, progress=False)
    assert keys[5] == keys[2]
    assert all(set(store.neighbours(key)) == {k.digest for k in keys} - {key.digest} for key in keys)
