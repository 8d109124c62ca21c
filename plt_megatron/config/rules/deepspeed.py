"""DeepSpeed's configuration, generated from ours, and rules for the section `deepspeed`.

Our configuration is the only authority: `written` returns what it decides, and the raw `deepspeed.config` may add only
keys of `ADDABLE`. Every problem names what to set instead. Imports no torch, so that a bad section is refused in
milliseconds. The engine is in `train/deepspeed`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, Literal

from plt_megatron.config.fields import leaves
from plt_megatron.config.layout import num_microbatches
from plt_megatron.config.rules.optimizer import optimizer_spec
from plt_megatron.config.schema import DeepSpeedConfig, RunConfig
from plt_megatron.config.yaml_nodes import text_of

Kind = Literal["bool", "count", "positive", "even"]

# Keys that the raw section may add: speed, memory, reports. `count`: a whole number >= 0, also 5e8; `positive`: >= 1;
# `even`: a multiple of 2.
ADDABLE: dict[str, Kind] = {
    "steps_per_print": "positive",
    "wall_clock_breakdown": "bool",
    "memory_breakdown": "bool",
    "dump_state": "bool",
    "comms_logger.enabled": "bool",
    "comms_logger.verbose": "bool",
    "comms_logger.prof_all": "bool",
    "comms_logger.debug": "bool",
    "zero_optimization.reduce_bucket_size": "positive",
    "zero_optimization.allgather_bucket_size": "even",
    "zero_optimization.allgather_partitions": "bool",
    "zero_optimization.reduce_scatter": "bool",
    "zero_optimization.round_robin_gradients": "bool",
    "zero_optimization.use_multi_rank_bucket_allreduce": "bool",
    "zero_optimization.sub_group_size": "count",
    "zero_optimization.stage3_max_live_parameters": "count",
    "zero_optimization.stage3_max_reuse_distance": "count",
    "zero_optimization.stage3_prefetch_bucket_size": "count",
    "zero_optimization.stage3_param_persistence_threshold": "count",
    "zero_optimization.stage3_model_persistence_threshold": "count",
    "zero_optimization.offload_optimizer.pin_memory": "bool",
    "zero_optimization.offload_param.pin_memory": "bool",
}

# Keys that our settings decide -> the setting; a raw key may only repeat its value.
DECIDED_BY: dict[str, str] = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "gradient_clipping": "optimizer.clip_grad",
    "optimizer.type": "optimizer.name",
    "optimizer.params.lr": "optimizer.lr",
    "optimizer.params.betas": "optimizer.adam_beta1 and optimizer.adam_beta2",
    "optimizer.params.eps": "optimizer.adam_eps",
    "optimizer.params.weight_decay": "optimizer.weight_decay",
    "bf16.enabled": "training.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "deepspeed.offload_param",
}

# Keys of DeepSpeed that are refused here -> what to do instead. A key includes all keys below it.
REFUSED: dict[str, str] = {
    **dict.fromkeys(("fp16", "amp", "torch_autocast"), "set training.precision=bf16"),
    "scheduler": "set the optimizer section's lr_decay_style and related settings",
    "zero_optimization.overlap_comm": "it reduces gradients before the last loop has added to them; leave it out",
    "zero_optimization.offload_optimizer.ratio": "leave it out: all of the optimizer is offloaded",
    "zero_optimization.offload_optimizer.nvme_path": "set deepspeed.offload_optimizer=cpu",
    "zero_optimization.offload_param.nvme_path": "set deepspeed.offload_param=cpu",
    "zero_optimization.cpu_offload": "set deepspeed.offload_optimizer=cpu",
    "zero_optimization.cpu_offload_params": "set deepspeed.offload_param=cpu",
    "zero_optimization.zero_quantized_weights": "leave it out: checkpoints hold the exact weights",
    **dict.fromkeys(
        ("zero_optimization.zero_quantized_gradients", "prescale_gradients", "gradient_predivide_factor"),
        "leave it out: gradients are reduced in fp32",
    ),
    **dict.fromkeys(
        ("zero_optimization.load_from_fp32_weights", "zero_optimization.elastic_checkpoint"),
        "checkpoints are ours: see the checkpoint section",
    ),
    **dict.fromkeys(("pipeline", "expert_parallel"), "leave out the section deepspeed"),
    "tensor_parallel": "set parallel.tensor_model_parallel_size",
    "sequence_parallel_size": "set parallel.sequence_parallel",
    "data_parallel_size": "set parallel.data_parallel_size",
    "activation_checkpointing": "set parallel.recompute_granularity",
    "checkpoint": "set the checkpoint section",
    "load_universal_checkpoint": "set checkpoint.load",
    "tensorboard": "set logging.tensorboard",
    **dict.fromkeys(("wandb", "comet"), "set logging.wandb_project"),
    "csv_monitor": "metrics.jsonl is always written; leave it out",
    "flops_profiler": "set logging.profile",
    "aio": "set deepspeed.offload_optimizer=cpu",
    **dict.fromkeys(("data_efficiency", "curriculum_learning"), "set the data section"),
    "elasticity": "leave it out: checkpoints load in any layout",
    **dict.fromkeys(
        ("zero_force_ds_cpu_optimizer", "optimizer.params.torch_adam"),
        "leave it out: the optimizer is torch's AdamW, which needs no compiler",
    ),
    **dict.fromkeys(
        (
            *("zero_optimization.zero_hpz_partition_size", "zero_optimization.mics_shard_size"),
            *("zero_optimization.zenflow", "compile", "hybrid_engine", "compression_training", "autotuning"),
            "sparse_gradients",
        ),
        "leave it out",
    ),
}

# DeepSpeed's own default is 2 GB of fp32 per bucket; this is megatron-core's.
_DEFAULTS: dict[str, Any] = {"steps_per_print": 10**9, "zero_optimization.reduce_bucket_size": 40_000_000}


def zero_of(config: RunConfig) -> DeepSpeedConfig:
    """Return the section `deepspeed` of a configuration that has it."""
    assert config.deepspeed is not None, "only for runs on DeepSpeed"
    return config.deepspeed


def written(config: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """Return the values that our configuration decides, by DeepSpeed's dotted keys.

    Args:
        world_size: processes; None: as many as the layout asks for.
    """
    training, optimizer, zero = config.training, config.optimizer, zero_of(config)
    deepspeed_optimizer = optimizer_spec(optimizer).deepspeed
    settings: dict[str, Any] = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": num_microbatches(config, world_size),
        "gradient_clipping": optimizer.clip_grad,
        "zero_optimization.stage": zero.zero_stage,
        "zero_optimization.overlap_comm": False,
        "zero_optimization.contiguous_gradients": True,
        "zero_optimization.offload_optimizer.device": zero.offload_optimizer,
        "zero_optimization.offload_param.device": zero.offload_param,
        "bf16.enabled": training.precision == "bf16",
        **(deepspeed_optimizer(optimizer) if deepspeed_optimizer is not None else {}),
    }
    if training.precision == "bf16":
        settings["bf16.check_grad_overflow"] = True  # otherwise it updates with NaN gradients
        settings["data_types.grad_accum_dtype"] = settings["communication_data_type"] = "fp32"
    return settings


def raw(config: RunConfig) -> dict[str, Any]:
    """Return `deepspeed.config` by dotted keys."""
    return dict(leaves(zero_of(config).config))


def deepspeed_config(config: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """Return the configuration dictionary for DeepSpeed. `config` must be validated."""
    nested: dict[str, Any] = {}
    for key, value in {**_DEFAULTS, **raw(config), **written(config, world_size)}.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = int(value) if ADDABLE.get(key) in ("count", "positive") else value
    return nested


# Checks.


def find_problems(config: RunConfig, world_size: int | None = None) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    if config.deepspeed is None:
        return
    yield from _check_features(config)
    if config.deepspeed.offload_param != "none" and config.deepspeed.zero_stage != 3:
        yield (
            f"deepspeed.offload_param {config.deepspeed.offload_param} needs deepspeed.zero_stage=3: below that every "
            "rank holds all parameters; set it, or deepspeed.offload_param=none"
        )
    if optimizer_spec(config.optimizer).deepspeed is not None:
        yield from _check_raw(config, world_size)


def _check_features(config: RunConfig) -> Iterator[str]:
    """Yield requested features that this engine lacks."""
    parallel, training, name = config.parallel, config.training, config.optimizer.name
    lacks: dict[str, tuple[bool, str]] = {
        "parallel.pipeline_model_parallel_size": (parallel.pipeline_model_parallel_size > 1, "1"),
        "parallel.context_parallel_size": (parallel.context_parallel_size > 1, "1"),
        "parallel.expert_model_parallel_size": (parallel.expert_model_parallel_size > 1, "1"),
        "parallel.overlap_grad_reduce": (parallel.overlap_grad_reduce, "false"),
        "model.moe": (config.model.moe is not None, "null"),
        f"optimizer.name {name}": (optimizer_spec(config.optimizer).deepspeed is None, "adam"),
        "training.fp8": (training.fp8 is not None, "null"),
        "training.batch_schedule": (bool(training.batch_schedule), "[]"),
        "data.length_schedule": (bool(config.data.length_schedule), "[]"),
        "training.ema_decay": (training.ema_decay is not None, "null"),
        "training.trainable": (bool(training.trainable), "[]"),
    }
    for setting, (wanted, off) in lacks.items():
        if wanted:
            key = setting.partition(" ")[0]
            yield f"{setting} is not verified with deepspeed: set {key}={off}, or leave out the section deepspeed"


def _check_raw(config: RunConfig, world_size: int | None) -> Iterator[str]:
    decided = written(config, world_size)
    for key, value in raw(config).items():
        if key in decided and _equal(value, decided[key]):
            continue
        if key in DECIDED_BY:
            yield (
                f"deepspeed.config.{key} {_text(value)} contradicts {DECIDED_BY[key]}, which makes it "
                f"{_text(decided[key])}: set that and leave this out"
            )
            continue
        instead = next((text for name, text in REFUSED.items() if f"{key}.".startswith(f"{name}.")), None)
        if instead is not None:
            out = "" if "leave" in instead else "; leave this out"
            yield f"deepspeed.config.{key} cannot be set here: {instead}{out}"
        elif key in decided:
            yield f"deepspeed.config.{key} must be {_text(decided[key])} here: leave it out"
        elif key not in ADDABLE:
            yield _unknown(key)
        else:
            yield from _check_kind(key, value)


def _check_kind(key: str, value: Any) -> Iterator[str]:
    kind, is_switch = ADDABLE[key], isinstance(value, bool)
    least, step = {"positive": (1, 1), "even": (2, 2)}.get(kind, (0, 1))
    is_count = not is_switch and isinstance(value, int | float) and value >= least and value % step == 0
    if not (is_switch if kind == "bool" else is_count):
        number = f"{'an even' if step == 2 else 'a'} whole number of at least {least}"
        expected = "true or false" if kind == "bool" else number
        yield f"deepspeed.config.{key}: expected {expected}, got {_text(value)}"


def _unknown(key: str) -> str:
    known = [*ADDABLE, *DECIDED_BY]
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"deepspeed.config.{key} is a section: set its keys, as in deepspeed.config.{inside[0]}"
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.7)
    hint = f"did you mean {close[0]}?" if close else "docs/deepspeed.md lists the keys that may be added"
    return f"deepspeed.config.{key} is unknown, and DeepSpeed would silently ignore it; {hint}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    return bool(one == other)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else text_of(value)
