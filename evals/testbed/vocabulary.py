"""The testbed's words: what its tasks are written in, one token each."""

from typing import Any

import numpy as np

PAD, BOS, ASK, IS, END, NEEDLE, VAR, EQUALS, DOC, EOL, UNKNOWN, NOISE = range(12)
MARKS = ("<pad>", "<bos>", "<q>", "<is>", "<end>", "<n>", "var", "=", "<doc>", "<eol>", "<unk>", "...")
NEEDLES, TRACKING, FREQUENT, DOCUMENTS = range(12, 16)
KINDS = ("<needles>", "<tracking>", "<frequent>", "<documents>")


class Words:
    """A range of tokens named by a letter and a number."""

    def __init__(self, letter: str, start: int, n: int) -> None:
        self.start, self.n = start, n
        self.names = tuple(f"{letter}{i:03d}" for i in range(n))

    @property
    def stop(self) -> int:
        return self.start + self.n

    def draw(self, rng: np.random.Generator, *shape: int) -> np.ndarray:
        """Any of them, again and again."""
        return rng.integers(self.start, self.stop, shape)

    def choose(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """`n` that differ."""
        return rng.choice(self.n, n, replace=False) + self.start


KEYS = Words("k", 16, 256)
VALUES = Words("v", KEYS.stop, 256)
FILLERS = Words("w", VALUES.stop, 256)
ATTRIBUTES = Words("a", FILLERS.stop, 24)
RELATIONS = Words("r", ATTRIBUTES.stop, 8)
NAMES = (*MARKS, *KINDS, *(n for words in (KEYS, VALUES, FILLERS, ATTRIBUTES, RELATIONS) for n in words.names))


def tokenizer() -> Any:
    """Of transformers: words between spaces, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(NAMES)}, unk_token=NAMES[UNKNOWN]))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {f"{use}_token": NAMES[i] for use, i in dict(bos=BOS, eos=END, pad=PAD, unk=UNKNOWN).items()}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)
