"""`LLM`: the engine in this process, as one uses it in a script or a notebook."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.harness import write_tiny_llama

from fluentllm import LLM, SamplingOptions
from fluentllm.core.errors import ContextTooLong, EngineUnavailable, FluentError, InvalidRequest, ModelNotFound

SETTINGS: dict[str, Any] = {
    "model.load_format": "dummy",
    "engine.device": "cpu",
    "engine.threads": 1,
    "engine.deterministic": True,
}
GREEDY = SamplingOptions(max_tokens=6, temperature=0, ignore_eos=True)

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("llm") / "tiny", vocab_size=300)


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), settings=SETTINGS) as made:
        yield made


def test_one_prompt_or_several_as_text_or_as_ids(llm: LLM) -> None:
    [one] = llm.generate("abc", GREEDY)
    assert one.finish_reason == "length"
    assert len(one.tokens) == 6
    assert isinstance(one.text, str)
    first, second = llm.generate(["abc", "another, longer one"], GREEDY)
    assert first.tokens == one.tokens != second.tokens
    [by_ids] = llm.generate([5, 6, 7], GREEDY)
    assert [c.tokens for c in llm.generate([[5, 6, 7], [5, 6, 7]], GREEDY)] == [by_ids.tokens] * 2
    assert llm.generate([], GREEDY) == []


def test_choices_come_prompt_by_prompt(llm: LLM) -> None:
    options = SamplingOptions(max_tokens=4, temperature=1.5, seed=3, n=2, ignore_eos=True)
    found = llm.generate(["abc", "def"], options)
    assert [c.index for c in found] == [0, 1, 2, 3]
    assert found[0].tokens != found[1].tokens
    assert [c.tokens for c in llm.generate(["abc", "def"], options)] == [c.tokens for c in found]


async def test_it_works_where_a_loop_runs_already(llm: LLM) -> None:
    """A notebook's cell is such a place."""
    assert len(llm.generate("abc", GREEDY)[0].tokens) == 6


def test_more_prompts_than_the_queue_holds(folder: Path) -> None:
    with LLM(str(folder), settings={**SETTINGS, "scheduler.max_waiting": 3, "scheduler.max_running": 2}) as small:
        found = small.generate([[5 + i] for i in range(8)], SamplingOptions(max_tokens=2, n=2, temperature=0, ignore_eos=True))
        assert [c.index for c in found] == list(range(16))
        assert found[4].tokens == found[5].tokens == small.generate([7], GREEDY)[0].tokens[:2]


def test_a_chat_needs_a_template(llm: LLM, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    with LLM(str(folder), settings={**SETTINGS, "model.chat_template": str(template)}) as chatty:
        [answer] = chatty.chat([{"role": "user", "content": "hi"}], GREEDY)
        assert answer.tokens == chatty.generate("user: hi\n", GREEDY)[0].tokens
        both = chatty.chat([[{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}]], GREEDY)
        assert both[0].tokens == answer.tokens
        with pytest.raises(InvalidRequest, match="no place for them"):
            chatty.chat([{"role": "user", "content": "hi"}], GREEDY, tools=TOOLS)
        with pytest.raises(InvalidRequest, match="no variable 'thinking'"):
            chatty.chat([{"role": "user", "content": "hi"}], GREEDY, chat_template_kwargs={"thinking": True})


def test_a_chat_takes_tools_and_variables(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ tools[0].function.name }} {{ mood }}: {{ messages[0].content }}")
    with LLM(str(folder), settings={**SETTINGS, "model.chat_template": str(template)}) as chatty:
        message = {"role": "user", "content": "hi"}
        [answer] = chatty.chat([message], GREEDY, tools=TOOLS, chat_template_kwargs={"mood": "glad"})
        assert answer.tokens == chatty.generate("weather glad: hi", GREEDY)[0].tokens


def test_a_chats_messages_are_those_of_the_api(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}")
    with LLM(str(folder), settings={**SETTINGS, "model.chat_template": str(template)}) as chatty:
        [whole] = chatty.chat([{"role": "user", "content": "hi"}], GREEDY)
        [in_parts] = chatty.chat([{"role": "user", "content": [{"type": "text", "text": "hi"}]}], GREEDY)
        assert whole.tokens == in_parts.tokens == chatty.generate("user: hi", GREEDY)[0].tokens
        with pytest.raises(InvalidRequest, match="bob"):
            chatty.chat([{"role": "bob", "content": "hi"}], GREEDY)
        with pytest.raises(InvalidRequest, match="max_tokens is 0"):
            chatty.generate("hi", SamplingOptions(max_tokens=0))


def test_a_file_of_settings_names_the_model(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "llm.yaml"
    file.write_text(f"model: {{name: {folder}, load_format: dummy}}\nengine: {{device: cpu, threads: 1}}\n")
    with LLM(config=file) as made:
        assert made.generate("abc", GREEDY)[0].tokens
    with pytest.raises(ModelNotFound, match="no-such-model"):
        LLM("no-such-model", config=file)


def test_what_cannot_be_done_is_said(llm: LLM) -> None:
    with pytest.raises(ContextTooLong, match="512"):
        llm.generate("abc", SamplingOptions(max_tokens=600))
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("abc", SamplingOptions(temperature=9))
    with pytest.raises(FluentError, match="unknown key"):
        LLM("smollm2", settings={"engine.treads": 1})
    assert llm.generate("abc", GREEDY)[0].tokens


def test_a_closed_one_says_so(folder: Path) -> None:
    made = LLM(str(folder), settings=SETTINGS)
    made.close()
    made.close()
    with pytest.raises(EngineUnavailable, match="closed"):
        made.generate("abc", GREEDY)
