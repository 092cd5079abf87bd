"""Two real servers, a real router between them, KV over NIXL and over Mooncake. Fails, and never skips, without them."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from .servers import API_KEY, Router, cluster, door, start

pytestmark = pytest.mark.transports
PROMPTS = ["Once upon a time", "x" * 200, "The capital of France is" * 12]


@pytest.mark.parametrize("transport", ["nixl", "mooncake"])
def test_the_tokens_of_one_server(tmp_path: Path, transport: str) -> None:
    with cluster(tmp_path, transport) as (prefill, decode):
        headers = {"Authorization": f"Bearer {API_KEY}"}
        for arguments in ((), ("--pull",)):
            router = Router([prefill], [decode], *arguments)
            try:
                for prompt in PROMPTS:
                    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0.7, "seed": 7, "n": 2, "ignore_eos": True}
                    whole = httpx.post(f"{prefill.url}/v1/completions", json=body, headers=headers, timeout=30).json()
                    handed = router.complete(**body)
                    assert [c["text"] for c in handed["choices"]] == [c["text"] for c in whole["choices"]]
                    assert handed["usage"]["kv_transfer"]["received_bytes"] > 0
                with router.client.stream("POST", "/v1/completions", json={"prompt": "ab", "stream": True}) as events:
                    lines = [line for line in events.iter_lines() if line]
                assert lines[-1] == "data: [DONE]"
            finally:
                router.close()


def test_who_may_hand_over(tmp_path: Path) -> None:
    """Only who has the API key, and only to engines that are configured."""
    prefill = start(tmp_path, "prefill", "nixl", "--set", "plugins.kv_layerwise.port=0")
    try:
        fields = {"bootstrap_host": "10.9.8.7", "bootstrap_port": 9, "bootstrap_room": 1}
        answer = httpx.post(f"{prefill.url}/v1/completions", json={"prompt": "a", **fields}, timeout=10)
        assert answer.status_code == 401
        decode = start(tmp_path / "d", "decode", "nixl", "--set", f'plugins.kv_layerwise.peers=["{door(prefill)}"]')
        try:
            headers = {"Authorization": f"Bearer {API_KEY}"}
            answer = httpx.post(f"{decode.url}/v1/completions", json={"prompt": "a", **fields}, headers=headers, timeout=10)
            assert answer.status_code == 400
            assert "10.9.8.7:9" in answer.text
        finally:
            decode.end()
    finally:
        prefill.end()
