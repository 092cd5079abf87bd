"""A tokenizer out of a GGUF file's metadata: the same text → ids as the Hugging Face tokenizer that the file came from.

A GGUF names its pre-tokenizer (`tokenizer.ggml.pre`) instead of describing it; what each name stands for is known to
llama.cpp and, for the models below, written in their tokenizer.json. A name not listed here is refused, since splitting
text by a similar rule would give slightly wrong tokens without anybody noticing.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..core.errors import CheckpointError

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CASED_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = CASED_SPLIT % ""
LLAMA3_SPLIT = CASED_SPLIT % "{1,3}"

_DIGITS = "<digits>"
"""Stands for the `Digits` pre-tokenizer: every numeric character on its own."""

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (GPT2_SPLIT,),
    "smollm": (_DIGITS, GPT2_SPLIT),
    "qwen2": (QWEN2_SPLIT,),
    "deepseek-r1-qwen": (QWEN2_SPLIT,),
    "llama-bpe": (LLAMA3_SPLIT,),
    "llama3": (LLAMA3_SPLIT,),
    "llama-v3": (LLAMA3_SPLIT,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""Name in the file → the splits, applied one after the other."""

_LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
_NFC = {"qwen2", "deepseek-r1-qwen"}

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4


def build_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """From `tokenizer.ggml.*` of `metadata`. Raises `CheckpointError` for kinds that are not known, by name."""
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise CheckpointError(
            "The GGUF file has no tokenizer.ggml.tokens: it ships without a vocabulary.", fix="Take a full GGUF file."
        )
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens)
    else:
        raise CheckpointError(
            f"The GGUF file's tokenizer kind is {kind!r} (tokenizer.ggml.model); known are 'gpt2' and 'llama'.",
            fix="Use the model's Hugging Face folder, with its tokenizer.json.",
        )
    types = metadata.get("tokenizer.ggml.token_type") or []
    added = [
        AddedToken(token, special=kind_ == _CONTROL, normalized=False)
        for token, kind_ in zip(tokens, types, strict=False)
        if kind_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return tokenizer


def adds_bos(metadata: dict[str, Any]) -> bool:
    """Whether plain text starts with the beginning-of-sequence token, as llama.cpp decides it."""
    stated = metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    return metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _LLAMA3


def _byte_level(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    splits = PRE_TOKENIZERS.get(name)
    if splits is None:
        raise CheckpointError(
            f"The GGUF file's pre-tokenizer is {name!r} (tokenizer.ggml.pre); known are {', '.join(sorted(PRE_TOKENIZERS))}.",
            fix="Use the model's Hugging Face folder, with its tokenizer.json.",
        )
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges") or ()]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=name in _LLAMA3))
    if name in _NFC:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if split == _DIGITS else pre_tokenizers.Split(Regex(split), "isolated")
        for split in splits
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], tokens: list[str]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores:
        raise CheckpointError(
            "The GGUF file's tokenizer is of kind 'llama' but has no tokenizer.ggml.scores.",
            fix="Convert it again with a current llama.cpp.",
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    types = metadata.get("tokenizer.ggml.token_type") or []
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    trim: list[Any] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        trim.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *trim])
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """SentencePiece keeps no merges: it joins whichever neighbours make the piece of the highest score. So each way to
    cut a piece into two pieces is a merge, of the rank of the whole."""
    ranked = []
    for piece, index in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                ranked.append((-scores[index], index, vocab[left], vocab[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
