"""Models that know tools: chat templates of each format, and tools to offer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frontend.checkpoints import byte_level, write_folder
from tokenizers import AddedToken

from .conftest import TINY

PLAIN = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}CALL{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}\n"
    "{% endfor %}<assistant>{% if thinking %}THINK\n{% endif %}"
)
TEMPLATES = {
    "hermes": PLAIN.replace("CALL", "<tool_call>").replace("THINK", "<think>") + "{# </think> #}",
    "longcat": PLAIN.replace("CALL", "<longcat_tool_call>").replace("THINK", "<longcat_think>") + "{# </longcat_think> #}",
    "lite": PLAIN.replace("CALL", "<longcat_tool_call><longcat_arg_key>"),
    "llama3_json": PLAIN.replace("CALL", '<|start_header_id|>"parameters"'),
    "mistral": PLAIN.replace("CALL", "[TOOL_CALLS]"),
    "deepseek_v3": PLAIN.replace("CALL", "<｜tool▁calls▁begin｜>").replace("| tojson }}{% endfor", "+ '```json' }}{% endfor"),
}
SPECIAL = ["<longcat_tool_call>", "</longcat_tool_call>", "<longcat_think>", "</longcat_think>", "<longcat_other>"]


def write_model(folder: Path, name: str) -> Path:
    """A model's folder without weights, whose template is that of a format. LongCat's markers are special tokens."""
    tokenizer = byte_level()
    if "longcat_tool_call" in TEMPLATES[name]:
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    write_folder(folder, tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATES[name])
    config = {**TINY, "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Today's.", "parameters": CITY},
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time"}}
TOOLS = [WEATHER, TIME]
