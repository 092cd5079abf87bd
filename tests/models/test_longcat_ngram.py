"""LongCat-Flash-Lite: Transformers' trunk on the plain reference's n-gram embeddings, against ours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from expert_oracle import add_tensors, copy_checkpoint, make_expert_oracle
from oracle import SCENARIOS, TOLERANCE, Oracle, check, error_of, load_ours
from references.plain import ngram_embedding
from test_longcat import BIAS, CONFIGS, HIDDEN, VOCAB

from fluentllm.core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

NGRAM: dict[str, Any] = {"ngram_vocab_size_ratio": 2.5, "emb_neighbor_num": 3, "emb_split_num": 2}
TABLES, EOS = 4, 2
PREFIX = "model.ngram_embeddings"


@dataclass(slots=True)
class NgramOracle(Oracle):
    state: dict[str, Tensor]

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """[T] → [T, vocab] float32."""
        embedded = ngram_embedding(self.state, tokens, VOCAB, 2.5, 3, 2, [EOS])
        return self.model(inputs_embeds=embedded.unsqueeze(0)).logits[0].float()


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> NgramOracle:
    """Its sequences have end-of-sequence tokens, where n-grams must end, also side by side."""
    folder = tmp_path_factory.mktemp("ngram")
    oracle = make_expert_oracle(CONFIGS["lite"](), folder, BIAS)
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(TABLES):
        shapes[f"{PREFIX}.embedders.{i}.weight"] = (int(2.5 * VOCAB) + 2 * i + 1, HIDDEN // TABLES)
        shapes[f"{PREFIX}.post_projs.{i}.weight"] = (HIDDEN, HIDDEN // TABLES)
    state = add_tensors(folder, shapes)
    copy_checkpoint(folder, folder, architectures=["LongcatFlashNgramForCausalLM"], **NGRAM)
    for tokens in oracle.tokens:
        tokens[4] = tokens[-3] = tokens[-2] = EOS
    return NgramOracle(oracle.model, folder, oracle.tokens, state)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree(lite: NgramOracle, scenario: str) -> None:
    check(load_ours(lite.folder), lite, scenario)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_logits_agree_in_fixed_order(lite: NgramOracle, scenario: str) -> None:
    check(load_ours(lite.folder, deterministic=True), lite, scenario, deterministic=True)


@pytest.mark.parametrize("part", ["embedders", "post_projs"])
@pytest.mark.parametrize("table", range(TABLES))
def test_every_table_matters(lite: NgramOracle, part: str, table: int) -> None:
    model = load_ours(lite.folder, perturb=f"{PREFIX}.{part}.{table}.weight")
    assert error_of(model, lite, "prefill") > TOLERANCE


def test_stops_at_the_configs_first_end_of_sequence_id(lite: NgramOracle) -> None:
    """What generation_config.json adds to it was unknown to training."""
    check(load_ours(lite.folder, eos_token_id=[EOS, lite.tokens[0][1]]), lite, "prefill")
    assert error_of(load_ours(lite.folder, eos_token_id=VOCAB - 1), lite, "prefill") > TOLERANCE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"emb_neighbor_num": None}, "has no 'emb_neighbor_num'"),
        ({"emb_split_num": 5}, "cannot be split over 10 tables"),
        ({"emb_neighbor_num": 1}, "emb_neighbor_num 1"),
        ({"ngram_vocab_size_ratio": "78"}, "ngram_vocab_size_ratio is '78', not a number"),
    ],
)
def test_refusals_name_the_field(lite: NgramOracle, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError) as error:
        load_ours(lite.folder, **changes)
    assert named in str(error.value)
