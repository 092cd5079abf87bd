"""Which backend attends, in prefill and in decode: by name, or by measurement on this GPU."""

from .choice import asked_for, attention_for, candidates, described

__all__ = ["asked_for", "attention_for", "candidates", "described"]
