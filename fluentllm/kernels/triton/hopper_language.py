"""What kernels in Gluon share on Hopper, as `language.py` is for those in Triton: names that differ by Triton's version, and
programmatic dependent launch."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Triton 3.9 renamed them.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def wait_for_inputs(EARLY: gl.constexpr):
    """Programmatic dependent launch: what the kernels in front wrote is there after this; nothing may be written before it."""
    if EARLY:
        gdc_wait()


@gluon.jit
def launch_dependents():
    """Programmatic dependent launch: the next kernel may be set up now; it waits for this one's end before it reads."""
    gdc_launch_dependents()
