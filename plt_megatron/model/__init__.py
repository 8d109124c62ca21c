"""The Parallel Loop Transformer on megatron-core's layers."""
