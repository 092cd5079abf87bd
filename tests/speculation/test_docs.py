"""The proposer that docs/speculation.md shows works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from engine.harness import Harness

from fluentllm.core.plugins import PluginManager

PAGE = Path(__file__).parents[2] / "docs" / "speculation.md"


async def test_the_example_drafts(tiny: Harness) -> None:
    (source,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec(compile(source, str(PAGE), "exec"), found)
    plugins = PluginManager.load({"engine", "executor"}, allow=[], deny=[], objects={"repeat": found["plugin"]})
    prompt = [9, 8, 7]
    async with tiny.engine(**{"speculative.method": "none"}) as running:
        expected = await running.tokens(prompt, max_tokens=20, ignore_eos=True)
    async with tiny.engine(plugins=plugins, **{"speculative.method": "repeat"}) as running:
        assert await running.tokens(prompt, max_tokens=20, ignore_eos=True) == expected
        speculative = running.engine.stats().speculative
    assert speculative is not None
    assert speculative.error is None
    assert speculative.drafted[0] > 0
