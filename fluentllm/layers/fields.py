"""Reading a Hugging Face config: typed fields, and refusals by name for what a model cannot honour.

Model families use it in `spec` and `build`; torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import CheckpointError


class Fields:
    """A config whose fields are asked for by name and type. Every error names architecture, field and value."""

    def __init__(self, config: Mapping[str, Any], architecture: str) -> None:
        self.config = config
        self.architecture = architecture

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self._wrong(name, value, "a whole number of 0 or more")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        value = self.integer(name, default)
        if not value:
            raise self._wrong(name, value, "a whole number of 1 or more")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.config.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, value, "a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def integers(self, name: str) -> tuple[int, ...]:
        """One, several or none."""
        value = self.config.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in values):
            raise self._wrong(name, value, "a whole number or a list of them")
        return tuple(values)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any other value than these; a missing field is the first of them."""
        value = self.config.get(name, allowed[0])
        if value not in allowed:
            listed = " or ".join(repr(item) for item in allowed)
            raise CheckpointError(
                f"{self.architecture} with {name}: {value!r} is not supported; this version computes {listed}.",
                fix="Use another checkpoint, or a plugin that supports it.",
            )

    def absent(self, *names: str) -> None:
        """Refuse configs that switch these features on."""
        for name in names:
            if self.config.get(name):
                self.only(name, None)

    def _value(self, name: str, default: Any) -> Any:
        value = self.config.get(name)
        if value is not None:
            return value
        if default is None:
            raise CheckpointError(
                f"config.json of {self.architecture} has no {name!r}.", fix="Take config.json from the model's publisher."
            )
        return default

    def _wrong(self, name: str, value: Any, wanted: str) -> CheckpointError:
        return CheckpointError(f"config.json of {self.architecture}: {name} is {value!r}, not {wanted}.")
