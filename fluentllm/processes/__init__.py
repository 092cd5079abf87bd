"""The processes of a server: a torch-free supervisor, the front end and the engine under it.

supervisor ── control line (JSON) ──┬── front end   owns HTTP, tokenizers
   │                                └── engine      owns the model, the device
   └ public socket, inherited by the front end; front end ── engine.sock (msgpack frames) ── engine
"""
