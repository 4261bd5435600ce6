"""`attnlab-eval train-testbed`: train the testbed model, go on where it was stopped, and write it with its record."""

import os
import pathlib
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnlab.evals.harness.errors import UsageError, unknown
from attnlab.evals.measure import environment

from . import attention, card
from .batches import IGNORED, Batches, TrainingBatch
from .model import seeded
from .recipe import PRESETS, Leg, Preset
from .vocabulary import NAMES, tokenizer

WARM_UP, LEAST = 100, 0.02  # steps; share of the rate that is left at a leg's end
DECAY, BETAS, CLIP = 0.02, (0.9, 0.98), 1.0
EVERY = 100  # steps between rows of the record
KEEP_S = 60.0  # between checkpoints
MEMORY = 0.97  # of the running accuracy, a step


def main(
    preset: str, out: str | os.PathLike[str], *, seed: int = 0, resume: bool = False, device: str = "auto"
) -> pathlib.Path:
    """Train a preset and write model, tokenizer, card and record to the folder `out`; returns it.

    A checkpoint in `out` is kept each minute; `resume` goes on from it, to the same weights but for rounding.

    Raises:
        UsageError: an unknown preset; `out` holds a training and `resume` is not set, or of another preset or seed.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    folder = pathlib.Path(out)
    kept = folder / "checkpoint.pt"
    if kept.exists() and not resume:
        raise UsageError(f"{folder} holds a training under way: --resume goes on, another --out begins anew")
    folder.mkdir(parents=True, exist_ok=True)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    run = Training(PRESETS[preset], seed, torch.device(device))
    if kept.exists():
        run.load(torch.load(kept, map_location=device, weights_only=True), (preset, seed))
    last = time.monotonic()
    for step, batch in run.batches():
        run.step(step, batch)
        if time.monotonic() - last > KEEP_S:
            _save(run, kept, (preset, seed))
            last = time.monotonic()
    _save(run, kept, (preset, seed))
    _write(run, folder, preset)
    return folder


class Training:
    """A model, its optimizer, and the record: a row every `EVERY` steps."""

    def __init__(self, preset: Preset, seed: int, device: torch.device) -> None:
        self.preset, self.seed, self.device = preset, seed, device
        self.model = seeded(preset.sizes, seed).to(device).train()
        if device.type == "cpu":
            attention.register()
            self.model.set_attn_implementation(attention.NAME)
        self.optimizer = self._optimizer()
        self.done, self.seconds = 0, 0.0
        self.accuracy: dict[str, float] = {}
        self.record: list[dict[str, Any]] = []

    def batches(self) -> Any:
        """`(step, batch)` of the steps that are left; made by other processes where the model is on a GPU."""
        left = range(self.done, self.preset.steps)
        workers = 0 if self.device.type == "cpu" else max(1, (os.cpu_count() or 2) - 2)
        made = torch.utils.data.DataLoader(
            Batches(self.preset, self.seed), batch_size=None, sampler=left, num_workers=workers
        )
        return zip(left, made)

    def step(self, step: int, batch: TrainingBatch) -> None:
        begun = time.monotonic()
        leg, inside, _ = self.preset.at(step)
        if inside == 0:
            self.optimizer = self._optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = rate(leg, inside)
        asked = batch.labels != IGNORED
        wanted = batch.labels[asked].to(self.device)
        logits = self._logits(batch, asked)
        loss = F.cross_entropy(logits, wanted)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._count(batch, asked, (logits.argmax(-1) == wanted).cpu())
        self.done, self.seconds = step + 1, self.seconds + time.monotonic() - begun
        if self.done % EVERY == 0:
            self._note(batch.ids.shape[1], loss.item(), rate(leg, inside))

    def load(self, kept: dict[str, Any], what: tuple[str, int]) -> None:
        if kept["what"] != list(what):
            raise UsageError(f"the checkpoint is of preset {kept['what'][0]}, seed {kept['what'][1]}, not {what}")
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.done, self.seconds = kept["done"], kept["seconds"]
        self.accuracy, self.record = kept["accuracy"], kept["record"]

    def state(self) -> dict[str, Any]:
        names = ("done", "seconds", "accuracy", "record")
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return held | {name: getattr(self, name) for name in names}

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": DECAY},
            {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, betas=BETAS)

    def _logits(self, batch: TrainingBatch, asked: Tensor) -> Tensor:
        """Of the tokens in front of answers' tokens alone, `[n, vocabulary]` float32."""
        ids = batch.ids.to(self.device)
        positions = None if batch.positions is None else batch.positions.to(self.device)
        # A mapping is taken as masks that are made already: none. Skipped positions would else pass for packing.
        mask: Any = {"full_attention": None}
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            hidden = self.model.model(
                input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False
            ).last_hidden_state
            return self.model.lm_head(hidden[asked.to(self.device)]).float()

    def _count(self, batch: TrainingBatch, asked: Tensor, right: Tensor) -> None:
        rows = asked.nonzero()[:, 0].tolist()
        found: dict[str, list[bool]] = {}
        for row, hit in zip(rows, right.tolist(), strict=True):
            found.setdefault(batch.tasks[row], []).append(hit)
        for task, hits in found.items():
            now = sum(hits) / len(hits)
            self.accuracy[task] = MEMORY * self.accuracy.get(task, now) + (1 - MEMORY) * now

    def _note(self, length: int, loss: float, lr: float) -> None:
        row = {"step": self.done, "tokens": self.done * self.preset.tokens, "seconds": round(self.seconds, 1)}
        row |= {"length": length, "rate": round(lr, 6), "loss": round(loss, 4)}
        row |= {task: round(share, 4) for task, share in sorted(self.accuracy.items())}
        self.record.append(row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def rate(leg: Leg, step: int) -> float:
    """Of a step in its leg."""
    share = step / leg.steps
    falling = 1.0 if share < leg.hold else max(LEAST, (1 - share) / (1 - leg.hold))
    return leg.rate * min(1.0, (step + 1) / WARM_UP) * falling


def _save(run: Training, path: pathlib.Path, what: tuple[str, int]) -> None:
    part = path.with_suffix(".part")
    torch.save(run.state() | {"what": list(what)}, part)
    part.replace(path)


def _write(run: Training, folder: pathlib.Path, preset: str) -> None:
    """bf16 weights, configuration, tokenizer, record and card; what was rounded is what is checked."""
    model = run.model.cpu().eval()
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    facts = {
        "preset": preset,
        "seed": run.seed,
        "parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        "words": len(NAMES),
        "device": _device(run.device),
    }
    card.write(folder, facts, run.record, card.held_out(model.float(), run.seed))


def _device(device: torch.device) -> str:
    found = environment(device)
    return found["gpu"] or f"{found['cpu']}, {found['threads']} threads"
