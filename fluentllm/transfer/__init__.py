"""What moves KV between engines: layouts, slices, descriptors, control frames, and the common half of transports.

The transports themselves are plugins (`kv_nixl`, `kv_mooncake`, `kv_loopback`); who sends what when is the handoff's.
"""
