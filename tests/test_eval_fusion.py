"""Reuse of chunks as a method: what is reused and computed anew, where a context is cut, what is refused."""

import typing

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import attnlab.fusionrag.pool
from attnlab.evals import story_fusion
from attnlab.evals.harness.errors import UsageError
from attnlab.evals.harness.method import Batch, Subject
from attnlab.evals.harness.task import Prompt, sample_rng
from attnlab.evals.methods import METHODS, parse
from attnlab.evals.methods.fusion import Fusion, alike, cut
from attnlab.evals.tasks import make
from attnlab.evals.testbed.model import seeded
from attnlab.evals.testbed.recipe import Sizes
from attnlab.evals.testbed.vocabulary import BOS, tokenizer
from attnlab.fusionrag import SELECTORS, ChunkStore, FusionRAG
from attnlab.fusionrag.loading import Source
from tests.fusionrag_plain import answer
from tests.hf_models import build

pytestmark = pytest.mark.usefixtures("one_thread")


def subject_of(model, tokens):
    model.generation_config = transformers.GenerationConfig(eos_token_id=[tokens.eos_token_id], pad_token_id=0)
    return Subject("tiny", model, tokens, 4096, "0")


@pytest.fixture(scope="module")
def testbed():
    """Two layers with rotary positions and two without, at random but for the seeded circuit."""
    sizes = Sizes(hidden=64, layers=4, heads=4, kv_heads=2, intermediate=80)
    return subject_of(seeded(sizes, 0).eval().requires_grad_(False), tokenizer())


@pytest.fixture(scope="module")
def bytes_():
    """A tokenizer of pieces of words that takes the space in front of a word into its token."""
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    texts = ["the cat sat on the mat\n\nthe dog ran to the cat. where is the mat? on the dog. "] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokens.add_special_tokens(["<s>", "</s>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>")
    return subject_of(build("qwen3", vocab_size=320, max_position_embeddings=512), fast)


def batch_of(subject, prompts):
    contexts = [[*subject.start, *subject.ids(p.context)] for p in prompts]
    return Batch(subject, prompts, 0, contexts, [subject.ids(p.question) for p in prompts])


def documents(subject, count=3, length=192):
    task = make("testbed_documents")
    return batch_of(
        subject, [task.build(subject, length, i, sample_rng(0, task.name, length, i)) for i in range(count)]
    )


def answers(text, batch):
    (method,) = parse(text)
    return method.answer(batch)


def prompt(*chunks, context=None, question=" where?", new=4):
    return Prompt(context or "read: " + "".join(chunks), question, ("on",), new, tuple(chunks))


@pytest.mark.parametrize("kind", ["testbed", "bytes_"])
def test_all_tokens_computed_anew_give_the_answers_of_full_attention(kind, request):
    subject = request.getfixturevalue(kind)
    if kind == "testbed":
        batch = documents(subject)
    else:
        chunks = ("the cat sat", " on the mat\n\n", "the dog ran to", " the cat. ")
        batch = batch_of(subject, [prompt(*chunks, new=8), prompt(*chunks[::-1], question=" is the dog?", new=3)])
    full, every = answers("full", batch), answers("fusionrag:rate=1", batch)
    assert [a.tokens for a in every] == [a.tokens for a in full]
    assert [a.text for a in every] == [a.text for a in full]
    assert len({tuple(a.tokens) for a in full}) > 1
    for found, item, context in zip(every, batch.items, batch.context_ids):
        system, parts = cut(subject, item, context)
        stale = len(context) - len(system) - len(parts[0])  # behind the system prompt alone, the first chunk is exact
        assert found.budget == stale / (len(context) - len(system))


@pytest.mark.parametrize(
    "spec, share", [("reuse", 0), ("fusionrag:rate=.3+selector=first_k", 0.3), ("fusionrag", 0.15)]
)
def test_answers_are_those_of_a_cache_put_together_by_hand(testbed, spec, share):
    batch = documents(testbed)
    for found, item, context, question in zip(
        answers(spec, batch), batch.items, batch.context_ids, batch.question_ids, strict=True
    ):
        system, chunks = cut(testbed, item, context)
        size = len(context) - len(system)
        chosen = []
        if "first_k" in spec:
            offsets = [(i, at) for chunk in [list(range(len(c))) for c in chunks] for i, at in enumerate(chunk)]
            order = sorted(range(len(chunks[0]), size), key=lambda at: (offsets[at][0], at))
            chosen = sorted(len(system) + at for at in order[: round(share * size)])
        assert found.budget == round(share * size) / size
        if spec != "fusionrag":
            tokens, _ = answer(testbed.model, system, chunks, question, chosen, item.max_new_tokens)
            ends = testbed.model.generation_config.eos_token_id
            stop = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
            assert found.tokens == tokens[:stop]
        assert found.text == testbed.text(found.tokens)


def test_the_end_of_a_sequence_is_no_part_of_an_answer(testbed):
    batch = documents(testbed)
    free = answers("reuse", batch)
    ends = testbed.model.generation_config.eos_token_id
    testbed.model.generation_config.eos_token_id = [free[0].tokens[1]]
    try:
        ended = answers("reuse", batch)
    finally:
        testbed.model.generation_config.eos_token_id = ends
    assert ended[0].tokens == free[0].tokens[: free[0].tokens.index(free[0].tokens[1])]


def test_chosen_tokens_depend_on_the_prompt_and_the_seed_alone(testbed, monkeypatch):
    seeds = []
    generate = FusionRAG.generate
    monkeypatch.setattr(
        FusionRAG, "generate", lambda *args, **given: seeds.append(given["seed"]) or generate(*args, **given)
    )
    batch = documents(testbed)
    first = answers("fusionrag:selector=random", batch)
    again = answers("fusionrag:selector=random", documents(testbed))
    assert [a.tokens for a in first] == [a.tokens for a in again]
    batch.seed = 1
    answers("fusionrag:selector=random", batch)
    assert len(set(seeds[:3])) == 3 and seeds[:3] == seeds[3:6] and not set(seeds[:3]) & set(seeds[6:])


def test_methods_of_a_batch_share_its_chunks(testbed, monkeypatch):
    computed = []
    compute = Source.compute
    monkeypatch.setattr(Source, "compute", lambda self, chunk: computed.append(chunk) or compute(self, chunk))
    batch = documents(testbed, count=2)
    once = answers("reuse", batch)
    size = len(computed)
    assert size == len(set(computed)) == sum(len(item.chunks) for item in batch.items)
    assert [a.tokens for a in answers("reuse", batch)] == [a.tokens for a in once]
    answers("fusionrag", batch)
    assert len(computed) == size
    answers("fusionrag:neighbours=2", batch)
    assert [a.tokens for a in answers("reuse", batch)] == [a.tokens for a in once]
    assert len(computed) == size


def test_neighbours_are_the_prompt_s_own_chunks(testbed, monkeypatch):
    stored = []
    monkeypatch.setattr(ChunkStore, "put", lambda self, kv, put=ChunkStore.put: stored.append(kv) or put(self, kv))
    batch = documents(testbed, count=1)
    answers("fusionrag:neighbours=3", batch)
    system, chunks = cut(testbed, batch.items[0], batch.context_ids[0])
    final = {kv.key.digest: kv.neighbours for kv in stored}
    assert len(final) == len(chunks)
    key = {kv.key.content: kv.key.digest for kv in stored}
    lists = alike(testbed.model, chunks, 3)
    rag = FusionRAG(testbed.model, system=system)
    digests = [key[rag._source.key(chunk).content] for chunk in chunks]
    assert [final[d] for d in digests] == [tuple(digests[j] for j in others) for others in lists]


def test_chunks_are_alike_where_their_words_are(testbed):
    model = testbed.model
    chunks = [(20, 21, 22), (40, 41, 42), (22, 20, 23), (41, 42, 60)]
    assert [others[0] for others in alike(model, chunks, 1)] == [2, 3, 0, 1]
    assert [sorted(others) for others in alike(model, chunks, 9)] == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert alike(model, chunks[:1], 2) == [[]]


def test_a_context_is_cut_at_its_chunks(testbed, bytes_):
    (batch, item) = (b := documents(testbed, 1)), b.items[0]
    system, chunks = cut(testbed, item, batch.context_ids[0])
    assert system == (BOS, *testbed.ids("<documents>"))
    assert [testbed.text(chunk) for chunk in chunks] == [testbed.text(testbed.ids(chunk)) for chunk in item.chunks]
    assert {len(chunk) for chunk in chunks[:-1]} == {24}
    for parts in (("the cat", " sat", " on", "?"), ("a", "a", "ab", "a"), ("ön the mat", "\n\n", "the")):
        for between in ("", " ", "\n\n"):
            context = "read the cat: " + between.join(parts)
            ids = [*bytes_.start, *bytes_.ids(context)]
            system, chunks = cut(bytes_, prompt(*parts, context=context), ids)
            assert [*system, *(t for chunk in chunks for t in chunk)] == ids
            assert len(system) > 1 and len(chunks) <= len(parts)
            at = len("read the cat: ")
            texts = [bytes_.text(chunk) for chunk in chunks]
            assert bytes_.text(system[1:]).rstrip() == "read the cat:"
            assert "".join(texts).strip() == context[at:].strip()


def test_a_token_on_a_border_belongs_to_the_chunk_behind_it(bytes_):
    context = "read: sat the cat on the mat"
    ids = bytes_.ids(context)
    _, chunks = cut(bytes_, prompt("sat", "the cat", "on the mat", context=context), ids)
    assert [bytes_.text(chunk) for chunk in chunks][1:] == [" the cat", " on the mat"]
    assert bytes_.ids(" the") != bytes_.ids("the")


def test_a_chunk_that_comes_again_is_found_where_it_is(bytes_):
    parts = ("on the mat", ". the cat", ". on the mat", ". the cat")
    item = prompt(*parts)
    system, chunks = cut(bytes_, item, bytes_.ids(item.context))
    assert [bytes_.text(chunk).lstrip() for chunk in chunks] == list(parts)
    with pytest.raises(ValueError, match="must end with its chunks, in order: no 'the cat'"):
        cut(bytes_, prompt("the cat", "on the mat", context="on the mat the cat"), [])


def test_what_is_refused_before_anything_runs(testbed, bytes_):
    (method,) = parse("fusionrag:selector=kv_deviation")
    method.check(testbed)
    with pytest.raises(
        UsageError, match=r"'fusionrag:selector=kv_deviation' answers questions about .*, niah has none"
    ):
        method.check_item("niah", Prompt("a", "b", ("c",), 1))
    with pytest.raises(UsageError, match="text_loss has none"):
        method.check_item("text_loss", torch.zeros(3))
    with pytest.raises(UsageError, match="answers questions about retrieved chunks"):
        method.answer(batch_of(testbed, [Prompt("k000", "k001", ("c",), 1)]))
    with pytest.raises(UsageError, match=r"cannot serve model 'tiny': .* model must be of type llama, .*'gpt_oss'"):
        method.check(Subject("tiny", build("gpt_oss"), bytes_.tokenizer, 64, ""))
    with pytest.raises(UsageError, match="reads the second layer, the model has one"):
        method.check(Subject("tiny", build("llama", num_hidden_layers=1), bytes_.tokenizer, 64, ""))

    class Slow:
        is_fast = False

    with pytest.raises(UsageError, match="the tokenizer of 'tiny' does not tell where tokens stand"):
        method.check(Subject("tiny", testbed.model, Slow(), 64, ""))
    with pytest.raises(UsageError, match="no attention of its own"):
        method.attend(*[torch.zeros(1, 1, 1, 1)] * 3, 1.0)


def test_prompts_longer_than_reuse_can_take(bytes_):
    window = subject_of(build("mistral", vocab_size=320, sliding_window=12), bytes_.tokenizer)
    (method,) = parse("reuse")
    batch = batch_of(window, [prompt("the cat", " sat", " on", " the mat where the dog ran")])
    with pytest.raises(
        UsageError, match=r"^method 'reuse' on 'tiny': prompt and answer: \d+ tokens, over 12: .* window"
    ):
        method.answer(batch)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fusionrag:rate=1.5", r"rate must be in \[0, 1\], got 1.5"),
        ("fusionrag:rate=nan", r"rate must be in \[0, 1\], got nan"),
        ("fusionrag:rate=x", "option 'rate' must be a number, got 'x'"),
        ("fusionrag:neighbours=-1", "neighbours must be 0 or more, got -1"),
        ("fusionrag:selector=frist_k", "option 'selector' must be one of fusionrag, .*got 'frist_k'"),
        ("reuse:rate=0", "it has no options, got 'rate'"),
    ],
)
def test_options(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_options_are_the_library_s():
    assert set(typing.get_args(typing.get_type_hints(Fusion)["selector"])) == set(SELECTORS)
    assert METHODS["reuse"]().rate == 0 and METHODS["fusionrag"]().rate == 0.15


def test_the_mask_of_the_notebook_is_all_that_changes(testbed):
    spec = "fusionrag:selector=first_k"
    found, plain = story_fusion.masks(testbed, spec, 1), story_fusion.answers(testbed, [spec], 1)[spec]
    assert found["exact"] == (plain, 0.0) and plain.budget == pytest.approx(0.15, abs=1e-3)
    assert 0.4 < found["bottom_right"].future < 0.5  # computed tokens are at N / 2 on average, and taken to be at N
    assert attnlab.fusionrag.pool.selective_attention is attnlab.fusionrag.selective_attention
    for size in (24, 96):
        (batch,) = story_fusion._batches(testbed, make("testbed_documents"), 1, size)
        _, chunks = cut(testbed, batch.items[0], batch.context_ids[0])
        assert {len(chunk) for chunk in chunks[:-1]} == {size} and len(chunks[-1]) <= size
