"""Text to token ids and back, as the checkpoint's own files say: tokenizer.json in a folder, or a GGUF's metadata.

Loaded once by the front end (and by `LLM`). Encoding is Rust that lets go of the GIL, so `generation` calls it from a
small thread pool; everything here may be called from several threads at once.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import CheckpointError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tokenizers import Tokenizer as Backend

BYTE_LEVEL, BYTE_FALLBACK, OTHER = "byte_level", "byte_fallback", "other"


_FRAMED_BY_CONFIG = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer"}
"""Classes of Transformers 4 whose add_bos_token and add_eos_token outrank what tokenizer.json frames text with. Checkpoints
count on it: DeepSeek's tokenizer.json adds no bos, its config does. For any other class, tokenizer.json is right."""


def _byte_of_char() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: printable ones stand for themselves, the rest for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(byte for byte in range(256) if byte not in set(printable)):
        table[chr(256 + n)] = byte
    return table


_BYTE_OF_CHAR = _byte_of_char()


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """What a chat template may name, and what ends an answer."""

    names: dict[str, str] = field(default_factory=dict)
    """`bos_token`, `eos_token`, … → text."""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    """Of the tokenizer and of generation_config.json."""


class Tokenizer:
    """One checkpoint's tokenizer. `chat_template` is the Jinja source, None if the checkpoint has none."""

    def __init__(self, backend: Backend, special: SpecialTokens, chat_template: str | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocab.values(), default=-1)
        """One more than the highest id."""
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.kind, self.trims_first_space = _decoder_kind(backend)
        self._longest_token = max(map(len, vocab), default=1)
        self._bytes: dict[int, bytes] = {}
        self.whole: dict[int, str] = {}
        """Text of tokens that are whole characters and not special; filled by `token_bytes`, so that a detokenizer seldom has
        to look at bytes."""

    @property
    def bos_id(self) -> int | None:
        return self.special.bos_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.special.eos_ids

    def special_tokens(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of those of these texts that are special tokens."""
        return self.special_ids.intersection(map(self.backend.token_to_id, texts))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of plain text; with `add_special_tokens`, framed as the checkpoint says (often: bos first).

        A rendered chat template holds its special tokens already: encode it without. Raises `InvalidRequest` for text
        that is no Unicode (a lone surrogate).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            at = next(i for i, char in enumerate(text) if "\ud800" <= char <= "\udfff")
            raise InvalidRequest(
                f"The text is not valid Unicode: a lone surrogate at character {at}.", fix="Remove it."
            ) from None

    def least_tokens(self, text: str) -> int:
        """A lower bound of `len(encode(text))` that costs nothing, so that a hopeless prompt is refused unread."""
        if self.kind == OTHER:
            return 0
        slack = 1 if self.backend.normalizer is None else 4  # NFC joins up to three characters into one
        return len(text) // (self._longest_token * slack)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence; for a growing one see `detokenizer`."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that the token stands for, perhaps not whole characters; empty for an id without a token."""
        known = self._bytes.get(token)
        if known is None:
            known = self._bytes[token] = self._spell(token)
            if token not in self.special_ids and self.kind != OTHER:
                with contextlib.suppress(UnicodeDecodeError):
                    self.whole[token] = known.decode()
        return known

    def token_text(self, token: int) -> str:
        """The token alone, with U+FFFD for bytes that are no whole character."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def _spell(self, token: int) -> bytes:
        piece = self.backend.id_to_token(token)
        if piece is None:
            return b""
        if self.kind == BYTE_LEVEL:
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in piece)
            except KeyError:
                return piece.encode()  # an added token with characters outside GPT-2's spelling stands for itself
        if self.kind == BYTE_FALLBACK:
            if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                return bytes([int(piece[3:5], 16)])
            return piece.replace("▁", " ").encode()
        return self.backend.decode([token], skip_special_tokens=False).encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """From a Hugging Face folder or a .gguf file. Raises `CheckpointError`: no tokenizer there, or one not understood."""
    path = Path(path)
    return _from_gguf(path) if path.is_file() else _from_folder(path)


def bytes_tokenizer() -> Tokenizer:
    """For dummy weights, which come without a tokenizer: token n < 256 is the byte n."""
    from tokenizers import Tokenizer as Backend, decoders, models, pre_tokenizers

    backend = Backend(models.BPE(vocab=dict(_BYTE_OF_CHAR), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, SpecialTokens(), None)


def _from_gguf(path: Path) -> Tokenizer:
    from ..hub.gguf_file import read_header
    from .gguf_tokenizer import adds_bos, build_tokenizer

    metadata = read_header(path).metadata
    backend = build_tokenizer(metadata)
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    }
    names = {name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    ends = [ids["eos_token"], metadata.get("tokenizer.ggml.eot_token_id"), metadata.get("tokenizer.ggml.eom_token_id")]
    _frame(backend, names, adds_bos(metadata), bool(metadata.get("tokenizer.ggml.add_eos_token", False)))
    special = SpecialTokens(names, ids["bos_token"], _unique(ends))
    return Tokenizer(backend, special, metadata.get("tokenizer.chat_template"))


def _from_folder(folder: Path) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json.",
            fix="Save it with `AutoTokenizer.from_pretrained(...).save_pretrained(folder)` of Transformers.",
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise CheckpointError(f"{file} cannot be read: {error}", fix="Fetch the file again.") from error
    config = _json(folder / "tokenizer_config.json")
    names = {
        name: text
        for name, value in {**_json(folder / "special_tokens_map.json"), **config}.items()
        if name.endswith("_token") and (text := _token_text(value)) is not None
    }
    known = backend.get_vocab(with_added_tokens=True)
    extra = [
        AddedToken(**{key: value for key, value in token.items() if key != "__type"})
        for _, token in sorted(config.get("added_tokens_decoder", {}).items(), key=lambda item: int(item[0]))
        if token["content"] not in known
    ]
    extra += [AddedToken(text, special=True) for text in names.values() if text not in known]
    backend.add_tokens(extra)
    stated = isinstance(config.get("add_bos_token"), bool) or isinstance(config.get("add_eos_token"), bool)
    if stated and str(config.get("tokenizer_class", "")).removesuffix("Fast") in _FRAMED_BY_CONFIG:
        _frame(backend, names, bool(config.get("add_bos_token")), bool(config.get("add_eos_token")))
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    eos = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    bos = backend.token_to_id(names["bos_token"]) if "bos_token" in names else None
    special = SpecialTokens(names, bos, _unique([eos, *(ends if isinstance(ends, list) else [ends])]))
    return Tokenizer(backend, special, _folder_template(folder, config))


def _folder_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _frame(backend: Backend, names: dict[str, str], bos: bool, eos: bool) -> None:
    """Make `encode` add exactly these."""
    from tokenizers.processors import TemplateProcessing

    first = names.get("bos_token") if bos else None
    last = names.get("eos_token") if eos else None
    around = [token for token in (first, last) if token is not None]
    backend.post_processor = TemplateProcessing(
        single=[*([first] if first else []), "$A", *([last] if last else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(around)],
    )


def _decoder_kind(backend: Backend) -> tuple[str, bool]:
    """How the backend spells bytes, and whether it drops a leading space of the whole text."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    steps = state.get("decoders", [state])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return BYTE_LEVEL, False
    if kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "ByteFallback" in kinds:
        replaced = [step for step in steps if step["type"] == "Replace"]
        if all(step["pattern"] == {"String": "▁"} and step["content"] == " " for step in replaced):
            return BYTE_FALLBACK, "Strip" in kinds
    return OTHER, False


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _unique(ids: Iterable[int | None]) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}", fix="Fetch the file again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__}, not an object.", fix="Fetch the file again.")
    return value
