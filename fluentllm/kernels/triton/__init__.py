"""Triton kernels of the GPU engine, one kernel a file: the launcher, and in its docstring the shapes and the torch reference.

Nothing here synchronises with the host, so everything can be captured in a CUDA graph.
"""
