"""The step program: everything from a slot's state to its next tokens, without a host synchronisation.

`decode.py` and `prefill.py` read as the design does; `programs.py` binds them to a model and hands them to the executor.
"""
