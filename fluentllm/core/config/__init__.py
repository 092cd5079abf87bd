"""Fills the tree of settings from file, environment and command line.

`sources.py` reads, `tree.py` knows the keys, `loading.py` merges and checks, `describe.py` explains.
"""

from .loading import Loaded, bind, every_struct, from_json, installed_structs, load, load_lists, to_json

__all__ = ["Loaded", "bind", "every_struct", "from_json", "installed_structs", "load", "load_lists", "to_json"]
