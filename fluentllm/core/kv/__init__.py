"""Where KV lives: page allocator with leases, radix tree over pages, pool tensors, cache events."""
