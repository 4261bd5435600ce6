"""FusionRAG in plain code, one request at a time: what the pipeline's results are held against."""

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from tests.hf_models import VOCAB


def ids(count, seed):
    return torch.randint(1, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cache_of(model, tokens):
    """Keys and values `[layers, tokens, Hkv, D]` of a sequence on its own."""
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.tensor([tokens]), past_key_values=cache)
    return tuple(
        torch.stack([getattr(x, name)[0].transpose(0, 1) for x in cache.layers]) for name in ("keys", "values")
    )


def move(model, k, delta):
    """Keys `[layers, tokens, Hkv, D]` turned by `delta` positions more, in layers with rotary positions."""
    turns = torch.tensor(getattr(model.config, "no_rope_layers", [1] * len(k)))[:, None, None, None]
    angle = turns * delta * model.base_model.rotary_emb.inv_freq.double()
    a, b = k.double().chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).to(k.dtype)


def stitched(model, system, chunks):
    """The stale keys and values of a context: each chunk as it is right behind the system prompt, moved."""
    base = len(system)
    parts, at = [cache_of(model, system)] if system else [], base
    for chunk in chunks:
        k, v = (x[:, base:] for x in cache_of(model, [*system, *chunk]))
        parts.append((move(model, k, at - base), v))
        at += len(chunk)
    return tuple(torch.cat(x, 1) for x in zip(*parts, strict=True))


class Mixed:
    """A transformers cache of one sequence, whose entries at the positions of a forward are replaced by its tokens'."""

    def __init__(self, k, v, room=64):
        self.k, self.v = (
            torch.cat([x, x.new_zeros(x.shape[0], room, *x.shape[2:])], 1).transpose(1, 2) for x in (k, v)
        )
        self.k, self.v = self.k.clone(), self.v.clone()

    def update(self, key, value, layer, *_, **__):
        self.k[layer][:, self.at], self.v[layer][:, self.at] = key[0], value[0]
        return self.k[layer][None], self.v[layer][None]

    def run(self, model, tokens, positions, **options):
        """Logits of each token; each sees what is at or before its own position."""
        self.at = torch.tensor(positions)
        seen = torch.arange(self.k.shape[2]) <= self.at[:, None]
        mask = torch.zeros(seen.shape, dtype=self.k.dtype).masked_fill(~seen, -torch.inf)[None, None]
        with torch.no_grad():
            return model(
                torch.tensor([tokens]),
                position_ids=self.at[None],
                attention_mask=mask,
                past_key_values=self,
                use_cache=False,
                **options,
            )


def answer(model, system, chunks, question, chosen, steps):
    """Tokens and logits of greedy decoding, after the tokens at `chosen` positions and the question were recomputed."""
    context = [*system, *(i for chunk in chunks for i in chunk)]
    cache, end = Mixed(*stitched(model, system, chunks)), len(context) + len(question)
    rows = [*chosen, *range(len(context), end)]
    logits = [cache.run(model, [[*context, *question][i] for i in rows], rows).logits[0, -1]]
    tokens = [int(logits[0].argmax())]
    for step in range(steps - 1):
        logits.append(cache.run(model, tokens[-1:], [end + step]).logits[0, -1])
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


def full(model, system, chunks, question, steps):
    """Tokens and logits of greedy decoding after a full prefill, by `model.generate`."""
    prompt = torch.tensor([[*system, *(i for chunk in chunks for i in chunk), *question]])
    out = model.generate(
        prompt,
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
        renormalize_logits=False,
    )
    return out.sequences[0, prompt.shape[1] :].tolist(), torch.cat(out.scores)


def attentions(model, cache, tokens, positions):
    """Softmax weights `[layers, Hq, tokens, keys]` of a forward over a `Mixed` cache."""
    model.set_attn_implementation("eager")
    try:
        return torch.cat(cache.run(model, tokens, positions, output_attentions=True).attentions)
    finally:
        model.set_attn_implementation("sdpa")


def words(bos=False):
    """A tokenizer of words `w0 w1 ...`, one id each; `<s>`, 2, begins a text if asked for, and `</s>`, 3, ends it."""
    tok = Tokenizer(models.WordLevel({name(i): i for i in range(VOCAB)}, unk_token="w1"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tok.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair=None, special_tokens=[("<s>", 2), ("</s>", 3)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>")


def merging():
    """A tokenizer that reads `ab` as one token, 3, where `a` and `b` alone are 1 and 2."""
    tok = Tokenizer(models.BPE({"?": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="?"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok)


def name(i):
    return {2: "<s>", 3: "</s>"}.get(i, f"w{i}")


def text(tokens):
    return " ".join(map(name, tokens))
