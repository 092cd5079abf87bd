"""Texts that are hard on tokenizers."""

from __future__ import annotations

import random

from .checkpoints import TEXT

ODD = [
    "", " ", "  ", "\n\n\t x", "naïve café",
    "e\u0301 ≠ é", "👩‍👩‍👧 🙂🏽", "日本語 русский العربية", "½ ² ٣ 12345", "\x00\x1f\x7f", "\ufeff\u200d\u00a0\u3000",
    "don't I'LL we’ve", "<|im_start|>user", "a\ufffdb", "𝔘𝔫𝔦 \U0010ffff",
]  # fmt: skip


def random_texts(seed: int, count: int = 400) -> list[str]:
    rng = random.Random(seed)
    letters = [
        *"abc ABC \n\t\r'sle1234½²٣一龥é\u0301🙂👩\u200d\u00a0\u3000.,!?<|>_-ſ\x00",
        "don't",
        "  ",
        "\n\n",
        "12345",
        "I'LL",
        " the",
    ]
    return ["".join(rng.choices(letters, k=rng.randint(0, 30))) for _ in range(count)]


def spliced_texts(seed: int, count: int = 300) -> list[str]:
    """Scraps of what the tokenizers learned from, where merges compete."""
    rng, source = random.Random(seed), TEXT[0] + TEXT[1]
    starts = range(len(source))
    return ["".join(source[i : i + rng.randint(1, 6)] for i in rng.choices(starts, k=12)) for _ in range(count)]
