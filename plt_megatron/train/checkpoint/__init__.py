"""Checkpoints: megatron-core's distributed format, published atomically, loadable in any layout.

`run_folder.checkpoints` publishes and finds them, `state` is the engine's state as sharded tensors,
`saving` and `loading` convert between the two, `reading` is for programs without an engine, `store` for a training run.
"""
