"""KV between the memory of GPUs over NIXL; on one GPU UCX copies by CUDA IPC. Fails without the extra `nixl`."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from disaggregation.servers import API_KEY, Router, cluster

from fluentllm.testing import assert_kv_transport_conforms

from .models import small

FACTORY = "fluentllm.plugins.kv_nixl:_create"
PROMPTS = ["Once upon a time", "x" * 200, "The capital of France is" * 12]


@pytest.mark.parametrize(("processes", "checks"), [(1, 12), (2, 13)])
def test_it_conforms(processes: int, checks: int) -> None:
    """With kill -9 and frozen peers."""
    assert len(assert_kv_transport_conforms(FACTORY, processes=processes, device="cuda")) >= checks


@pytest.mark.parametrize("name", ["qwen3-0.6b", "deepseek-v3-lite"])
def test_the_tokens_of_one_server(tmp_path: Path, name: str) -> None:
    """Grouped heads and MLA, from the pool of one engine into the other's; chunked, the last with a prefix."""
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((small(name, folder) / "config.json").read_text())
    settings = ("--device", "cuda", "--set", "scheduler.prefill_tokens=128")
    with cluster(tmp_path, "nixl", *settings, config=config) as (prefill, decode):
        router = Router([prefill], [decode])
        headers = {"Authorization": f"Bearer {API_KEY}"}
        try:
            for prompt in (*PROMPTS, PROMPTS[-1] + " and"):
                body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.7, "seed": 7, "n": 2, "ignore_eos": True}
                whole = httpx.post(f"{prefill.url}/v1/completions", json=body, headers=headers, timeout=60).json()
                handed = router.complete(**body)
                assert [c["text"] for c in handed["choices"]] == [c["text"] for c in whole["choices"]]
                assert handed["usage"]["kv_transfer"]["received_bytes"] > 0
            stats = httpx.get(f"{decode.url}/handoff", headers=headers, timeout=10).json()["stats"]["handoff"]
            assert stats.get("local_prefills", 0) == 0
        finally:
            router.close()
