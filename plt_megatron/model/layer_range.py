"""Part of a block's layers, run the way megatron-core runs a block: with its recomputation and precision contexts."""

from __future__ import annotations

import copy

from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn


def part_of(block: TransformerBlock, layers: range) -> TransformerBlock:
    """Return the layers of `block` with these indices as a block: a view, which owns no parameters.

    Created for each pass, so that it has the training mode of `block`; recomputation, which runs it again later, keeps
    a reference to it.
    """
    part = copy.copy(block)
    part._modules = {**block._modules, "layers": nn.ModuleList(block.layers[layers.start : layers.stop])}
    part.num_layers_per_pipeline_rank = len(layers)
    return part
