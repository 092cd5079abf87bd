"""The microkernel: an event loop, the contract with plugins, and the memory they share.

Nothing in here imports a plugin, a model, a kernel or HTTP; the torch-free half (`types`, `protocols`, `hookspecs`,
`plugins`, `config`, `ipc`, `errors`, `batch`) is what the front end may import.
"""
