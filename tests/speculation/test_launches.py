"""Where nothing is drafted, an MTP layer costs a step on a GPU a few launches: counted, without a GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "benchmarks" / "gpu" / "models"
KEPT_UP = {
    "_shift_kernel": 1,  # its rows, and the states at pages' ends
    "index_select": 1,  # rotary
    "_draft_input_kernel": 1,
    "_held_kernel": 2,  # the projection with a norm behind it, the products that keys and values are made of
}


@pytest.mark.parametrize(("kv_dtype", "append"), [("auto", "_append_latents_kernel"), ("fp8", "_append_norms")])
@pytest.mark.parametrize("model", ["deepseek-v3-lite", "longcat-flash-lite"])
def test_a_step_without_drafts(model: str, kv_dtype: str, append: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.kernels.count_launches import counted

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with torch.inference_mode():
        alone, beside = (next(counted(str(MODELS / model), way, [0], kv_dtype=kv_dtype)) for way in ("none", "mtp"))
    assert beside - alone == Counter(KEPT_UP | {append: 1})
    assert not alone - beside
