"""Put an engine together: checkpoint → model → memory plan → pool, tables, attention, programs → engine.

The one room that knows which plugin objects the settings ask for.
"""

from ..devices import choose_device
from .choices import choose_dtype, choose_kv_dtype, choose_library, choose_page_size, draft_length, wants_library
from .engine import assemble, build_engine
from .loading import LoadedModel, load_model

__all__ = [
    "LoadedModel",
    "assemble",
    "build_engine",
    "choose_device",
    "choose_dtype",
    "choose_kv_dtype",
    "choose_library",
    "choose_page_size",
    "draft_length",
    "load_model",
    "wants_library",
]
