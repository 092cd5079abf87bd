"""`fluent serve` as users meet it, crashes included: real processes, a real engine, kill -9."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from .server import FLUENT, Server, write_tiny_llama


@pytest.fixture(scope="module")
def temporary():
    """A folder with a short path, as the sockets in it need."""
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that tests may crash; each must leave it healthy."""
    folder = Path(tempfile.mkdtemp(prefix="f", dir="/tmp"))
    with running(tmp_path_factory.mktemp("model"), folder, "--set", "log.requests=true", "--kv-dtype", "fp8") as server:
        yield server
    shutil.rmtree(folder)


@contextmanager
def running(tmp_path, temporary, *arguments):
    server = Server(tmp_path / "tiny", *arguments, temporary=temporary)
    try:
        yield server
    finally:
        server.end()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def events(response):
    """The data of each server-sent event."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")


def test_the_line_in_the_banner_works_when_pasted(server):
    assert server.health() == (200, '{"status":"ready"}')
    assert "LlamaForCausalLM" in server.output
    assert "tokens in pages of 16, float8_e4m3fn," in server.output  # as --kv-dtype asked
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    line = next(line for line in server.lines if "curl " in line)
    pasted = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(pasted.stdout)["choices"], pasted.stdout


def test_metrics_come_from_both_processes(server):
    from prometheus_client.parser import text_string_to_metric_families

    def value(name, **labels):
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        return next(s.value for f in families for s in f.samples if s.name == name and s.labels == labels)

    before = value("fluent_generation_tokens_total")
    assert server.complete(max_tokens=7).status_code == 200
    assert value("fluent_generation_tokens_total") == before + 7
    assert value("fluent_engine_up") == 1
    assert value("fluent_time_to_first_token_seconds_count") >= 1


def test_the_start_has_a_timeline(server):
    """Printed by the banner and served as JSON; the first request ends it with a line."""
    printed = [line for line in server.lines if line.startswith("    ") and line.rstrip().endswith(" s")]
    # The two others start side by side, so either may come first.
    assert sorted(line.split(":")[0].strip() for line in printed) == ["engine", "front end", "supervisor"]
    stages = server.client.get("/startup").json()["stages"]
    names = [stage["name"] for stage in stages if stage["process"] == "engine"]
    assert names == sorted(names, key=["process", "plugins", "imports", "device", "model", "weights", "pool"].index)
    assert {"process", "imports", "weights", "pool"} <= set(names)
    assert all(0 < stage["start"] <= stage["end"] < 60 for stage in stages)
    if not any("first token" in line for line in server.lines):
        server.complete(max_tokens=1)
        server.wait_for("first token")
    assert " s after the start" in next(line for line in server.lines if "first token" in line)


def test_finished_requests_are_logged_when_asked_for(server):
    assert server.complete(max_tokens=3).status_code == 200
    server.wait_for(" 3 new in ")
    assert "fluentllm.requests: cmpl-" in server.lines[-1]
    assert ": length, 3 prompt tokens (" in server.lines[-1]


def test_what_plugins_cost_can_be_read_from_a_running_server(server):
    server.complete(max_tokens=3)
    report = server.client.get("/plugins").json()
    frontend, engine = ({(row["plugin"], row["hook"]): row for row in report[part]} for part in ("frontend", "engine"))
    row = frontend["api_openai", "/v1/completions"]
    assert row["calls"] >= 1
    assert row["failures"] == 0
    assert 0 < row["longest"] <= row["seconds"]
    assert any(hook == "fluent_schedulers" and row["calls"] == 1 for (_, hook), row in engine.items())
    command = [sys.executable, "-m", "fluentllm.cli", "plugins", "trace", "--url", f"{server.url}/v1"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"^engine +scheduler_fcfs +fluent_schedulers +1 +0 ", printed, re.MULTILINE), printed
    wrong = subprocess.run([*command[:-1], "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    assert "does not answer" in wrong.stderr


def test_the_runtime_folder_is_for_this_user_only(server):
    (folder,) = server.runtime_folders()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert (folder / "start.json").stat().st_mode & 0o777 == 0o600
    assert (folder / "engine.sock").stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_the_engine_loads_torch(server):
    def has_torch(process: psutil.Process) -> bool:
        return any("/torch/" in mapped.path for mapped in process.memory_maps())

    assert has_torch(server.child("engine"))
    assert not has_torch(server.child("frontend"))
    assert not has_torch(psutil.Process(server.process.pid))


def test_an_engine_that_is_killed_is_replaced(server):
    engine, frontend = server.child("engine"), server.child("frontend")
    before = server.complete()
    assert before.status_code == 200, before.text
    with server.stream() as response:
        stream = events(response)
        next(stream)
        engine.kill()
        rest = [event for event in stream if event != "[DONE]"]
    assert json.loads(rest[-1])["error"]["code"] == "engine_died"
    assert server.health() == (503, '{"status":"restarting"}')
    refused = server.complete()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")

    server.wait_healthy()
    assert server.child("engine").pid != engine.pid
    assert server.child("frontend").pid == frontend.pid
    assert server.complete().json()["choices"] == before.json()["choices"]


def test_an_engine_that_is_asked_to_end_finishes_what_runs(server):
    engine = server.child("engine")
    with server.stream(max_tokens=1000) as response:
        stream = events(response)
        next(stream)
        engine.terminate()
        while (refused := server.complete()).status_code == 200:  # until the signal has arrived
            pass
        rest = list(stream)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
    assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
    engine.wait(10)
    server.wait_healthy()


def test_a_front_end_that_is_killed_is_replaced_on_the_same_port(server):
    engine, frontend = server.child("engine"), server.child("frontend")
    with server.stream() as response:
        frontend.kill()
        with pytest.raises(httpx.HTTPError):
            list(response.iter_lines())
    server.wait_healthy()  # connections that come meanwhile wait
    assert server.child("engine").pid == engine.pid
    assert server.child("frontend").pid != frontend.pid
    assert server.complete().status_code == 200


def test_children_end_with_a_supervisor_that_is_killed(server):
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.kill()
    server.process.wait()
    psutil.wait_procs(children, timeout=5)
    assert all(gone(child) for child in children)
    assert server.runtime_folders() == []


def test_sigterm_lets_a_running_request_finish(tmp_path, temporary):
    with running(tmp_path, temporary) as server:
        with server.stream(max_tokens=300) as response:
            stream = events(response)
            next(stream)
            children = psutil.Process(server.process.pid).children(recursive=True)
            server.process.send_signal(signal.SIGTERM)
            rest = list(stream)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.wait_end() == 0, server.output
        assert all(gone(child) for child in children)
        assert server.runtime_folders() == []
        with pytest.raises(httpx.ConnectError):
            server.health()


def test_what_runs_longer_than_the_drain_ends_with_an_error(tmp_path, temporary):
    with running(tmp_path, temporary, "--set", "server.shutdown_timeout=2") as server:
        with ThreadPoolExecutor() as threads, server.stream(n=32) as response:
            plain = threads.submit(server.complete, max_tokens=5000, n=32)
            stream = events(response)
            next(stream)
            while "fluent_num_requests_running 64" not in server.client.get("/metrics").text:
                pass
            server.process.send_signal(signal.SIGTERM)
            server.wait_for("Stopping")
            time.sleep(0.5)  # until the front end has seen it
            with pytest.raises(httpx.ConnectError):
                server.health()
            rest = list(stream)
            refused = plain.result()
        assert rest[-1] == "[DONE]"
        error = json.loads(rest[-2])["error"]
        assert error["code"] == "engine_unavailable"
        assert "server.shutdown_timeout, 2 s" in error["message"]
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        assert server.wait_end() == 0
        assert "Traceback" not in server.output
        assert server.runtime_folders() == []


def test_too_many_crashes_end_the_server(tmp_path, temporary):
    with running(tmp_path, temporary, "--set", "engine.max_restarts=0") as server:
        frontend = server.child("frontend")
        server.child("engine").kill()
        assert server.wait_end() == 2
        assert "engine.max_restarts is 0" in server.output
        assert "SIGKILL" in server.output
        assert gone(frontend)
        assert server.runtime_folders() == []


def test_a_second_signal_ends_at_once_and_children_never_outlive_the_supervisor(tmp_path, temporary):
    with running(tmp_path, temporary, "--set", "server.shutdown_timeout=60") as server, server.stream(n=32) as response:
        stream = response.iter_lines()  # kept, since dropping it would end the request
        next(stream)
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert len(children) == 2
        server.process.send_signal(signal.SIGINT)
        server.wait_for("Stopping")
        server.process.send_signal(signal.SIGINT)
        server.wait_end(timeout=5)
        assert all(gone(child) for child in children)
        assert server.runtime_folders() == []


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*FLUENT, "serve", *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_an_engine_that_refuses_to_start_is_not_started_again(tmp_path):
    folder = write_tiny_llama(tmp_path / "tiny")
    ended = serve(str(folder), "--port", "0", "--load-format", "dummy", "--max-model-len", "9000")
    assert ended.returncode == 2
    assert "error: model.max_model_len is 9000" in ended.stderr
    assert "fix: Use at most 8192." in ended.stderr
    assert "restarted" not in ended.stderr
    assert "Traceback" not in ended.stderr
