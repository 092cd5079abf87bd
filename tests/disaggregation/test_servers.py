"""Two real servers, a real router between them, KV over NIXL and over Mooncake. Fails, and never skips, without them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from processes.server import Server

from .servers import API_KEY, Router, cluster, door, start

pytestmark = pytest.mark.transports
PROMPTS = ["Once upon a time", "x" * 200, "The capital of France is" * 12]


# What sglang-router 0.3.2 made of a client's body, with --pd-disaggregation and round_robin, before it sent it to both.
SGLANG_COMPLETION = {
    "model": "tiny",
    "max_tokens": 8,
    "temperature": 0.0,
    "stream": False,
    "echo": False,
    "no_stop_trim": False,
    "ignore_eos": True,
    "skip_special_tokens": True,
    "return_hidden_states": False,
}
SGLANG_CHAT = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hi"}],
    "logprobs": False,
    "max_completion_tokens": 8,
    "n": 2,
    "seed": 3,
    "stream": False,
    "no_stop_trim": False,
    "ignore_eos": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
}


def test_the_bodies_of_sglang_router(tmp_path: Path) -> None:
    """Its own fields and lists of rooms; the router itself was tried by hand, see docs/disaggregation.md."""
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0].content }}")
    own = ("--set", f"model.chat_template={template}")
    with cluster(tmp_path, "nixl", *own) as (prefill, decode), ThreadPoolExecutor(1) as pool:
        host, port = door(prefill).split(":")
        one = {"bootstrap_host": host, "bootstrap_port": int(port), "bootstrap_room": 4668818069231509158}
        two = {
            "bootstrap_host": [host] * 2,
            "bootstrap_port": [int(port)] * 2,
            "bootstrap_room": [1916479674964123302, 4075922612820287121],
        }
        headers = {"Authorization": f"Bearer {API_KEY}"}

        def post(server: Server, path: str, body: dict) -> dict:
            answer = httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=30)
            assert answer.status_code == 200, answer.text
            return answer.json()

        for path, body, rooms in (
            ("/v1/completions", {**SGLANG_COMPLETION, "prompt": PROMPTS[1]}, one),
            ("/v1/chat/completions", SGLANG_CHAT, two),
        ):
            whole = post(prefill, path, body)
            half = pool.submit(post, prefill, path, {**body, **rooms})
            answer = post(decode, path, {**body, **rooms})
            half.result()
            texts = [[c.get("text") or c["message"]["content"] for c in each["choices"]] for each in (answer, whole)]
            assert texts[0] == texts[1]
            assert answer["usage"]["kv_transfer"]["received_bytes"] > 0
        other = {**two, "bootstrap_host": [host, "10.0.0.1"]}
        refused = httpx.post(f"{decode.url}/v1/chat/completions", json={**SGLANG_CHAT, **other}, headers=headers, timeout=30)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "bootstrap_host")
        stats = httpx.get(f"{decode.url}/handoff", headers=headers, timeout=10).json()["stats"]["handoff"]
        assert stats.get("local_prefills", 0) == 0
        metrics = httpx.get(f"{decode.url}/metrics", headers=headers, timeout=10).text
        assert f'fluent_handoffs_total{{counter="received_bytes"}} {float(stats["received_bytes"])}' in metrics
        assert "fluent_handoffs_open 0.0" in metrics


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
            # Front end, control connections and NIXL's UCX: nobody listens where nobody was told to.
            assert listening(prefill) | listening(decode) == {"127.0.0.1"}
        finally:
            decode.end()
    finally:
        prefill.end()


def listening(server: Server) -> set[str]:
    """Addresses that any of its processes takes connections at."""
    supervisor = psutil.Process(server.process.pid)
    found = [each for process in (supervisor, *supervisor.children()) for each in process.net_connections("inet")]
    return {each.laddr.ip for each in found if each.status == psutil.CONN_LISTEN}
