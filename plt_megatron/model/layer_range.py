"""Some of a block's layers, run as megatron-core runs a block: with its recomputation and precision contexts."""

from __future__ import annotations

import copy

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn


def part_of(block: TransformerBlock, layers: range) -> TransformerBlock:
    """The layers of `block` with these indices, as a block: a view, which owns no parameters.

    Made for each pass, so that it is in the mode of `block`; recomputation, which runs it again later, keeps it.
    """
    part = copy.copy(block)
    part._modules = {**block._modules, "layers": nn.ModuleList(block.layers[layers.start : layers.stop])}
    part.num_layers_per_pipeline_rank = len(layers)
    return part
