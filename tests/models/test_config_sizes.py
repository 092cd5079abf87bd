"""A size of 0 in a config is refused by its name, not met as a division by zero or a tensor without rows."""

from __future__ import annotations

import pytest
import torch
from engine.harness import TINY_LLAMA
from engine.test_every_model import MODELS

from fluentllm.core.errors import CheckpointError
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import BuildContext
from fluentllm.kernels import choose_ops

CONFIGS = {"llama": TINY_LLAMA, **MODELS}
MAY_BE_0 = {
    "eos_token_id", "bos_token_id", "first_k_dense_replace", "n_shared_experts", "zero_expert_num", "num_nextn_predict_layers",
    "decoder_sparse_step", "q_lora_rank",
}  # fmt: skip


def build(config: dict[str, object]) -> None:
    family = PluginManager.load({"executor"}, allow=[], deny=[]).registry("models").get(config["architectures"][0]).factory  # type: ignore[index]
    device = torch.device("cpu")
    family.spec(config)
    family.build(config, BuildContext(device=device, dtype=torch.float32, ops=choose_ops(device, False), max_positions=64))


@pytest.mark.parametrize("model", CONFIGS)
def test_every_size(model: str) -> None:
    config = CONFIGS[model]
    build(config)
    not_read = {"num_key_value_heads"} if "kv_lora_rank" in config else set()
    sizes = [name for name, value in config.items() if type(value) is int and name not in MAY_BE_0 | not_read]
    assert len(sizes) >= 7
    for name in sizes:
        with pytest.raises(CheckpointError, match=name):
            build({**config, name: 0})
