"""Values derived from a configuration: settings left at `None`, and quantities that are not settings.

Every function assumes a configuration that `validation.validate` accepts.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import DataConfig, DataSource, FimConfig, ModelConfig, RunConfig


def backend(model: ModelConfig, precision: str, have_te: bool) -> str:
    """Return `torch` or `te`, resolving `model.backend: auto`: Transformer Engine where it can be used (`have_te`), but
    not in fp32, for which it has no fused attention and rounds products to TF32."""
    if model.backend != "auto":
        return model.backend
    return "te" if have_te and precision != "fp32" else "torch"


def head_dim(model: ModelConfig) -> int:
    """Return the channels of one attention head."""
    return model.kv_channels or model.hidden_size // model.num_attention_heads


def num_query_groups(model: ModelConfig) -> int:
    """Return the number of key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def looped_layers(model: ModelConfig) -> range:
    """Return the layers that run in every loop, counted from 0; those before and after them run once."""
    first, last = model.loop_span or (0, model.num_layers)
    return range(first, last)


def count_looped(model: ModelConfig, layers: range) -> int:
    """Return how many of the given layers run in every loop."""
    looped = looped_layers(model)
    return sum(layer in looped for layer in layers)


def layer_runs(model: ModelConfig) -> int:
    """Return the number of layer runs in a forward pass."""
    return model.num_layers + (model.loop_count - 1) * len(looped_layers(model))


def has_gates(model: ModelConfig) -> bool:
    """Return whether the looped layers have gate parameters, which only loops >= 2 use."""
    return model.loop_count > 1 and model.gated_window


def windows_earlier_loops(model: ModelConfig) -> bool:
    """Return whether only the last of several loops attends to the whole context, the earlier ones to a window."""
    return model.loop_count > 1 and model.full_attention == "last_loop"


def has_windows(model: ModelConfig) -> bool:
    """Return whether the looped layers attend to a window, in all loops but the first or all but the last."""
    return has_gates(model) or windows_earlier_loops(model)


def shares_values(model: ModelConfig) -> bool:
    """Return whether loops >= 2 attend to the first loop's V instead of their own."""
    return model.share_kv and model.share_values


def later_loops_use_keys(model: ModelConfig) -> bool:
    """Return whether loops >= 2 attend to keys of their own: to all of them or, in a window, to the last ones."""
    return has_gates(model) or not model.share_kv


def later_loops_use_values(model: ModelConfig) -> bool:
    """Return whether loops >= 2 attend to values of their own."""
    return has_gates(model) or not shares_values(model)


def adds_embeddings(model: ModelConfig) -> bool:
    """Return whether loops >= 2 read the embeddings in addition to the previous loop's output."""
    return model.cross_loop_parallel or model.input_injection


def has_learned_hidden_scale(model: ModelConfig) -> bool:
    """Return whether the scale of h in the input of loops >= 2 is a parameter."""
    return model.loop_count > 1 and adds_embeddings(model) and model.learned_hidden_scale != "none"


def starts_as_one_loop(model: ModelConfig) -> bool:
    """Return whether loops >= 2 change nothing before training: they read E again, and their gates pass on the
    attention to the first loop's K and V unchanged."""
    reads_embeddings = adds_embeddings(model) and model.embedding_scale == 1 and model.hidden_scale == 0
    passes_on = (model.gate_activation, model.gate_side) == ("tanh", "local")
    return model.loop_count == 1 or (reads_embeddings and (passes_on or not model.gated_window))


def yarn_factor(model: ModelConfig) -> float | None:
    """Return YaRN's context extension; None if RoPE is not scaled or scaled another way."""
    return model.rope_scaling.factor if model.rope_scaling is not None and model.rope_scaling.yarn is not None else None


def residual_factor(model: ModelConfig) -> float:
    """Return the factor of the outputs of attention and FFN before they are added to the residual stream."""
    if model.residual_scaling == "none":
        return 1.0
    if model.residual_scaling == "layers":
        return model.residual_scale / model.num_layers
    return model.residual_scale / (model.loop_count * math.sqrt(model.num_layers))


def residual_settings(factor: float, num_layers: int) -> dict[str, Any]:
    """Return settings with this `residual_factor`: by layers, so that it does not depend on the loop count."""
    return {} if factor == 1.0 else {"residual_scaling": "layers", "residual_scale": factor * num_layers}


def output_init_std(model: ModelConfig) -> float:
    """Return the initial standard deviation of the weights that write into the residual stream."""
    return model.init_method_std / math.sqrt(2 * model.num_layers)


def mup_width_mult(model: ModelConfig) -> float:
    """Return the model's width relative to muP's base width; 1 without muP."""
    return model.hidden_size / (model.mup_base_hidden_size or model.hidden_size)


def expert_ffn_hidden_size(model: ModelConfig) -> int:
    """Return the hidden channels of one expert."""
    return (model.moe.ffn_hidden_size if model.moe else None) or model.ffn_hidden_size


def num_experts(model: ModelConfig) -> int:
    """Return the number of experts per MoE layer; 0 for a dense model."""
    return 0 if model.moe is None else model.moe.num_experts


def shared_expert_size(model: ModelConfig) -> int:
    """Return the hidden channels of the shared expert, which every token uses; 0 if there is none."""
    return (model.moe.shared_expert_intermediate_size if model.moe else None) or 0


def has_expert_bias(model: ModelConfig) -> bool:
    """Return whether a bias on each expert's score balances the load."""
    return model.moe is not None and model.moe.router_bias_update_rate is not None


def expert_layers(model: ModelConfig) -> range:
    """Return the layers whose FFN is a mixture of experts, counted from 0."""
    dense = model.num_layers if model.moe is None else model.moe.first_k_dense_replace
    return range(dense, model.num_layers)


def dense_layers(model: ModelConfig) -> range:
    """Return the layers whose FFN is dense: those before the MoE layers."""
    return range(expert_layers(model).start)


def split_ffns(model: ModelConfig) -> dict[str, int]:
    """Return the hidden channels, by setting, of the FFNs that tensor-parallel ranks split: routed experts stay whole,
    a shared one is split."""
    sizes = {"ffn_hidden_size": model.ffn_hidden_size} if dense_layers(model) else {}
    if expert_layers(model) and shared_expert_size(model):
        sizes["moe.shared_expert_intermediate_size"] = shared_expert_size(model)
    return sizes


def padded_vocab_size(model: ModelConfig, vocab_size: int, tensor_model_parallel_size: int = 1) -> int:
    """Return the embedding rows for a tokenizer of `vocab_size` ids, padded as in megatron-core."""
    multiple = model.make_vocab_size_divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def tokens_per_step(config: RunConfig) -> int:
    """Return the tokens of a step of `training.global_batch_size`: every step, unless there is a batch schedule."""
    return config.training.global_batch_size * config.data.sequence_length


def train_iters(config: RunConfig) -> int:
    """Return the run's optimizer steps: as given, or the whole steps that fit in `train_tokens`, at least one."""
    training = config.training
    if training.train_iters is not None:
        return training.train_iters
    assert training.train_tokens is not None, "validate() asks for train_iters or train_tokens"
    return max(1, BatchSchedule(config).steps(training.train_tokens))


def run_tokens(config: RunConfig) -> int:
    """Return the tokens of all steps of the run."""
    return BatchSchedule(config).tokens(train_iters(config))


def last_step(config: RunConfig, step: int, tokens: int) -> int:
    """Return the run's last step if `step` steps have trained on `tokens`, perhaps with other batch sizes."""
    training = config.training
    if training.train_tokens is None or step == 0:
        return train_iters(config)
    return step + BatchSchedule(config).steps(training.train_tokens, tokens)


def tokens_left(config: RunConfig, step: int, tokens: int) -> int:
    """Return the tokens of the remaining steps if `step` steps have trained on `tokens`."""
    steps = max(0, last_step(config, step, tokens) - step)
    return BatchSchedule(config).tokens(steps, tokens) - tokens


def mean_step_tokens(config: RunConfig, step: int, tokens: int) -> float:
    """Return the mean tokens of the remaining steps if `step` steps have trained on `tokens`; if none remains, those
    that one more would have."""
    steps = last_step(config, step, tokens) - step
    return tokens_left(config, step, tokens) / steps if steps > 0 else BatchSchedule(config).step_tokens(tokens)


def order_samples(config: RunConfig) -> int:
    """Return the length of the training samples' permutation: as given, or as many as the run reads."""
    return config.data.order_samples or run_tokens(config) // config.data.sequence_length


def lr_iters(config: RunConfig, step_tokens: int | None = None) -> int:
    """Return the run's length in steps of the learning-rate schedule: its own steps or, if its length is given in
    tokens, steps of `step_tokens` tokens, by default those of `training.global_batch_size`."""
    training = config.training
    if training.train_tokens is None:
        return train_iters(config)
    return max(1, training.train_tokens // (step_tokens or tokens_per_step(config)))


def lr_position(config: RunConfig, step: int) -> float:
    """Return the position in the learning-rate schedule after `step` steps of the run."""
    if config.training.train_tokens is None:
        return step
    return BatchSchedule(config).tokens(step) / tokens_per_step(config)


def lr_decay_iters(config: RunConfig, step_tokens: int | None = None) -> int:
    """Return the steps over which the learning rate decays, warm-up included. `step_tokens`: see `lr_iters`."""
    return config.optimizer.lr_decay_iters or lr_iters(config, step_tokens)


def lr_wsd_decay_iters(config: RunConfig, step_tokens: int | None = None) -> int:
    """Return WSD's decay steps, the last of `lr_decay_iters`; by default a tenth of them."""
    given = config.optimizer.lr_wsd_decay_iters
    return max(1, lr_decay_iters(config, step_tokens) // 10) if given is None else given


def overlap_param_gather(config: RunConfig) -> bool:
    """Return whether updated weights are gathered during the next forward pass."""
    return config.parallel.overlap_param_gather is not False and overlap_obstacle(config) is None


def overlap_obstacle(config: RunConfig) -> str | None:
    """Return why updated weights cannot be gathered during the next forward pass; None if they can."""
    if config.deepspeed is not None:
        return "is not verified with deepspeed"
    if not config.parallel.overlap_grad_reduce:
        return "needs parallel.overlap_grad_reduce=true, which makes buckets"
    if config.model.fused_gated_window:
        return "with model.fused_gated_window: the kernel reads the gates' weights without waiting for them"
    if config.training.loop_schedule:
        return "with training.loop_schedule: nothing waits for weights that a step leaves unused"
    return None


def validation_loop_counts(config: RunConfig) -> list[int]:
    """Return the loop counts at which the validation loss is measured; by default the model's own."""
    return config.validation.loop_counts or [config.model.loop_count]


def loop_loss_weights(config: RunConfig, loop_count: int) -> list[float]:
    """Return the loss weights of loops 1, 2, ... before a step's last; a single configured weight applies to all."""
    weights = config.training.loop_loss_weights
    return weights * (loop_count - 1) if len(weights) == 1 else weights[: loop_count - 1]


def loops_with_loss(config: RunConfig, loop_count: int) -> list[int]:
    """Return the loops with a loss in a training step of `loop_count` loops: the last one, and those with a weight."""
    weights = loop_loss_weights(config, loop_count)
    return [loop for loop, weight in enumerate(weights, start=1) if weight > 0] + [loop_count]


def source_name(source: DataSource) -> str:
    """Return the source's name; by default its file's."""
    return source.name or Path(source.path).name


SOURCE_PARTS = ".parts.json"  # replaces the .bin of a source in parts (data/indexed.py)


def missing_files(prefix: str) -> list[str]:
    """Return the suffixes of the files that a source at this path prefix lacks."""
    tokens = () if Path(prefix + SOURCE_PARTS).is_file() else (".bin",)
    return [suffix for suffix in (*tokens, ".idx") if not Path(prefix + suffix).is_file()]


def fim_rate(data: DataConfig, source: DataSource) -> float:
    """Return the share of a training source's documents that are rearranged for fill-in-the-middle."""
    return fim(data).rate if source.fim_rate is None else source.fim_rate


def fim(data: DataConfig) -> FimConfig:
    """Return the fill-in-the-middle settings; by default with rate 0, since a source may have a rate of its own."""
    return data.fim or FimConfig(rate=0.0)


def run_folder(config: RunConfig) -> Path:
    """Return the folder for everything the run writes."""
    return Path(config.output_dir) / config.name


def has_checkpoints(config: RunConfig) -> bool:
    """Return whether the run's folder has checkpoints of its own, from which the run would go on."""
    folder = run_folder(config) / "checkpoints"
    return config.checkpoint.enabled and "\0" not in str(folder) and any(folder.glob("step_*[0-9]"))


def has_equal_steps(config: RunConfig) -> bool:
    """Return whether a token costs the same throughout the run."""
    return not (config.training.loop_schedule or config.data.length_schedule)


def continues(config: RunConfig) -> bool:
    """Return whether the run goes on where a checkpoint ended, its own or that of `checkpoint.load`."""
    return has_checkpoints(config) or (config.checkpoint.load is not None and not config.checkpoint.weights_only)


def split_shares(split: str) -> tuple[float, float, float] | None:
    """Parse `"95,5,0"` into three shares that sum to 1; None if not three numbers >= 0 with a positive sum."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        return None
    total = sum(shares)
    if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares) or not total > 0:
        return None
    train, validation, test = (share / total for share in shares)
    return train, validation, test


def bucket_elements(data_parallel_size: int) -> int:
    """Return megatron-core's default elements per gradient bucket when reduction overlaps the backward pass."""
    return max(40_000_000, 1_000_000 * data_parallel_size)
