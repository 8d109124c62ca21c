"""plt_megatron: pretraining Parallel Loop Transformers (arXiv 2510.24824) on megatron-core."""

__version__ = "0.1.0"
