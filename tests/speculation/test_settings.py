"""Settings of speculation that cannot be honoured are refused: where they are read, or at least before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest
from engine.harness import Harness

from fluentllm.assembly import load_model
from fluentllm.cli import options
from fluentllm.core import config
from fluentllm.core.errors import ConfigError

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "k": ({"speculative.k": "99"}, r"speculative\.k is '99': Expected `int` <= 7\. Give int ≥ 0, ≤ 7 or one of auto"),
    "below": ({"speculative.k": -1}, r"speculative\.k is -1: Expected `int` >= 0"),
    "word": ({"speculative.k": "all"}, r"speculative\.k is 'all'.*Give int ≥ 0, ≤ 7 or one of auto"),
    "most": ({"speculative.max_k": 8}, r"speculative\.max_k is 8: Expected `int` <= 7"),
    "beyond": ({"speculative.k": 5}, r"speculative: k is 5, and max_k 4: use auto or 0 … 4, or raise max_k \(at most 7\)"),
    "lower": ({"speculative.k": 3, "speculative.max_k": 2}, "k is 3, and max_k 2: use auto or 0 … 2"),
    "n-grams": (
        {"plugins.spec_pld.shortest": 5, "plugins.spec_pld.longest": 3},
        r"plugins\.spec_pld: shortest is 5, above longest, which is 3",
    ),
    "default": ({"plugins.spec_pld.shortest": 6}, "shortest is 6, above longest, which is 4: lower it or raise longest"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_refused_where_it_is_read(wrong: str) -> None:
    given, said = WRONG[wrong]
    with pytest.raises(ConfigError, match=said):
        config.load(None, given, {})


def test_the_largest_k() -> None:
    settings = config.load(None, {"speculative.k": "7", "speculative.max_k": "7"}, {}).settings
    assert settings.speculative.k == 7
    assert config.load(None, {"speculative.k": "auto"}, {}).settings.speculative.k == "auto"


def test_the_command_line_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"command line, --speculative-k: speculative\.k is '99': Expected `int` <= 7"):
        options.load(None, {"speculative.k": "99"}, None, {})


@pytest.mark.parametrize("k", [0, 3, "auto"])
def test_a_method_that_nobody_offers(tiny: Harness, k: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"No plugin offers the proposer of drafts 'nope'; there are: eagle, mtp, pld"
    ) as raised:
        load(tiny, **{"speculative.method": "nope", "speculative.k": k})
    assert raised.value.param == "speculative.method"


@pytest.mark.parametrize("k", [0, "auto"])
def test_a_method_that_is_not_for_this_model(tiny: Harness, k: Any) -> None:
    with pytest.raises(ConfigError, match=r"'mtp' cannot be used here: this checkpoint of LlamaForCausalLM has no MTP layer"):
        load(tiny, **{"speculative.method": "mtp", "speculative.k": k})


@pytest.mark.parametrize("k", [0, "auto"])
def test_a_draft_model_for_a_method_without_one(tiny: Harness, k: Any) -> None:
    said = (
        r"speculative\.model is 'heads', but the proposer 'pld' of plugin 'spec_pld' has no model of its own\. Set .* to null"
    )
    with pytest.raises(ConfigError, match=said) as raised:
        load(tiny, **{"speculative.method": "pld", "speculative.model": "heads", "speculative.k": k})
    assert raised.value.param == "speculative.model"


def load(tiny: Harness, **settings: Any) -> None:
    load_model(tiny.settings(**settings), tiny.files, tiny.plugins)
