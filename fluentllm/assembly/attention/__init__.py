"""Which backend attends, in prefill and in decode: by name, or by measurement on this GPU."""

from .choice import attention_for, candidates, described

__all__ = ["attention_for", "candidates", "described"]
