"""Structural tags: texts that begin and end what must be as a JSON schema or another grammar says. Calls of tools are such.

The source is xgrammar's own JSON, with two words more. `special_tokens` lists texts that the model's special tokens may stand
for; others of them are never allowed. A `json_schema` with `"strict": false` need not be kept to where the library cannot.
"""

from __future__ import annotations

import json
from typing import Any

from ...core.errors import InvalidRequest
from .schema import check_schema

MAX_DEPTH = 32
"""Parts inside each other; a call of tools has six."""


def read_structural_tag(source: str, xgrammar: Any, max_whitespace: int | None) -> tuple[str, list[str]]:
    """The tag as the library reads it, and the special tokens. Raises `InvalidRequest`."""
    try:
        tag = json.loads(source)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The structural tag is not valid JSON: {error}.", fix="Correct it.", param="grammar") from None
    if not isinstance(tag, dict):
        raise InvalidRequest(
            "The structural tag is no JSON object.",
            fix='Write {"type": "structural_tag", "format": {…}}.',
            param="grammar",
        )
    special = tag.pop("special_tokens", [])
    if not isinstance(special, list) or not all(isinstance(text, str) for text in special):
        raise InvalidRequest(
            "special_tokens of the structural tag is no list of texts.", fix="Correct it, or leave it out.", param="grammar"
        )
    _Reading(xgrammar, max_whitespace).visit(tag.get("format"), 0)
    return json.dumps(tag), special


class _Reading:
    def __init__(self, xgrammar: Any, max_whitespace: int | None) -> None:
        self._xgrammar = xgrammar
        self._max_whitespace = max_whitespace

    def visit(self, part: Any, depth: int) -> None:
        """Checks the schemas in it, and bounds their white space."""
        if depth > MAX_DEPTH:
            raise InvalidRequest(
                f"The structural tag has more than {MAX_DEPTH} parts inside each other.", fix="Flatten it.", param="grammar"
            )
        if isinstance(part, list):
            for one in part:
                self.visit(one, depth + 1)
        elif isinstance(part, dict) and part.get("type") == "json_schema":
            self._schema(part)
        elif isinstance(part, dict):
            for value in part.values():
                self.visit(value, depth + 1)

    def _schema(self, part: dict[str, Any]) -> None:
        if self._max_whitespace is not None:
            part.setdefault("max_whitespace_cnt", max(1, self._max_whitespace))  # the library takes no 0 here
        schema = part.get("json_schema")
        if part.pop("strict", True) is not False:
            check_schema(schema)
            return
        try:
            check_schema(schema)
            self._xgrammar.Grammar.from_json_schema(json.dumps(schema))
        except (InvalidRequest, RuntimeError):
            part["json_schema"] = {"type": "object"} if isinstance(schema, dict) and schema.get("type") == "object" else True
