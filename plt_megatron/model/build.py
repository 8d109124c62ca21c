"""Construction of this rank's part of the model, with initial weights that do not depend on the layout.

Each parameter has its own generator, seeded with the run's seed and the parameter's name in the whole model. A
tensor-parallel rank draws the whole tensor and keeps its part, so that one process and any TP x PP x DP start from the
same weights.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.parameters import Sizes, find, is_buffer
from plt_megatron.model.te_attention import require_transformer_engine
from plt_megatron.model.trainable import trains
from plt_megatron.model.transformer_config import DTYPES, resolve_backend, transformer_config
from plt_megatron.model.z_loss import HeadZLoss
from plt_megatron.runtime.environment import check_environment
from plt_megatron.runtime.kernels import check_kernels, choose_fp8, choose_fusions

# An expert's weight: of its own module, or one of a grouped GEMM's numbered parameters.
_EXPERT = re.compile(r"(.*\.mlp\.experts\.)(?:local_experts\.(\d+)\.(.*)|(.*\.weight)(\d+))")


def global_names(stage: LoopedGPT) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (name in the whole model, parameter). Layers are numbered over all pipeline stages, a layer's experts over
    all expert-parallel ranks, from 0."""
    for name, parameter in stage.named_parameters():
        yield _global_name(name, stage), parameter


def global_tensors(stage: LoopedGPT) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the whole model, tensor) for all that a checkpoint has of the model: parameters, then buffers."""
    yield from global_names(stage)
    for name, buffer in stage.named_buffers():
        if is_buffer(name):
            yield _global_name(name, stage), buffer


def _global_name(name: str, stage: LoopedGPT) -> str:
    match = re.match(r"(decoder\.layers\.)(\d+)(\..*)", name)
    if match:
        layer = stage.decoder.layers[int(match[2])].layer_number - 1
        return _global_expert(f"{match[1]}{layer}{match[3]}", stage)
    if name == "output_layer.weight" and stage.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy
    return name


def _global_expert(name: str, stage: LoopedGPT) -> str:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name
    group, experts = stage.pg_collection.ep, derived.num_experts(stage.plt)
    local, weight = (match[2], match[3]) if match[2] is not None else (match[5], match[4])
    return f"{match[1]}{group.rank() * (experts // group.size()) + int(local)}.{weight}"


@torch.no_grad()
def initialize(stage: LoopedGPT, seed: int) -> None:
    """Set this stage's parameters to their initial values."""
    for name, parameter in global_names(stage):
        parameter.copy_(initial_value(stage, name, seed))


def initial_value(stage: LoopedGPT, name: str, seed: int) -> Tensor:
    """Return this tensor-parallel rank's part of a parameter's initial value, as the table (`model/parameters.py`)
    defines it; fp32, on the CPU. `name` is the one in the whole model."""
    parameter = find(stage.plt, name)
    shape = Sizes.of(stage.plt, stage.padded_vocab_size).shape(parameter.dims)
    constant = parameter.constant(stage.plt)
    if constant is not None:
        whole = torch.full(shape, constant)
    else:
        whole = _draw(name, seed, shape, parameter.std(stage.plt))
    group = stage.pg_collection.tp
    return parameter.part_of_rank(whole, group.rank(), group.size())


def _draw(name: str, seed: int, shape: tuple[int, ...], std: float) -> Tensor:
    # Padding rows of the embedding must not change the others: draw one stream, in fp32. torch draws in blocks of 16
    # and redraws the last 16 values if they are not a whole block, so ask for whole blocks.
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    size = math.prod(shape)
    whole_blocks = torch.empty(-(-size // 16) * 16, dtype=torch.float32)
    return whole_blocks.normal_(0.0, std, generator=generator)[:size].view(shape)


def build_stage(config: RunConfig, vocab_size: int) -> LoopedGPT:
    """Build this rank's part of the model with its initial weights, on the device and in the run's precision.

    Process groups must exist. Also seeds megatron-core's RNG states.
    """
    training, parallel = config.training, config.parallel
    check_environment(deterministic=training.deterministic)
    backend = resolve_backend(config.model, training.precision)
    if backend == "te":
        require_transformer_engine()
        check_kernels(config)
    tensor_parallel.model_parallel_cuda_manual_seed(training.seed)
    stage = LoopedGPT(
        transformer_config(
            config.model,
            parallel,
            precision=training.precision,
            deterministic=training.deterministic,
            fp8=choose_fp8(config),
            fusions=choose_fusions(config, backend, vocab_size),
            packed_documents=config.data.reset_at_document_boundaries,
        ),
        vocab_size,
        config.data.sequence_length,
        padded_vocab_size=derived.padded_vocab_size(config.model, vocab_size, parallel.tensor_model_parallel_size),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    stage.loop_loss_weights = tuple(derived.loop_loss_weights(config, config.model.loop_count))
    if training.z_loss_coeff:
        stage.z_loss = HeadZLoss(training.z_loss_coeff, stage.pg_collection.tp)
    initialize(stage, training.seed)
    is_trained = trains(config)
    for name, parameter in global_names(stage):
        parameter.requires_grad_(is_trained(name))
    for module in stage.modules():
        if getattr(module, "expert_bias", None) is not None:  # moved by megatron-core, without a gradient
            module.frozen_expert_bias = not module.weight.requires_grad
    return stage.to(dtype=DTYPES[training.precision], device=torch.cuda.current_device())
