"""Which device an engine runs on, and why not another. Where no such GPU is, what PyTorch and driver say is made up."""

from __future__ import annotations

import pytest
import torch

from fluentllm import devices
from fluentllm.assembly.attention import candidates
from fluentllm.core.errors import ConfigError
from fluentllm.core.plugins import PluginManager
from fluentllm.core.protocols import AttentionSpec
from fluentllm.core.settings import AttentionSettings, Settings
from fluentllm.core.types import KVSpec, ModelSpec


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "driver_version", lambda: "580.95.05")
    monkeypatch.setattr(devices, "driver_cuda", lambda: (13, 0))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return monkeypatch


def refusal(name: str = "cuda") -> str:
    with pytest.raises(ConfigError) as raised:
        devices.choose_device(name)
    return str(raised.value)


def test_auto_takes_a_gpu_where_there_is_one() -> None:
    assert devices.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "", "mps"])
def test_devices_that_are_none(name: str) -> None:
    assert "Use auto, cpu, cuda or cuda:N." in refusal(name)


def test_a_pytorch_without_cuda(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(torch.version, "cuda", None)
    assert "this PyTorch is built without CUDA" in refusal()
    assert devices.choose_device("auto").type == "cpu"


def test_no_driver(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(devices, "driver_version", lambda: None)
    no_gpu.setattr(devices, "driver_cuda", lambda: None)
    assert "there is no NVIDIA driver here" in refusal()


def test_a_driver_that_is_too_old(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setattr(devices, "driver_version", lambda: "550.54.15")
    no_gpu.setattr(devices, "driver_cuda", lambda: (12, 4))
    text = refusal()
    assert "driver 550.54.15 is too old: it supports CUDA 12.4, and this PyTorch is built for CUDA 13.0" in text
    assert "Update the driver, or install a PyTorch that is built for CUDA 12" in text
    no_gpu.setattr(torch.version, "cuda", "12.8")  # CUDA's minor versions are compatible
    assert "too old" not in refusal()


def test_gpus_that_are_hidden(no_gpu: pytest.MonkeyPatch) -> None:
    no_gpu.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES is ''" in refusal()


def some_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


BUILT = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "works"), [((9, 0), True), ((8, 9), True), ((12, 1), True), ((13, 0), True), ((7, 5), False)]
)
def test_compute_capabilities(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], works: bool) -> None:
    some_gpu(monkeypatch, capability, BUILT)
    if works:
        assert devices.choose_device("cuda") == torch.device("cuda", 0)
    else:
        assert "NVIDIA Test cannot be used: its compute capability is 7.5. What runs where: 9.0 (Hopper" in refusal()


def test_a_gpu_that_pytorch_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch, (10, 0), ["sm_80", "sm_90a"])
    assert "its compute capability is 10.0, and this PyTorch is built for sm_80, sm_90a" in refusal()
    some_gpu(monkeypatch, (9, 0), ["sm_80", "sm_90a"])
    assert devices.choose_device("cuda:0").index == 0


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    some_gpu(monkeypatch, (9, 0), BUILT)
    assert "engine.device is 'cuda:3', but there is only cuda:0" in refusal("cuda:3")


def test_the_drivers_version_is_read_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(devices, "_DRIVER_FILE", file)
    assert devices.driver_version() is None
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs) Tue Sep 23\n")
    assert devices.driver_version() == "580.95.05"


@pytest.mark.parametrize(("capability", "backend"), [((9, 0), "triton"), ((8, 0), "torch"), ((10, 0), "torch")])
def test_mla_falls_back_where_its_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], backend: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[])
    kv = KVSpec(kind="mla", layers=1, latent_dim=512, rope_dim=64)
    model = ModelSpec(architecture="x", vocab_size=9, hidden_size=64, layers=1, heads=4, max_position=64, kv=kv)
    spec = AttentionSpec(model=model, device="cuda", dtype="bfloat16", kv_dtype="bfloat16", page_size=64, deterministic=False)
    assert candidates(Settings(), spec, plugins, "decode")[0].name == backend
    if backend == "torch":
        number = ".".join(map(str, capability))
        with pytest.raises(ConfigError, match=rf"built for Hopper \(compute capability 9\.0\), not {number}"):
            candidates(Settings(attention=AttentionSettings(backend="triton")), spec, plugins, "decode")
