import copy
import dataclasses
import threading
import time

import pytest
import torch

import attnlab.fusionrag.pipeline as pipeline
from attnlab.fusionrag import SELECTORS, FusionRAG, hook
from attnlab.fusionrag.pool import Pool
from attnlab.fusionrag.store import ChunkKV, ChunkStore
from attnlab.testing import assert_accurate
from tests import fusionrag_oracle
from tests.fusionrag_plain import answer, full, ids, merging, stitched, text, words
from tests.hf_models import CLOSE, build

SYSTEM, QUESTION = ids(5, 0), ids(6, 1)
CHUNKS = [ids(n, 2 + n) for n in (12, 9, 14)]
STEPS = 6
SCALED = {
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 2.0},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(kind="llama", scaling=None, **changes):
    if scaling:
        changes["rope_parameters"] = {"rope_type": scaling, "rope_theta": 10000.0, **SCALED[scaling]}
    model = build(kind, **changes)
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


@pytest.fixture(scope="module")
def exact():
    """The model in float64, in which no rounding hides a difference."""
    return model_of().double()


def ask(rag, questions=QUESTION, chunks=CHUNKS, **options):
    return rag.generate(questions, chunks, **{"max_new_tokens": STEPS, "return_logits": True, **options})


def same(a, b, row=0, other=0):
    assert a.tokens[row] == b.tokens[other]
    assert a.logits[row].dtype == torch.float64
    torch.testing.assert_close(a.logits[row], b.logits[other], rtol=0, atol=1e-9)


def watched(monkeypatch):
    """The pools that calls make from now on."""
    pools = []

    class Kept(Pool):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            pools.append(self)

    monkeypatch.setattr(pipeline, "Pool", Kept)
    return pools


def stored(rag, chunk, neighbours=()):
    """A chunk's entry as preprocessing would leave it, values made up."""
    key, facts = rag._source.key(tuple(chunk)), rag.facts
    g = torch.Generator().manual_seed(sum(chunk))
    k, v = (torch.randn(facts.layers, len(chunk), facts.kv_heads, facts.head_dim, generator=g) for _ in range(2))
    return ChunkKV(key, k, v, tuple(neighbours))


@pytest.mark.parametrize(
    ("kind", "scaling", "system"),
    [
        ("llama", None, SYSTEM),
        ("llama", None, []),
        ("qwen2", None, SYSTEM),
        ("qwen3", None, SYSTEM),
        ("mistral", None, SYSTEM),
        ("llama", "llama3", SYSTEM),
        ("qwen3", "yarn", SYSTEM),
        ("llama", "linear", []),
        ("smollm3", None, SYSTEM),
        ("smollm3", "yarn", []),
    ],
)
def test_rate_one_is_a_full_prefill_and_lower_rates_are_a_mixed_cache(kind, scaling, system):
    model = model_of(kind, scaling)
    rag = FusionRAG(model, system=system)
    tokens, logits = full(model, system, CHUNKS, QUESTION, STEPS)
    for turned in (False, True):
        every = ask(rag, rate=1, rotate_on_load=turned)
        assert every.tokens[0] == tuple(tokens)
        torch.testing.assert_close(every.logits[0], logits, **CLOSE)
        for rate, count in ((0, 0), (0.2, 7)):
            base = len(system) + len(CHUNKS[0])
            chosen = [base + 2 * i for i in range(count)]
            marks = torch.zeros(1, len(system) + 35)
            marks[0, chosen] = 1
            tokens_, logits_ = answer(model, system, CHUNKS, QUESTION, chosen, STEPS)
            mixed = ask(rag, rate=rate, selector=lambda _, marks=marks: marks, rotate_on_load=turned)
            assert mixed.tokens[0] == tuple(tokens_)
            torch.testing.assert_close(mixed.logits[0], logits_, **CLOSE)


@pytest.mark.parametrize("heads", [1, 4])
def test_grouped_heads(heads):
    model = model_of(num_key_value_heads=heads)
    every = ask(FusionRAG(model, system=SYSTEM), rate=1.0)
    tokens, logits = full(model, SYSTEM, CHUNKS, QUESTION, STEPS)
    assert every.tokens[0] == tuple(tokens)
    torch.testing.assert_close(every.logits[0], logits, **CLOSE)


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_backends(exact, backend):
    same(ask(FusionRAG(exact, system=SYSTEM, backend=backend)), ask(FusionRAG(exact, system=SYSTEM)))


@pytest.mark.parametrize("turned", [False, True])
def test_a_model_in_bfloat16(turned):
    half = fusionrag_oracle.model_of("llama", torch.bfloat16)
    half.set_attn_implementation("sdpa")
    truth, plain = (full(m, SYSTEM, CHUNKS, QUESTION, 1)[1] for m in (copy.deepcopy(half).double(), half))
    with torch.inference_mode():
        found = ask(FusionRAG(half, system=SYSTEM, store=ChunkStore()), rate=1, rotate_on_load=turned).logits[0][:1]
    assert found.dtype == torch.bfloat16
    assert_accurate(found, truth, plain.bfloat16())


@pytest.mark.parametrize("turned", [False, True])
def test_where_the_kernels_run(model, device, turned):
    """On Triton, every step; and only on a GPU does a tensor left on the wrong device show."""
    there = copy.deepcopy(model).to(device)
    questions, chunks, few = [QUESTION, ids(3, 70)], [CHUNKS, CHUNKS[:2]], {"max_new_tokens": 2, "rate": 0.3}
    want = ask(FusionRAG(model, system=SYSTEM), questions, chunks, rotate_on_load=turned, **few)
    found = ask(FusionRAG(there, system=SYSTEM, backend="triton"), questions, chunks, rotate_on_load=turned, **few)
    assert found.tokens == want.tokens
    for a, b in zip(found.logits, want.logits, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=2e-4, rtol=2e-4)


def test_a_cached_chunk_serves_any_order_as_if_it_were_computed_then(model, tmp_path):
    fresh = FusionRAG(model, system=SYSTEM)
    ram, disk = ChunkStore(), ChunkStore(tmp_path, ram_bytes=0)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 0]):
        chunks = [CHUNKS[i] for i in order]
        for rate in (0, 0.3):
            expected = ask(fresh, chunks=chunks, rate=rate)
            for store in (ram, disk):
                for _ in range(2):
                    found = ask(FusionRAG(model, store=store, system=SYSTEM), chunks=chunks, rate=rate)
                    assert found.tokens == expected.tokens
                    assert torch.equal(found.logits[0], expected.logits[0])
    report = ask(FusionRAG(model, store=ChunkStore(tmp_path), system=SYSTEM)).report
    size = 2 * sum(map(len, CHUNKS)) * 3 * 2 * 8 * 4
    assert report.loaded_bytes == {"disk": size}
    assert ask(FusionRAG(model, store=ram, system=SYSTEM)).report.loaded_bytes == {"ram": size}


@pytest.mark.parametrize("turned", [False, True])
def test_shared_chunks_are_never_written(model, turned, monkeypatch):
    store, pools = ChunkStore(), watched(monkeypatch)
    rag = FusionRAG(model, store=store, system=SYSTEM)
    ask(rag, rate=0)
    held = [store.get(rag._source.key(tuple(c))) for c in CHUNKS]
    before = [(kv.k.clone(), kv.v.clone()) for kv in held]
    questions = [QUESTION, ids(9, 50), ids(3, 51)]
    pools.clear()
    for rate in (0, 0.3, 1):
        ask(rag, questions, CHUNKS, rate=rate, rotate_on_load=turned)
    for kv, (k, v) in zip(held, before, strict=True):
        again = store.get(kv.key)
        assert torch.equal(again.k, k)
        assert torch.equal(again.v, v)
    idle, *busy = pools
    for pool in busy:
        assert pool.shared == idle.shared == len(SYSTEM) + sum(map(len, CHUNKS))
        assert torch.equal(pool.k[:, : pool.shared], idle.k[:, : pool.shared])
        assert torch.equal(pool.v[:, : pool.shared], idle.v[:, : pool.shared])
        assert int(pool.table.table.max()) >= pool.shared


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("selector", ["fusionrag", "prophet", "kv_deviation", "first_k", "random", "oracle"])
def test_a_batch_is_its_requests_one_by_one(exact, selector, turned):
    rag = FusionRAG(exact, system=SYSTEM, store=ChunkStore())
    questions = [QUESTION, ids(1, 60), ids(11, 61), ids(4, 62)]
    chunks = [CHUNKS, [CHUNKS[2]], [CHUNKS[1], ids(3, 63), CHUNKS[1], CHUNKS[0]], [CHUNKS[1], CHUNKS[0]]]
    options = {"rate": 0.4, "selector": selector, "rotate_on_load": turned}
    batch = ask(rag, questions, chunks, **options)
    for row, (question, own) in enumerate(zip(questions, chunks, strict=True)):
        alone = ask(rag, question, own, **options)
        same(batch, alone, row)
        unlike = {"loaded": 0, "computed": 0}  # the batch comes first, and leaves all chunks stored
        got, one = (dataclasses.replace(r, **unlike) for r in (batch.report.requests[row], alone.report.requests[0]))
        assert got == one


def test_chunks_shared_by_all_questions(exact):
    rag = FusionRAG(exact, system=SYSTEM, store=ChunkStore())
    questions = [QUESTION, ids(3, 70)]
    batch = ask(rag, questions, CHUNKS)
    for row, question in enumerate(questions):
        same(batch, ask(rag, question), row)
    assert batch.report.shared_slots == len(SYSTEM) + 35


def test_turning_keys_in_attention_equals_copying_them_turned(exact, monkeypatch):
    rag, pools = FusionRAG(exact, system=SYSTEM), watched(monkeypatch)
    chunks = [[*CHUNKS, CHUNKS[0]], [CHUNKS[2], CHUNKS[0]]]
    questions = [QUESTION, ids(4, 80)]
    for rate in (0, 0.3):
        copied, turned = (ask(rag, questions, chunks, rate=rate, rotate_on_load=x) for x in (False, True))
        for row in range(2):
            same(copied, turned, row, row)
    assert copied.report.shared_slots == len(SYSTEM) + 12 + 9 + 14 + 12 + 14 + 12
    assert turned.report.shared_slots == len(SYSTEM) + 12 + 9 + 14
    a, b = pools[:2]
    torch.testing.assert_close(a.keys(1, 40), b.keys(1, 40), rtol=0, atol=1e-9)
    assert torch.equal(a.values(1, 40), b.values(1, 40))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rotary", [[1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 1]])
def test_keys_of_layers_without_rope_stay_as_they_are(rotary, turned, monkeypatch):
    """Where attention adds nothing but in the last layer, what is stored is exact, and reuse is a full prefill."""
    model = model_of("smollm3", no_rope_layers=rotary).double()
    for layer in model.model.layers[:-1]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    tokens, logits = full(model, SYSTEM, CHUNKS, QUESTION, STEPS)
    rag = FusionRAG(model, system=SYSTEM, store=ChunkStore())
    rag.preprocess(CHUNKS, [[], [2], [0]], progress=False)
    options = {"rate": 0, "rotate_on_load": turned}
    reused = ask(rag, **options)
    assert reused.tokens[0] == tuple(tokens)
    torch.testing.assert_close(reused.logits[0], logits.double(), rtol=0, atol=1e-6)
    pools, (k, _) = watched(monkeypatch), stitched(model, SYSTEM, CHUNKS)
    ask(rag, **options)
    rag.facts = dataclasses.replace(rag.facts, rotary=(True,) * 3)
    ask(rag, **options)
    for layer, found in enumerate(k):
        right, always = (pool.keys(layer, 40)[0] for pool in pools)
        torch.testing.assert_close(right, found, rtol=0, atol=1e-6)
        assert rotary[layer] or (always - found).abs().max() > 0.1


@pytest.mark.parametrize("selector", ["fusionrag", "prophet", "kv_deviation", "oracle"])
def test_selectors_read_keys_as_attention_does(selector):
    rag = FusionRAG(model_of("smollm3", no_rope_layers=[0, 1, 0]).double(), system=SYSTEM)
    copied, turned = (ask(rag, rate=0.3, selector=selector, rotate_on_load=x) for x in (False, True))
    same(copied, turned)


def test_the_pool_holds_the_stitched_cache(model, monkeypatch):
    pools = watched(monkeypatch)
    ask(FusionRAG(model, system=SYSTEM), rate=0)
    k, v = stitched(model, SYSTEM, CHUNKS)
    for layer in range(3):
        torch.testing.assert_close(pools[0].keys(layer, 40)[0], k[layer], **CLOSE)
        torch.testing.assert_close(pools[0].values(layer, 40)[0], v[layer], **CLOSE)


def test_a_true_prefix_is_not_recomputed(model):
    store = ChunkStore()
    rag = FusionRAG(model, system=SYSTEM, store=store)
    lone = ask(rag, chunks=CHUNKS[:1], rate=0)
    tokens, logits = full(model, SYSTEM, CHUNKS[:1], QUESTION, STEPS)
    assert lone.tokens[0] == tuple(tokens)
    torch.testing.assert_close(lone.logits[0], logits, **CLOSE)
    report = ask(rag, rate=1).report.requests[0]
    assert (report.exact, report.recomputed, report.reused) == (12, 23, 12)
    store.put(stored(rag, CHUNKS[0], neighbours=["x"]))
    every = ask(rag, rate=1)
    report = every.report.requests[0]
    assert (report.exact, report.recomputed, report.reused) == (0, 35, 0)
    assert every.tokens[0] == tuple(full(model, SYSTEM, CHUNKS, QUESTION, STEPS)[0])


def test_the_report_adds_up(model):
    store = ChunkStore()
    FusionRAG(model, system=SYSTEM, store=store).generate(QUESTION, [CHUNKS[1]])
    start = time.perf_counter()
    report = ask(FusionRAG(model, system=SYSTEM, store=store), [QUESTION, ids(2, 90)], CHUNKS, rate=0.2).report
    assert report.ttft + report.decode <= time.perf_counter() - start
    for request, question in zip(report.requests, (6, 2), strict=True):
        assert (request.system, request.context, request.question) == (5, 35, question)
        assert (request.loaded, request.computed, request.exact) == (9, 26, 12)
        assert (request.recomputed, request.reused, request.generated) == (7, 28, STEPS)
        assert request.owned_slots == 7 + question + STEPS - 1
    parts = ("load", "compute", "rotate", "select", "recompute", "first_token")
    assert all(getattr(report, part) > 0 for part in (*parts, "decode"))
    assert report.ttft == pytest.approx(sum(getattr(report, part) for part in parts))
    assert (report.shared_slots, report.owned_slots) == (40, 2 * (7 + STEPS - 1) + 8)
    assert report.total("context") == 70
    assert "14 recomputed" in str(report)
    reused = ask(FusionRAG(model, system=SYSTEM, store=store), rate=0).report
    assert reused.select == reused.recompute == 0 < reused.first_token
    with pytest.raises(ValueError, match="name must be a field of RequestReport, got 'load'"):
        report.total("load")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.load = 0


def test_rows_end_on_their_own(exact, monkeypatch):
    rag, pools = FusionRAG(exact, system=SYSTEM), watched(monkeypatch)
    questions = [QUESTION, ids(7, 100), ids(4, 101)]
    free = ask(rag, questions, CHUNKS, max_new_tokens=12)
    end = free.tokens[0][2]
    exact.generation_config.eos_token_id = [end, free.tokens[1][4]]
    try:
        ended = ask(rag, questions, CHUNKS, max_new_tokens=12)
    finally:
        exact.generation_config.eos_token_id = None
    for row, tokens in enumerate(free.tokens):
        stop = next((i + 1 for i, t in enumerate(tokens) if t in (end, free.tokens[1][4])), 12)
        assert ended.tokens[row] == tokens[:stop]
        torch.testing.assert_close(ended.logits[row], free.logits[row][:stop], rtol=0, atol=1e-9)
        assert ended.report.requests[row].generated == stop
        assert int(pools[1].table.lengths[row]) == 40 + len(questions[row]) + stop - 1
    assert len(ended.tokens[0]) == 3
    assert ask(rag, max_new_tokens=1).tokens[0] == free.tokens[0][:1]


def test_text_is_tokenised_part_by_part(model):
    plain, begun = words(), words(bos=True)
    texts = [text(c) for c in CHUNKS]
    by_ids = ask(FusionRAG(model, system=SYSTEM))
    by_text = ask(FusionRAG(model, plain, system=text(SYSTEM)), text(QUESTION), texts)
    assert by_text.tokens == by_ids.tokens
    assert by_text.text == by_text.texts[0] == plain.decode(by_ids.tokens[0], skip_special_tokens=True)
    assert by_ids.text is None
    front = FusionRAG(model, begun, system=text(SYSTEM))
    assert front.system == (2, *SYSTEM)
    assert ask(front, text(QUESTION), texts).tokens == ask(FusionRAG(model, system=[2, *SYSTEM])).tokens
    assert FusionRAG(model, begun).system == (2,)
    assert FusionRAG(model, plain).system == FusionRAG(model, begun, system=[]).system == ()
    both = ask(FusionRAG(model, plain, system=SYSTEM), [text(QUESTION), text(ids(3, 110))], texts)
    assert len(both.texts) == 2
    with pytest.raises(ValueError, match="there are 2 answers"):
        _ = both.text


def test_a_tokenizer_that_merges_across_borders_never_sees_them(model):
    tokenizer = merging()
    assert tokenizer("ab")["input_ids"] == [3]
    rag = FusionRAG(model, tokenizer, store=ChunkStore())
    by_text = ask(rag, "ba", ["ba", "ba", "bba"])
    assert by_text.tokens == ask(FusionRAG(model), [2, 1], [[2, 1], [2, 1], [2, 2, 1]]).tokens
    assert by_text.report.total("context") == 7


def test_a_tensor_of_ids_is_text_too(exact):
    rag = FusionRAG(exact, system=torch.tensor(SYSTEM))
    same(ask(rag, torch.tensor(QUESTION), [torch.tensor(c) for c in CHUNKS]), ask(FusionRAG(exact, system=SYSTEM)))


def test_the_model_is_left_as_found(exact):
    exact.train()
    exact.base_model.layers[1].eval()
    modes = [m.training for m in exact.modules()]
    weights = {name: (x.clone(), x._version) for name, x in exact.state_dict().items()}
    before = exact.config.to_dict()
    try:
        first = ask(FusionRAG(exact, system=SYSTEM, store=ChunkStore()), rate=0.3, selector="kv_deviation")

        def failing(request):
            assert exact.config._attn_implementation == "sdpa"

            def watch(*_):
                assert exact.config._attn_implementation == hook.NAME
                raise RuntimeError("from inside a forward")

            request.ask(watch)

        with pytest.raises(RuntimeError, match="from inside a forward"):
            ask(FusionRAG(exact, system=SYSTEM), rate=0.3, selector=failing)
        assert modes == [m.training for m in exact.modules()]
    finally:
        exact.eval()
    assert exact.config._attn_implementation == "sdpa"
    assert exact.config.to_dict() == before
    assert all(p.grad is None and p.requires_grad for p in exact.parameters())
    for name, x in exact.state_dict().items():
        assert torch.equal(x, weights[name][0])
        assert x._version == weights[name][1]
    assert not first.logits[0].requires_grad
    same(first, ask(FusionRAG(exact, system=SYSTEM), rate=0.3, selector="kv_deviation"))


def test_preprocessed_chunks_are_found(model, monkeypatch):
    rag = FusionRAG(model, words(), store=ChunkStore(), system=text(SYSTEM))
    texts, vectors = [text(c) for c in CHUNKS], torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(pipeline, "embed", lambda found: vectors if found == texts else None)
    keys = rag.preprocess(texts, 2, progress=False)
    assert [len(rag.store.get(key).neighbours) for key in keys] == [2, 2, 2]
    found = ask(rag, chunks=texts, rate=1)
    assert (found.report.total("loaded"), found.report.total("recomputed")) == (35, 35)
    tokens, logits = full(model, SYSTEM, CHUNKS, QUESTION, STEPS)
    end = tokens.index(3) + 1 if 3 in tokens else STEPS
    assert found.tokens[0] == tuple(tokens[:end])
    torch.testing.assert_close(found.logits[0], logits[:end], **CLOSE)
    rag.preprocess(CHUNKS[:2], 1, embeddings=vectors[:2], progress=False)
    assert [len(rag.store.get(key).neighbours) for key in keys] == [1, 1, 2]
    rag.preprocess(CHUNKS, [[], [0], []], progress=False)
    assert [len(rag.store.get(key).neighbours) for key in keys] == [0, 1, 0]


def test_preprocessing_needs_a_store_and_embeddings(model):
    with pytest.raises(ValueError, match=r"FusionRAG.preprocess: there is no store"):
        FusionRAG(model).preprocess(CHUNKS)
    with pytest.raises(ValueError, match="embeddings must be given for chunks of token ids"):
        FusionRAG(model, store=ChunkStore()).preprocess(CHUNKS)
    for chunks in ("w1 w2", iter(CHUNKS)):
        with pytest.raises(
            TypeError, match=r"FusionRAG.preprocess: chunks must be a sequence of str or token ids, got"
        ):
            FusionRAG(model, words(), ChunkStore()).preprocess(chunks, 0)


def test_autocast_changes_nothing(exact):
    rag = FusionRAG(exact, system=SYSTEM)
    expected = ask(rag)
    with torch.autocast("cpu", torch.bfloat16):
        same(ask(FusionRAG(exact, system=SYSTEM)), expected)


def test_threads_take_turns(exact):
    expected, found = ask(FusionRAG(exact, system=SYSTEM)), []
    inside = []

    def slow(request):
        inside.append(1)
        threading.Event().wait(0.05)
        assert sum(inside) == 1
        inside.append(-1)
        return SELECTORS["fusionrag"](request)

    def call():
        found.append(ask(FusionRAG(exact, system=SYSTEM), selector=slow))

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for answer_ in found:
        same(answer_, expected)
    assert exact.config._attn_implementation == "sdpa"


def test_a_context_may_be_filled_to_the_last_position():
    model = model_of(max_position_embeddings=46)
    tokens, _ = full(model, SYSTEM, CHUNKS, QUESTION, 1)
    assert ask(FusionRAG(model, system=SYSTEM), rate=1, max_new_tokens=1).tokens[0] == tuple(tokens)


def test_a_model_without_generation_config_ends_as_its_configuration_says(exact):
    free, generation = ask(FusionRAG(exact, system=SYSTEM)), exact.generation_config
    exact.generation_config, exact.config.eos_token_id = None, free.tokens[0][1]
    try:
        assert ask(FusionRAG(exact, system=SYSTEM)).tokens[0] == free.tokens[0][:2]
    finally:
        exact.generation_config, exact.config.eos_token_id = generation, None
