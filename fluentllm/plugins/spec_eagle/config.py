"""What a draft model's config.json means, and whether it fits the target.

Public layouts: EAGLE (arXiv:2401.15077, 2406.16858), a Llama config of one layer; EAGLE-3 (arXiv:2503.01840), the same with
`draft_vocab_size`, mostly under the architecture `LlamaForCausalLMEagle3`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluentllm.core.errors import CheckpointError, ConfigError
from fluentllm.core.types import KVSpec
from fluentllm.hub import resolve_draft
from fluentllm.hub.config import config_at
from fluentllm.layers.fields import Fields
from fluentllm.layers.rotary import inverse_frequencies, rope_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from fluentllm.core.protocols import DraftTarget
    from fluentllm.core.settings import Settings
    from fluentllm.core.types import ModelSpec

PARAM = "speculative.model"


@dataclass(frozen=True, slots=True)
class EagleConfig:
    path: Path
    raw: Mapping[str, Any]
    eagle3: bool
    hidden: int
    target_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    vocab: int
    draft_vocab: int
    """Tokens that it can draft; less than `vocab` for EAGLE-3 mostly."""
    max_position: int
    rotary_dim: int
    attention_bias: bool
    mlp_bias: bool
    fc_bias: bool
    norm_before_residual: bool
    """The residual is the normed state, not the state itself."""
    taps: tuple[int, ...]
    """Layers of the target whose inputs are fused; empty for EAGLE, which takes the last hidden state."""

    def kv(self) -> KVSpec:
        return KVSpec(kind="gqa", layers=1, heads=self.kv_heads, head_dim=self.head_dim, v_head_dim=self.head_dim)


def draft_path(settings: Settings) -> Path:
    """Raises `ConfigError` where there is no draft model, `ModelNotFound` where it is not there."""
    files = resolve_draft(settings.speculative.model, settings.model.name, "eagle")
    if files is None:
        raise ConfigError(
            "speculative.method is eagle, which needs a draft model that was trained for this target.",
            fix="Set speculative.model (--speculative-model) to its folder or Hugging Face id, or use another method: pld.",
            param=PARAM,
        )
    return files.path


@contextmanager
def of_draft(path: Path) -> Iterator[None]:
    """What is wrong with a checkpoint inside is wrong with the draft's: raises `ConfigError` that says so."""
    try:
        yield
    except CheckpointError as error:
        raise ConfigError(
            f"The draft model at {path}: {error.message}",
            fix=error.fix or "Fetch it again from its publisher, or give another draft model.",
            param=PARAM,
        ) from error


def read_config(target: DraftTarget) -> EagleConfig:
    """Raises `ConfigError` for a draft model that does not fit the target, or is not whole."""
    config = parse(draft_path(target.settings), target.spec)
    if target.path is not None:
        with of_draft(config.path):
            _compare_tokenizers(config.path, target.path)
    return config


def parse(path: Path, target: ModelSpec) -> EagleConfig:
    """As `read_config`, without tokenizers."""
    with of_draft(path):
        return _parse(path, config_at(path), target)


def _parse(path: Path, raw: Mapping[str, Any], target: ModelSpec) -> EagleConfig:
    names = [str(name) for name in raw.get("architectures") or []]
    fields = Fields(raw, names[0] if names else "the draft model")
    eagle3 = any("eagle3" in name.lower() for name in names) or raw.get("draft_vocab_size") is not None
    if raw.get("model_type", "llama") != "llama":
        raise ConfigError(
            f"The draft model at {path} is of the kind {raw['model_type']!r}; EAGLE drafts are Llama layers.",
            fix="Take the config.json of its publisher, or another draft model.",
            param=PARAM,
        )
    layers = fields.integer("num_hidden_layers")
    if layers != 1:
        raise ConfigError(
            f"The model at {path} has {layers} layers: an EAGLE draft has one.",
            fix="Give the folder of the draft model, not of a target.",
            param=PARAM,
        )
    fields.only("hidden_act", "silu")
    hidden, heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = fields.size("head_dim", hidden // heads)
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError(f"{heads} heads cannot share {kv_heads} key-value heads evenly.")
    vocab = fields.size("vocab_size")
    target_hidden = fields.size("target_hidden_size", hidden) if eagle3 else hidden
    draft_vocab = fields.size("draft_vocab_size", vocab) if eagle3 else vocab
    _fits(path, "hidden size", target_hidden, target.hidden_size)
    _fits(path, "vocabulary", vocab, target.vocab_size)
    if draft_vocab > vocab:
        raise CheckpointError(f"draft_vocab_size {draft_vocab} is more than vocab_size {vocab}.")
    max_position, rope = fields.size("max_position_embeddings"), rope_parameters(raw)
    rotary_dim = int(head_dim * rope["partial_rotary_factor"])
    inverse_frequencies(rope, rotary_dim, max_position)  # what cannot be computed is refused before anything is loaded
    return EagleConfig(
        path=path,
        raw=raw,
        eagle3=eagle3,
        hidden=hidden,
        target_hidden=target_hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        inner=fields.size("intermediate_size"),
        eps=fields.number("rms_norm_eps", 1e-6),
        vocab=vocab,
        draft_vocab=draft_vocab,
        max_position=max_position,
        rotary_dim=rotary_dim,
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        fc_bias=not eagle3 and fields.flag("bias", True),
        norm_before_residual=eagle3 and fields.flag("norm_before_residual", False),
        taps=_taps(path, raw, target.layers) if eagle3 else (),
    )


def _fits(path: Path, what: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ConfigError(
            f"The draft model at {path} was made for a target of {what} {found}; this one's is {wanted}.",
            fix="Give a draft model that was trained for this target.",
            param=PARAM,
        )


def _taps(path: Path, raw: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Three layers, whose inputs are fused: 2, L / 2 and L - 3 where nothing is said. `eagle_aux_hidden_state_layer_ids` at the
    top names layers by their inputs; inside `eagle_config` by their outputs, as its users read it."""
    found, shift = raw.get("eagle_aux_hidden_state_layer_ids"), 0
    inner = raw.get("eagle_config")
    if found is None and isinstance(inner, Mapping):
        if inner.get("use_aux_hidden_state") is False:
            raise ConfigError(
                f"The draft model at {path} is EAGLE-3 without auxiliary hidden states, which is not supported.",
                fix="Use a draft model that fuses three hidden states, or method pld.",
                param=PARAM,
            )
        found, shift = inner.get("eagle_aux_hidden_state_layer_ids"), 1
    if found is None:
        found, shift = [2, layers // 2, layers - 3], 0
    taps = tuple(layer + shift for layer in found) if isinstance(found, list) and all(type(i) is int for i in found) else ()
    if len(taps) != 3 or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] <= layers:
        raise ConfigError(
            f"The draft model at {path} wants the hidden states of layers {found}; the target has {layers} layers.",
            fix="Give a draft model that was trained for this target, or name three in eagle_aux_hidden_state_layer_ids.",
            param=PARAM,
        )
    return taps


def _compare_tokenizers(draft: Path, target: Path) -> None:
    """Where the draft model comes with a tokenizer: an id must be the same token for both."""
    if not (draft / "tokenizer.json").is_file():
        return
    from fluentllm.frontend.tokenizer import load_tokenizer

    try:
        known = load_tokenizer(target).backend.get_vocab(with_added_tokens=True)
    except CheckpointError:
        return  # a target without a tokenizer is served by ids alone
    other = load_tokenizer(draft).backend.get_vocab(with_added_tokens=True)
    wrong = [token for token, number in other.items() if known.get(token) != number]
    if wrong or len(other) != len(known):
        token = repr(wrong[0]) if wrong else f"{len(other)} tokens instead of {len(known)}"
        raise ConfigError(
            f"The tokenizer of the draft model at {draft} is not the target's: {len(wrong)} tokens differ, such as {token}.",
            fix="Give a draft model that was trained for this target.",
            param=PARAM,
        )
