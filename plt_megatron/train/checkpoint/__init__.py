"""Checkpoints: megatron-core's distributed format, published atomically, loadable in any layout.

`publishing` turns a folder into a checkpoint (`run_folder.checkpoints` finds it), `state` is the engine's state as
sharded tensors, `saving` and `loading` convert between the two, `reading` is for programs without an engine, `store`
for a training run.
"""
