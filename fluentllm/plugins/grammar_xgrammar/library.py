"""The import of xgrammar, which asks for Transformers only to recognise its tokenizers, and never gets one here."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("PreTrainedTokenizerBase", "PreTrainedTokenizerFast", "LogitsProcessor")
"""What xgrammar imports from Transformers, as types of arguments and as a base of a class that is not used here."""


def load_xgrammar() -> Any:
    """The module. Raises `ImportError`. Where Transformers is not installed, it is imported without."""
    if "xgrammar" in sys.modules or "transformers" in sys.modules or find_spec("transformers") is not None:
        import xgrammar

        return xgrammar
    with _empty_transformers():
        import xgrammar

        return xgrammar


@contextmanager
def _empty_transformers() -> Iterator[None]:
    """While xgrammar is imported; nobody else finds a Transformers that is none."""
    module = ModuleType("transformers")
    for name in NAMES:
        setattr(module, name, type(name, (), {}))
    sys.modules["transformers"] = module
    try:
        yield
    finally:
        del sys.modules["transformers"]
