"""Kernels in CUDA C++, for what Triton and Gluon do not have: programs of a cluster that write into each other's shared memory.

A kernel is a `.cu` file, what it shares with others stands in `hopper.cuh`, and a Python file of the same name launches it.
`compile.py` has NVRTC compile it when it is first wanted, and keeps the result; `launch.py` launches it through the driver.
"""
