"""The text: the sources of the standard library of the Python that runs this (PSF licence), split by a hash of the path."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END = "<|endoftext|>"
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "pydoc_data",
    "encodings",
    "ensurepip",
}
"""What is not the library's own text, or tables instead of text."""
GENERATED = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize")
HELD_OUT_OF_256 = 16


def sources(limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out; `limit` takes the first so many files only."""
    root = Path(sysconfig.get_path("stdlib"))
    found: tuple[list[str], list[str]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if LEFT_OUT & set(name.parts) or name.parts[0].startswith("config-") or name.name.startswith(GENERATED):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        held_out = hashlib.sha256(name.as_posix().encode()).digest()[0] < HELD_OUT_OF_256
        if text.strip() and (limit is None or len(found[held_out]) < limit):
            found[held_out].append(text)
    return found


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    """Byte-level byte pairs; the end-of-text token is id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]


class Crops:
    """Random stretches of all documents in a row, each closed by the end-of-text token, in an order of their own."""

    def __init__(self, documents: list[list[int]], end: int, device: torch.device, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(documents), generator=self.random).tolist()
        self.tokens = torch.tensor([token for i in order for token in [*documents[i], end]], device=device)

    def __call__(self, batch: int, length: int) -> Tensor:
        """[batch, length + 1] int64."""
        starts = torch.randint(self.tokens.shape[0] - length - 1, (batch, 1), generator=self.random)
        return self.tokens[(starts + torch.arange(length + 1)).to(self.tokens.device)]
