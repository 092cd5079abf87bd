"""The plugins of a process: found by entry point, held to the contract, timed and contained.

`manager.py` tells the whole story.
"""

from .manager import HOOK_PROCESSES, REGISTRIES, PluginManager

__all__ = ["HOOK_PROCESSES", "REGISTRIES", "PluginManager"]
