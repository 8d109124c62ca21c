"""Construction of this rank's part of the model, with its initial weights."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from plt_megatron.config import derived
from plt_megatron.config.schema import RunConfig
from plt_megatron.model.initialization import global_names, initialize
from plt_megatron.model.looped_gpt import LoopedGPT
from plt_megatron.model.te_attention import require_transformer_engine
from plt_megatron.model.trainable import trains
from plt_megatron.model.transformer_config import DTYPES, resolve_backend, transformer_config
from plt_megatron.model.z_loss import HeadZLoss
from plt_megatron.runtime.kernels import check_kernels, choose_fp8, choose_fusions


def build_stage(config: RunConfig, vocab_size: int) -> LoopedGPT:
    """Build this rank's part of the model with its initial weights, on the device and in the run's precision.

    Process groups must exist. Also seeds megatron-core's RNG states.
    """
    training, parallel = config.training, config.parallel
    if resolve_backend(config.model) == "te":
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
            fusions=choose_fusions(config, resolve_backend(config.model), vocab_size),
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
    return stage.to(dtype=DTYPES[training.precision], device=torch.cuda.current_device())
