"""`fluent` itself: its help, its errors, and the commands about settings, plugins and this machine."""

from __future__ import annotations

import json
import re
from functools import reduce
from typing import Annotated

import pytest
import typer

from fluentllm import __version__, cli, devices
from fluentllm.cli import options
from fluentllm.core import config
from fluentllm.core.errors import ConfigError, OutOfMemory
from fluentllm.core.settings import Settings
from fluentllm.hub import resolve
from fluentllm.kernels.cuda.compile import compiler_version
from fluentllm.local import LocalEngine


def test_help_of_a_flag_names_its_setting_and_default(fluent):
    text = " ".join(fluent("serve", "--help", COLUMNS="200").stdout.split())
    assert "serve [OPTIONS] [MODEL]" in text
    assert "Port; 0 takes a free one. (server.port; default 8000)" in text
    assert "(engine.deterministic; default false)" in text
    assert "Of the server at --url" in " ".join(fluent("chat", "--help", COLUMNS="200").stdout.split())


def test_help_names_every_command(fluent):
    text = fluent("--help").stdout
    assert [name for name in cli.COMMANDS if f" {name} " not in text] == []


def test_version(fluent_process):
    assert fluent_process("--version").stdout == f"fluentllm {__version__}\n"


def test_an_error_is_two_lines_and_exit_code_2(fluent_process):
    result = fluent_process("config", "show", "--set", "server.prot=1", code=2)
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: command line, --set server.prot: unknown key 'server.prot' (its value: '1').",
        "fix: Did you mean server.port?",
    ]


def test_fluent_debug_shows_the_traceback(fluent_process):
    result = fluent_process("config", "show", "--set", "server.prot=1", code=1, FLUENT_DEBUG="1")
    assert "Traceback" in result.stderr


# ------------------------------------------------------------------------------------------------------------------- config
def test_config_show_says_where_values_come_from(fluent, tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text("server:\n  host: 0.0.0.0\n  api_key: sesame\n")
    shown = fluent("config", "show", "--config", str(file), "--set", "engine.threads=3", FLUENT_KV__PAGE_SIZE="32").stdout
    lines = {line.split()[0]: line.split(maxsplit=2)[1:] for line in shown.splitlines()}
    assert lines["server.host"] == ["0.0.0.0", f"{file}, line 2"]
    assert lines["server.api_key"] == ["(hidden)", f"{file}, line 3"]
    assert lines["kv.page_size"] == ["32", "environment variable FLUENT_KV__PAGE_SIZE"]
    assert lines["engine.threads"] == ["3", "command line, --set engine.threads"]
    assert lines["server.port"] == ["8000", "default"]
    assert "sesame" not in shown
    changed = json.loads(fluent("config", "show", "--changed", "--json", FLUENT_CONFIG=str(file)).stdout)
    assert set(changed) == {"server.host", "server.api_key", "plugins.allow"}


def test_config_explain(fluent):
    text = fluent("config", "explain", "kv.page_size").stdout
    for part in ("Tokens a page", "int ≥ 1 or null, in tokens", "value    null (from: default)", "FLUENT_KV__PAGE_SIZE"):
        assert part in text
    assert "fix: Did you mean server.port?" in fluent("config", "explain", "server.prot", code=2).stderr


def test_config_schema(fluent):
    assert json.loads(fluent("config", "schema").stdout)["properties"]["server"]
    assert "| `server.port` |" in fluent("config", "schema", "--format", "markdown").stdout


# ------------------------------------------------------------------------------------------------------------------ plugins
def test_plugins_list_and_show(fluent):
    rows = {row["name"]: row for row in json.loads(fluent("plugins", "list", "--json").stdout)}
    assert rows["scheduler_fcfs"]["hooks"] == ["fluent_schedulers"]
    assert {row["state"] for row in rows.values() if row["builtin"]} == {"loaded"}
    assert "scheduler_fcfs" in fluent("plugins", "list").stdout
    row = json.loads(fluent("plugins", "show", "scheduler_fcfs", "--json").stdout)
    assert row["offers"] == {"schedulers": ["fcfs"]}
    offers = json.loads(fluent("plugins", "show", "metrics_prometheus", "--json").stdout)["offers"]
    assert offers == {"routes": ["GET /metrics"], "calls": ["metrics_prometheus"]}
    assert row["calls"]["import"]["calls"] == 1
    assert "Did you mean 'scheduler_fcfs'?" in fluent("plugins", "show", "scheduler", code=2).stderr


def test_plugins_trace(fluent):
    calls = json.loads(fluent("plugins", "trace", "--json").stdout)
    assert {"import", "fluent_schedulers"} <= {call["hook"] for call in calls if call["plugin"] == "scheduler_fcfs"}
    assert "fluent_schedulers" in fluent("plugins", "trace").stdout


def test_a_broken_plugin_is_diagnosed_and_stops_nothing_else(fluent_process, make_distribution):
    site = make_distribution("acme", {"broken": "acme_broken:plugin"}, acme_broken="import no_such_module")
    environ = {"PYTHONPATH": str(site), "FLUENT_PLUGINS": "broken"}
    result = fluent_process("plugins", "doctor", code=1, **environ)
    assert "No module named 'no_such_module'" in result.stdout
    assert "fix: Mend or upgrade acme, or add 'broken' to `plugins.deny`." in result.stdout
    assert "plugin 'broken' (acme 1.2) is left out" in fluent_process("config", "explain", "server.port", **environ).stderr


def test_commands_that_clash_stop_the_start_but_not_the_doctor(fluent, make_distribution):
    source = """
    from fluentllm.core.hookspecs import hookimpl

    class Plugin:
        @hookimpl
        def fluent_commands(self, app):
            app.command("serve")(lambda: None)

    plugin = Plugin()
    """
    site = make_distribution("acme", {"thief": "acme_thief:plugin [cli]"}, acme_thief=source)
    environ = {"PYTHONPATH": str(site), "FLUENT_PLUGINS": "thief"}
    result = fluent("config", "show", code=2, **environ)
    assert "error: Two plugins add the command `fluent serve`: fluent itself and plugin 'thief' (acme 1.2" in result.stderr
    fluent("plugins", "list", **environ)
    # A deny list counts for commands too, wherever it stands.
    fluent("config", "show", "--set", "plugins.deny=thief", **environ)
    fluent("config", "show", **environ, FLUENT_PLUGINS__DENY="thief")


# ------------------------------------------------------------------------------------------------------------------- doctor
def test_doctor_says_what_would_be_used(fluent, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "vocab_size": 64,
                "max_position_embeddings": 128,
            }
        )
    )
    line = ("doctor", str(tmp_path), "--json", "--set", "engine.device=cpu", "--set", "model.load_format=dummy")
    report = json.loads(fluent(*line).stdout)
    choices = {row["setting"]: row for row in report["choices"]}
    assert choices["engine.device"] == {"setting": "engine.device", "set_to": "cpu", "uses": "cpu", "because": "as set"}
    assert choices["model.dtype"]["uses"] == "float32"
    assert choices["attention.backend"]["uses"] == "torch"
    assert report["model"]["plugin"] == "model_llama"
    assert "json_schema" in choices["grammars"]["uses"] or "fluentllm[grammar]" in choices["grammars"]["because"]
    packages = {row["name"]: row for row in report["packages"]}
    assert packages["torch"]["version"]
    assert packages["flashinfer-python"]["for"] == "cuda"
    assert report["problems"] == []
    assert "No problem found." in fluent(*line[:2], *line[3:]).stdout


def test_doctor_says_what_a_token_of_kv_takes(fluent, tmp_path):
    """644 bytes a layer of MLA in FP8: 512 latent values, their scale, 64 rotary values in BF16; 1,152 in 16 bits."""
    config = json.loads((resolve("longcat-nano").path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = ("doctor", str(tmp_path), "--json", "--set", "engine.device=cpu", "--set", "model.load_format=dummy")
    layers = 2 * config["num_layers"]
    for dtype, kept, size, backend in (("fp8", "float8_e4m3fn", 644, "mla_fp8"), ("bfloat16", "bfloat16", 1152, "torch")):
        report = json.loads(fluent(*line, "--set", f"kv.dtype={dtype}").stdout)
        choices = {row["setting"]: row for row in report["choices"]}
        assert choices["kv.dtype"]["uses"] == kept
        assert choices["kv.dtype"]["because"] == f"as set; {size * layers:,} bytes a token"
        assert choices["attention.backend"]["uses"] == backend


@pytest.mark.parametrize("drafts", [(), ("--set", "speculative.method=pld")])
def test_doctor_says_when_the_kv_pool_holds_no_context(fluent, drafts):
    """The same error as at the start, with the same advice, which it takes."""
    line = ("doctor", "longcat-nano", "--json", "--set", "engine.device=cpu", *drafts)
    report = json.loads(fluent(*line, "--set", "kv.memory=1MiB", code=1).stdout)
    [problem] = report["problems"]
    assert "kv.memory 1MiB holds" in problem["problem"]
    advice = re.search(r"Set kv\.memory to (\d+MiB) or more", problem["fix"])
    assert advice is not None
    assert json.loads(fluent(*line, "--set", f"kv.memory={advice[1]}").stdout)["problems"] == []
    given = {"model.name": "longcat-nano", "engine.device": "cpu", "engine.threads": 1, "kv.memory": advice[1]}
    given |= {"speculative.method": "pld"} if drafts else {}
    with LocalEngine(config.load(None, given, {}).settings) as local:
        assert local.engine.info.kv_tokens >= local.engine.info.max_model_len
    with pytest.raises(OutOfMemory) as raised:
        LocalEngine(config.load(None, {**given, "kv.memory": "1MiB"}, {}).settings)
    assert (raised.value.message, raised.value.fix) == (problem["problem"], problem["fix"])


def test_doctor_says_what_there_is_for_a_gpu(fluent, monkeypatch, tmp_path):
    """What the driver and PyTorch say is made up: a driver that is too old for this PyTorch."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "driver_version", lambda: "550.54.15")
    monkeypatch.setattr(devices, "driver_cuda", lambda: (12, 4))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kept in ("a/k.cubin", "cuda/product-1.cubin"):
        (tmp_path / kept).parent.mkdir(parents=True)
        (tmp_path / kept).write_bytes(b"x" * 1_500_000)
    line = ("doctor", "--set", "engine.device=cpu")
    report = json.loads(fluent(*line, "--json", code=1).stdout)
    gpu = report["gpu"]
    assert (gpu["driver"], gpu["driver_supports_cuda"], gpu["torch_built_for_cuda"]) == ("550.54.15", "12.4", "13.0")
    assert gpu["gpus"] == []
    assert "driver 550.54.15 is too old" in report["problems"][0]["problem"]
    assert gpu["kernel_cache"] == {"folder": str(tmp_path), "bytes": 3_000_000, "kernels": 2}
    version = compiler_version()
    assert gpu["nvrtc"] == (version and ".".join(map(str, version)))
    assert "9.0 (Hopper" in gpu["capabilities"]
    printed = fluent(*line, code=1).stdout
    assert "550.54.15, supports CUDA 12.4" in printed
    assert "2 kernels, 3 MiB" in printed


def test_doctor_reports_what_cannot_be_used(fluent):
    report = json.loads(fluent("doctor", "--json", "--set", "scheduler.policy=fcsf", code=1).stdout)
    assert "No plugin offers the scheduling policy 'fcsf'" in report["problems"][0]["problem"]


def test_doctor_knows_no_model_that_serve_does_not_know(fluent):
    report = json.loads(fluent("doctor", "smolm2", "--json", code=1).stdout)
    assert report["problems"][-1]["problem"] == "Unknown model 'smolm2'."
    assert "Did you mean 'smollm2'?" in report["problems"][-1]["fix"]
    assert "models pull" not in str(report)


# ------------------------------------------------------------------------------------------------------------------ options
def test_options_put_flags_over_the_environment_and_sets_over_flags():
    flags = {"server.port": "8001", "server.host": None, "engine.threads": 2}
    loaded = options.load(None, flags, ["engine.threads=3"], {"FLUENT_SERVER__PORT": "1", "FLUENT_SERVER__HOST": "::1"})
    settings = loaded.settings
    assert (settings.server.port, settings.server.host, settings.engine.threads) == (8001, "::1", 3)
    assert loaded.origins == {
        "server.port": "command line, --port",
        "server.host": "environment variable FLUENT_SERVER__HOST",
        "engine.threads": "command line, --set engine.threads",
    }


GIVEN = {
    "model.name": "m", "model.load_format": "dummy", "model.dtype": "float32", "model.weight_precision": "fp8",
    "model.max_model_len": "64", "model.revision": "main", "engine.device": "cpu", "engine.overlap_depth": "2",
    "engine.deterministic": None, "engine.threads": "3", "scheduler.policy": "other", "kv.dtype": "fp8", "kv.memory": "1GiB",
    "speculative.method": "pld", "speculative.model": "drafts", "speculative.k": "2", "log.level": "warning",
    "speculative.synthetic_acceptance": "2.5", "model.served_name": "n", "disaggregation.role": "prefill",
    "server.host": "::1", "server.port": "1", "server.api_key": "secret",
}  # fmt: skip


def test_a_configured_command_gets_the_settings_that_its_flags_say(tmp_path):
    seen = []
    app = typer.Typer()

    @app.command()
    @options.configured(options.ENGINE, options.SERVED, options.HTTP)
    def command(settings: Settings, batch: Annotated[int, typer.Option()] = 3) -> None:
        seen.append((settings, batch))

    flags = options.ENGINE | options.SERVED | options.HTTP
    assert flags.keys() == GIVEN.keys()
    (tmp_path / "a.yaml").write_text("server: {host: elsewhere}\nkv: {page_size: 16}")
    arguments = ["--batch", "5", "--config", str(tmp_path / "a.yaml"), "--set", "engine.threads=4"]
    for key, names in flags.items():
        arguments += [part for part in (*(name.partition("/")[0] for name in names[:1]), GIVEN[key]) if part]
    app(arguments, standalone_mode=False)
    [(settings, batch)] = seen
    found, default = ({key: reduce(getattr, key.split("."), of) for key in flags} for of in (settings, Settings()))
    assert [key for key in flags if found[key] == default[key]] == []
    assert (batch, settings.kv.page_size, settings.engine.threads, settings.server.host) == (5, 16, 4, "::1")
    assert (settings.engine.deterministic, settings.speculative.k) == (True, 2)


@pytest.mark.parametrize("command", ["serve", "dynamo", "bench latency", "bench throughput", "bench step"])
def test_commands_that_start_an_engine_have_its_flags(fluent, command):
    shown = fluent(*command.split(), "--help").stdout
    missing = [name for names in options.ENGINE.values() for name in names if name.partition("/")[0] not in shown]
    assert missing == []


@pytest.mark.parametrize("text", ["server.port", "=1", ""])
def test_a_set_without_a_key_or_a_value_is_refused(text):
    with pytest.raises(ConfigError, match="not of the form KEY=VALUE"):
        options.load(None, {}, [text], {})


def test_the_lists_are_read_before_the_command_line_is_parsed(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("plugins: {deny: [a]}\nserver: {this is: not looked at}\n")
    for arguments in (["serve", "--config", str(file)], ["serve", f"--config={file}"], ["serve", "-c", str(file)]):
        assert options.plugin_lists(arguments, {}).deny == ["a"]
    assert options.plugin_lists(["serve", "--set", "plugins.deny=b"], {"FLUENT_CONFIG": str(file)}).deny == ["b"]
    assert options.plugin_lists(["serve"], {"FLUENT_PLUGINS": "x"}).allow == ["x"]
