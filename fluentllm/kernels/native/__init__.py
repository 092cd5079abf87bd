"""C kernels for decode on an x86 CPU: products of packed weights, norms, gates, rotary, attention over pages."""
