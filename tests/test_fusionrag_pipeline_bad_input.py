import dataclasses

import pytest
import torch
import transformers

from attnlab.fusionrag import ChunkStore, FusionRAG, hook
from tests.fusionrag_plain import words
from tests.test_fusionrag_pipeline import CHUNKS, SYSTEM, ask, model_of, stored

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return model_of()


class Foreign(ChunkStore):
    """A store that hands out one chunk whatever it is asked for."""

    def __init__(self, kv):
        super().__init__()
        self.kv = kv

    def tier(self, key):
        return "ram"

    def get_many(self, keys):
        return [self.kv] * len(keys)


@pytest.mark.parametrize("change", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}])
def test_a_chunk_of_another_model_or_rope_is_refused(model, change):
    other = model_of(**change)
    if not change:
        other.lm_head.weight.data[0] += 1
    kv = stored(FusionRAG(other, system=SYSTEM), CHUNKS[0])
    with pytest.raises(ValueError, match=r"FusionRAG: the store must hand out chunk .* got .* another model, rope"):
        ask(FusionRAG(model, store=Foreign(kv), system=SYSTEM), chunks=[CHUNKS[0]])
    store = ChunkStore()
    store.put(kv)
    assert ask(FusionRAG(model, store=store, system=SYSTEM), chunks=[CHUNKS[0]]).report.total("loaded") == 0


def test_a_chunk_of_another_dtype_or_shape_is_refused(model):
    store = ChunkStore()
    rag = FusionRAG(model, store=store, system=SYSTEM)
    kv = stored(rag, CHUNKS[0])
    for k, v, came in (
        (kv.k.half(), kv.v.half(), "float16"),
        (kv.k[:1], kv.v[:1], r"\[1, 12, 2, 8\]"),
        (kv.k[:, :, :1], kv.v[:, :, :1], r"\[3, 12, 1, 8\]"),
    ):
        store.put(dataclasses.replace(kv, k=k, v=v))
        with pytest.raises(ValueError, match=rf"as \[3, 12, 2, 8\] of torch.float32, got .*{came}"):
            ask(rag, chunks=[CHUNKS[0]])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rate": 1.01}, r"rate must be a number in \[0, 1\], got 1.01"),
        ({"rate": -0.1}, "rate must be a number"),
        ({"rate": float("nan")}, "rate must be a number"),
        ({"rate": True}, "rate must be a number"),
        ({"rate": "1"}, "rate must be a number"),
        ({"chunks": []}, "chunks must be a list of at least one chunk"),
        ({"chunks": "w1 w2"}, "chunks must be a list of at least one chunk"),
        ({"chunks": [[1], []]}, r"chunks\[1\] must have at least one token"),
        ({"chunks": ["w1", ""]}, r"chunks\[1\] must have at least one token"),
        ({"chunks": [[[1]], [[2]]]}, "chunks must be one list for all or one per question, 1, got 2"),
        ({"chunks": [["w1", ""]]}, r"chunks\[0\]\[1\] must have at least one token"),
        ({"chunks": [[1], [61]]}, r"chunks\[1\] must hold token ids in \[0, 61\), got 61"),
        ({"questions": ""}, r"questions\[0\] must have at least one token"),
        ({"questions": []}, "questions must be a question or a list of at least one"),
        ({"questions": ["w1", ""]}, r"questions\[1\] must have at least one token"),
        ({"selector": "fusionrga"}, "selector must be one of 'fusionrag'.* did you mean 'fusionrag'"),
        ({"selector": "best"}, "selector must be one of .* got 'best'$"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a positive int, got 0"),
        ({"selector": ["fusionrag"]}, r"selector must be one of .* got \['fusionrag'\]; did you mean"),
        ({"max_new_tokens": 216}, "system prompt.* question 0 .* 257 tokens, over 256"),
        ({"seed": -1}, "seed must be a non-negative int"),
    ],
)
def test_bad_input(model, change, match):
    with pytest.raises(ValueError, match="FusionRAG.generate: " + match):
        ask(FusionRAG(model, words(), system=[1]), **change)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"chunks": [1, 2]}, r"chunks\[0\] must be a sequence of ints"),
        ({"chunks": [[1.5]]}, r"chunks\[0\]\[0\] must be a sequence of ints"),
        ({"chunks": [torch.ones(2, 2).long()]}, r"chunks\[0\] must be a sequence of ints"),
        ({"questions": [[True]]}, r"questions\[0\] must be a sequence of ints"),
    ],
)
def test_ids_are_ints(model, change, match):
    with pytest.raises(TypeError, match="FusionRAG.generate: " + match):
        ask(FusionRAG(model), **change)


def test_a_store_without_room_for_a_chunk_says_so(model, tmp_path):
    store = ChunkStore(tmp_path, ram_bytes=100, disk_bytes=100)
    rag, size = FusionRAG(model, store=store), 2 * 12 * 3 * 2 * 8 * 4
    for call in (lambda: ask(rag), lambda: rag.preprocess(CHUNKS, 0, progress=False)):
        with pytest.raises(ValueError, match=f"a chunk of {size} bytes is over every budget: ram_bytes=100, disk_byt"):
            call()
    assert not store.keys()


@pytest.mark.parametrize("name", ["rotate_on_load", "return_logits"])
def test_flags_are_bools(model, name):
    with pytest.raises(TypeError, match=f"{name} must be a bool, got 1"):
        ask(FusionRAG(model), **{name: 1})


def test_text_needs_a_tokenizer(model):
    with pytest.raises(TypeError, match=r"questions\[0\] must be token ids, as there is no tokenizer"):
        ask(FusionRAG(model), "w1")
    with pytest.raises(TypeError, match="system must be token ids"):
        FusionRAG(model, system="w1")


def test_models_it_does_not_know_are_refused(model):
    with pytest.raises(ValueError, match="must have a language model's head, got LlamaModel"):
        FusionRAG(model.base_model)
    with pytest.raises(TypeError, match="store must be a ChunkStore or None, got str"):
        FusionRAG(model, store="folder")
    with pytest.raises(ValueError, match=r"FusionRAG: backend must be one of 'auto', 'triton', .* got 'cuda'"):
        FusionRAG(model, backend="cuda")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)
    with pytest.raises(ValueError, match="llama, mistral, qwen2, qwen3, smollm3"):
        FusionRAG(transformers.AutoModelForCausalLM.from_config(config))


def test_its_attention_is_not_for_others(model):
    ask(FusionRAG(model))
    model.set_attn_implementation(hook.NAME)
    try:
        with pytest.raises(ValueError, match="runs inside FusionRAG only"):
            model(torch.tensor([[1]]))
    finally:
        model.set_attn_implementation("sdpa")
