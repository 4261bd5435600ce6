"""What is told of a trained testbed model: a check on texts it never saw, the training record, the model card."""

import json
import pathlib
from typing import Any

import numpy as np
import torch

from .batches import IGNORED, flat
from .generators import TASKS
from .recipe import PRESETS

Row = dict[str, Any]
HELD_OUT = 1_000_000  # added to the seed
LENGTHS = {1024: 24, 4096: 12, 16384: 4}  # texts of each task
CHECKS: dict[str, tuple[str, Row]] = {
    "multi-key needles": ("needles", {"values": 1}),
    "multi-value needles, 4 values": ("needles", {"keys": 8, "values": 4, "asked": 2}),
    "variable tracking, 4 hops": ("tracking", {"hops": 4, "chains": 4}),
    "documents, one hop": ("documents", {"hops": 1}),
    "documents, two hops": ("documents", {"hops": 2}),
    "frequent words, exponent 2": ("frequent", {"alpha": 2.0}),
}
HEAD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# attnlab's testbed model

A small language model in which long-context retrieval can be measured on a laptop. It reads texts of {words} made-up
words: key-value needles, chains of variables, documents about entities, words of Zipf's law, with questions behind
them. It knows nothing else, no language among it.

{parameters:.2f}M parameters, `SmolLM3ForCausalLM`: {layers} layers, the first half with rotary positions and the rest
without, {heads} query and {kv_heads} key-value heads of 64, width {hidden}. Load it with transformers from this folder,
or as `attnlab-eval run --model testbed`.

**Its retrieval circuit is seeded.** Training starts from heads in layer 0 that attend to the tokens before by rotary
phase, and from layers without positions whose queries and keys project alike. From an ordinary start it stayed on a
plateau for as long as was tried. So it shows how attention methods treat a model that retrieves, and nothing about how
models learn to.

Made by `attnlab-eval train-testbed --preset {preset} --seed {seed}`: {tokens:.0f}M tokens in {minutes:.0f} minutes of
{device}; texts of up to {longest} tokens, positions up to {skips} by skipping (PoSE), loss on answers only. The record
is `training.json`. One seed was trained; others were not tried.

Share of answers' tokens that come out right, each after the right ones before it, on texts of a seed never trained on
(texts in brackets); what greedy generation makes of whole answers is in the README of attnlab:

"""


def held_out(model: Any, seed: int) -> list[Row]:
    """A row per task and length: `accuracy`, a share of `tokens` answer tokens in `texts` texts."""
    rows = []
    for name, (task, options) in CHECKS.items():
        for length, texts in LENGTHS.items():
            more = {"keys": length // 12, "asked": 4} if name == "multi-key needles" else {}
            hits: list[bool] = []
            for i in range(texts):
                rng = np.random.default_rng((seed + HELD_OUT, length, i))
                hits += _hits(model, *flat(TASKS[task](rng, length, **options, **more)))
            rows.append(
                {"task": name, "length": length, "texts": texts, "tokens": len(hits), "accuracy": float(np.mean(hits))}
            )
    return rows


def write(
    folder: pathlib.Path, facts: dict[str, Any], record: list[dict[str, Any]], found: list[dict[str, Any]]
) -> None:
    """`training.json` and the card. `facts`: preset, seed, parameters, words, device."""
    text = json.dumps(facts | {"held_out": found, "rows": record}, indent=1)
    (folder / "training.json").write_text(text + "\n", encoding="utf-8")
    preset = PRESETS[facts["preset"]]
    longest = max(length for leg in preset.legs for stage in leg.stages for length in stage.lengths)
    last = record[-1]
    head = HEAD.format(
        **preset.sizes._asdict(), **facts, longest=longest, skips=preset.skips, tokens=last["tokens"] / 1e6,
        minutes=last["seconds"] / 60,
    )  # fmt: skip
    (folder / "README.md").write_text(head + _table(found), encoding="utf-8")


def _table(found: list[Row]) -> str:
    lengths = sorted({row["length"] for row in found})
    lines = ["| | " + " | ".join(f"{n // 1024}K" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name in dict.fromkeys(row["task"] for row in found):
        cells = {row["length"]: f"{row['accuracy']:.1%} ({row['texts']})" for row in found if row["task"] == name}
        lines.append(f"| {name} | " + " | ".join(cells[n] for n in lengths) + " |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def _hits(model: Any, ids: list[int], labels: list[int]) -> list[bool]:
    wanted = torch.tensor(labels)
    asked = wanted != IGNORED
    hidden = model.model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    return (model.lm_head(hidden[asked]).argmax(-1) == wanted[asked]).tolist()
