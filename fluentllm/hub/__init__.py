"""Models by name: finds their files, fetching them where needed, and reads their configuration. Torch-free.

files = resolve("smollm2")          # or a folder, a .gguf file, a Hugging Face id
config = load_config(files)         # as config.json has it, also for a GGUF
"""

from __future__ import annotations

from .config import load_config
from .defaults import DEFAULTS, Default
from .files import ModelFiles, check_name, resolve, resolve_draft
from .progress import Progress

__all__ = ["DEFAULTS", "Default", "ModelFiles", "Progress", "check_name", "load_config", "resolve", "resolve_draft"]
