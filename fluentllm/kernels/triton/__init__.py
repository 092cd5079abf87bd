"""Triton kernels of the GPU engine, one kernel a file: the launcher, and in its docstring the shapes and the torch reference.

Nothing here synchronises with the host, so everything can be captured in a CUDA graph.
"""

import os

# From 3.10 on Triton rounds products before it adds them, unless it is told not to.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
