"""Initial weights that do not depend on the layout.

Each parameter's values come from a generator of its own, seeded with the run's seed and the parameter's name in the
whole model. A tensor-parallel rank draws the whole tensor and keeps its part, so that a run has the same weights on one
process and on any TP x PP x DP.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from plt_megatron.model.looped_gpt import LoopedGPT

_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")  # what writes into the residual stream


# An expert's weight: one of several modules, or one of several parameters of a grouped GEMM.
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(?:local_experts\.(\d+)\.(.*)|(.*\.weight)(\d+))")


def global_names(stage: LoopedGPT) -> Iterator[tuple[str, nn.Parameter]]:
    """(name in the whole model, parameter): layers are numbered over all pipeline stages, a layer's experts over all
    expert-parallel ranks, from 0."""
    for name, parameter in stage.named_parameters():
        match = re.match(r"(decoder\.layers\.)(\d+)(\..*)", name)
        if match:
            layer = stage.decoder.layers[int(match[2])].layer_number - 1
            name = _global_expert(f"{match[1]}{layer}{match[3]}", stage)
        elif name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy
        yield name, parameter


def _global_expert(name: str, stage: LoopedGPT) -> str:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    group, experts = stage.pg_collection.ep, stage.plt.num_moe_experts or 0
    local, weight = (match[2], match[3]) if match[2] is not None else (match[5], match[4])
    return f"{match[1]}{group.rank() * (experts // group.size()) + int(local)}.{weight}"


def initialize(stage: LoopedGPT, seed: int) -> None:
    """Draw this stage's weights: normal with `init_method_std`, divided by sqrt(2 * num_layers) where a layer writes
    into the residual stream (Megatron's scaled initialisation); biases, norms and gates stay as built."""
    config = stage.config
    for name, parameter in global_names(stage):
        if name.endswith("linear_qkv.bias"):
            with torch.no_grad():
                parameter.zero_()
        if parameter.dim() < 2 or ".plt_gate." in name:
            continue
        std = config.init_method_std
        if name.endswith(_OUTPUTS):
            std /= math.sqrt(2 * config.num_layers)
        with torch.no_grad():
            parameter.copy_(_own_part(_draw(name, seed, _whole_shape(name, parameter, stage), std), name, stage))


def _whole_shape(name: str, parameter: Tensor, stage: LoopedGPT) -> tuple[int, ...]:
    shape = list(parameter.shape)
    axis = _split_axis(name)
    if axis is not None:
        shape[axis] *= stage.pg_collection.tp.size()
    return tuple(shape)


def _split_axis(name: str) -> int | None:
    """The axis that tensor-parallel ranks split; experts and routers are whole on each."""
    if ".mlp.experts." in name or ".mlp.router." in name:
        return None
    return 1 if name.endswith(_OUTPUTS) else 0


def _draw(name: str, seed: int, shape: tuple[int, ...], std: float) -> Tensor:
    # The embedding's padding rows must not move the others: one stream, in fp32. torch draws it in blocks of 16 and
    # draws the last 16 anew where they are no whole block: ask for whole ones.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    size = math.prod(shape)
    whole_blocks = torch.empty(-(-size // 16) * 16, dtype=torch.float32)
    return whole_blocks.normal_(0.0, std, generator=generator)[:size].view(shape)


def _own_part(whole: Tensor, name: str, stage: LoopedGPT) -> Tensor:
    group, axis = stage.pg_collection.tp, _split_axis(name)
    if group.size() == 1 or axis is None:
        return whole
    if name.endswith("linear_fc1.weight"):
        # Each rank holds [its gate rows, its up rows].
        gate, up = whole.chunk(2)
        return torch.cat([half.chunk(group.size())[group.rank()] for half in (gate, up)])
    return whole.chunk(group.size(), dim=axis)[group.rank()]
