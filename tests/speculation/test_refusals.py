"""A proposer that cannot work stops the start: the error names it, its plugin and the reason."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from engine.harness import Harness

from fluentllm.assembly import assemble, load_model
from fluentllm.core.errors import CheckpointError, ConfigError, FluentError, OutOfMemory, PluginError
from fluentllm.core.protocols import DraftMemory
from fluentllm.core.types import KVSpec

from .proposers import Proposing, plugins_offering


def boom(*_: Any) -> Any:
    raise ValueError("no head for this")


def leaves(*_: Any) -> Any:
    sys.exit(3)


def full(*_: Any) -> Any:
    raise torch.OutOfMemoryError("5 GiB were asked for")


def torn(*_: Any) -> Any:
    raise CheckpointError("config.json has no hidden_size.", fix="Add it.")


class Sized:
    def __init__(self, size: Any) -> None:
        self.nbytes = lambda: size


class Stateful(Proposing):
    def __init__(self, context: Any, states: Any) -> None:
        super().__init__(context, boom)
        self.page_states = states


class Factory:
    """Makes proposers; `memory` and `load` are what they are given."""

    def __init__(self, make: Any = lambda context: Proposing(context, boom), **methods: Any) -> None:
        self._make = make
        for name, method in methods.items():
            setattr(self, name, method)

    def __call__(self, context: Any) -> Any:
        return self._make(context)


def keeping(*given: Any, **named: Any) -> Factory:
    return Factory(memory=lambda target: DraftMemory(*given, **named))


GQA = KVSpec(kind="gqa", layers=1, heads=2, head_dim=4, v_head_dim=4)
MADE: dict[str, tuple[Any, str]] = {
    "init": (Factory(boom), "its factory raised ValueError: no head for this"),
    "init exits": (Factory(leaves), "its factory raised SystemExit: 3"),
    "of arguments": (lambda: None, "its factory raised TypeError: "),
    "None": (Factory(lambda context: None), "its factory gave None, which has no method draft"),
    "object": (Factory(lambda context: object()), "its factory gave a object, which has no method draft"),
    "no method": (Factory(lambda context: Sized(3)), "its factory gave a Sized, which has no method draft"),
    "load": (Factory(load=boom), r"its load\(\) raised ValueError: no head for this"),
    "load exits": (Factory(load=leaves), r"its load\(\) raised SystemExit: 3"),
    "no size": (Factory(load=lambda context: object()), r"what its load\(\) gave raised AttributeError: .*nbytes"),
    "size": (Factory(load=lambda context: Sized("3 GB")), r"nbytes\(\) of what its load\(\) gave is '3 GB'"),
    "negative size": (Factory(load=lambda context: Sized(-1)), r"nbytes\(\) of what its load\(\) gave is -1"),
    "states": (Factory(lambda context: Stateful(context, [torch.zeros(1, 4)])), r"its page_states have \[1, 4\] torch.float32"),
    "no states": (Factory(lambda context: Stateful(context, 7)), "its page_states raised TypeError"),
    "list": (Factory(lambda context: Stateful(context, [[0.0]])), "its page_states have list, not a contiguous tensor of"),
}
KEPT: dict[str, tuple[Any, str]] = {
    "memory": (Factory(memory=boom), r"its memory\(\) raised ValueError: no head for this"),
    "memory exits": (Factory(memory=leaves), r"its memory\(\) raised SystemExit: 3"),
    "no method": (Factory(memory=5), r"its memory\(\) raised TypeError: 'int' object is not callable"),
    "None": (Factory(memory=lambda target: None), r"its memory\(\) gave a NoneType"),
    "layers": (keeping(-1, bytes_per_page=-5), r"its memory\(\) gave kv_layers -1, not a whole number of 0 or more"),
    "bytes": (keeping(bytes_per_page=-5), r"its memory\(\) gave bytes_per_page -5, not"),
    "floats": (keeping(bytes_per_page=2.5), r"its memory\(\) gave bytes_per_page 2.5, not"),
    "both": (keeping(2, GQA), r"its memory\(\) gave both kv_layers 2 and kv"),
    "kv": (keeping(kv=3), r"its memory\(\) gave a int as kv, not a KVSpec"),
    "no layer": (keeping(kv=KVSpec(kind="gqa", layers=0, heads=2, head_dim=4, v_head_dim=4)), "which has no layer"),
    "no width": (keeping(kv=KVSpec(kind="gqa", layers=1, heads=2, head_dim=4)), "a layer without size"),
    "no latent": (keeping(kv=KVSpec(kind="mla", layers=1, rope_dim=4)), "a layer without size"),
}


@pytest.mark.parametrize("bad", MADE)
def test_what_a_factory_makes(tiny: Harness, bad: str) -> None:
    factory, said = MADE[bad]
    expect(PluginError, said, lambda: start(tiny, factory))


@pytest.mark.parametrize("bad", KEPT)
def test_what_it_keeps_is_checked_before_anything_is_loaded(tiny: Harness, bad: str) -> None:
    factory, said = KEPT[bad]
    settings = tiny.settings(**{"speculative.method": "test"})
    expect(PluginError, said, lambda: load_model(settings, tiny.files, plugins_offering(factory)))
    expect(PluginError, said, lambda: start(tiny, factory))


def test_the_log_has_the_traceback(tiny: Harness, caplog: pytest.LogCaptureFixture) -> None:
    expect(PluginError, "no head", lambda: start(tiny, Factory(boom)))
    assert "its factory of proposer 'test' of plugin 'testing' failed" in caplog.text
    assert 'raise ValueError("no head for this")' in caplog.text


def test_what_it_refuses_itself_stays_as_it_is(tiny: Harness) -> None:
    def refuse(_: Any) -> Any:
        raise ConfigError("This target is too small.", fix="Take a larger one.")

    for factory in (Factory(refuse), Factory(load=refuse), Factory(memory=refuse)):
        with pytest.raises(ConfigError, match=r"^This target is too small\. Take a larger one\.$"):
            start(tiny, factory)


def test_a_checkpoint_that_is_not_whole_is_the_proposers(tiny: Harness) -> None:
    for factory in (Factory(load=torn), Factory(memory=torn)):
        expect(
            CheckpointError, r"plugin 'testing': config\.json has no hidden_size\. Add it\.", lambda f=factory: start(tiny, f)
        )


def test_a_model_that_does_not_fit(tiny: Harness) -> None:
    expect(OutOfMemory, "does not fit beside the target's: 5 GiB were asked for", lambda: start(tiny, Factory(load=full)))


def expect(kind: type[FluentError], said: str, call: Any) -> None:
    with pytest.raises(kind, match=said) as raised:
        call()
    assert "proposer 'test' of plugin 'testing'" in str(raised.value)
    assert raised.value.fix
    assert raised.value.param == "speculative.method"


def start(tiny: Harness, factory: Any, **settings: Any) -> None:
    settings = {"speculative.method": "test", **settings}
    assemble(tiny.settings(**settings), "tiny", tiny.loaded, plugins_offering(factory)).executor.close()
