"""Sizes and modes of benchmarks/gpu.py: the backends, precisions and switches that a card has kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.gpu_steps import VOCAB_SIZE
from plt_megatron.config.presets import LOOP_PRESETS

# The loops whose gradients are compared, by what follows a mode's name. h counts from the start, so that the first loop
# has gradients.
FORMS: dict[str, dict[str, Any]] = {"": {}, ", recommended": {**LOOP_PRESETS["recommended"], "hidden_scale": 0.5}}


@dataclass(frozen=True)
class Sizes:
    """Sizes of what each part runs."""

    small: dict[str, int]  # correctness and training
    large: dict[str, int]  # speed
    small_length: int
    large_length: int
    steps: int
    repetitions: int
    matrix: int
    copy_bytes: int
    # For correctness and training. A dry run's interpreted Triton kernels take seconds a step; `speed` has them anyway.
    cross_entropy_loss_fusion: bool | None = None


_HEADS = {"kv_channels": 128}
FULL = Sizes(
    small={"num_layers": 4, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 4, **_HEADS},
    large={"num_layers": 12, "hidden_size": 2048, "ffn_hidden_size": 8192, "num_attention_heads": 16, **_HEADS},
    small_length=512,
    large_length=4096,
    steps=200,
    repetitions=10,
    matrix=8192,
    copy_bytes=1 << 30,
)
_TINY = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 64, "num_attention_heads": 2, "kv_channels": 32}
DRY = Sizes(
    small=_TINY,
    large=_TINY,
    small_length=64,
    large_length=64,
    steps=8,
    repetitions=2,
    matrix=256,
    copy_bytes=1 << 20,
    cross_entropy_loss_fusion=False,
)


def modes(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return the modes that this card has kernels for, by name: backend, and if set FP8 and fusions."""
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    from plt_megatron.config.rules import fp8 as fp8_rules
    from plt_megatron.config.schema import Fp8Config

    found: dict[str, dict[str, Any]] = {"torch bf16": {"backend": "torch"}}
    if not (HAVE_TE and torch.cuda.is_available()):
        return found
    fusions = {"fusions": {"cross_entropy_loss_fusion": sizes.cross_entropy_loss_fusion}}
    found["te bf16"] = {"backend": "te", **fusions}
    for name, attention in {"te fp8": False, "te fp8 attention": True}.items():
        mode = {"backend": "te", "fp8": Fp8Config(attention=attention), **fusions}
        config = run_config(sizes.small, sizes.small_length, mode)
        if not list(fp8_rules.find_problems(config, torch.cuda.get_device_capability())):
            found[name] = mode
    return found


def run_config(model: dict[str, int], length: int, mode: dict[str, Any], micro_batch_size: int = 4) -> Any:
    """Return the configuration of a run on one device with one microbatch per step; `loops` of a mode are settings of
    the model."""
    from plt_megatron.config.schema import (
        DataConfig,
        ModelConfig,
        OptimizerConfig,
        ParallelConfig,
        RunConfig,
        TrainingConfig,
    )

    return RunConfig(
        model=ModelConfig(
            **{**model, **mode.get("loops", {})}, loop_count=2, vocab_size=VOCAB_SIZE, backend=mode["backend"]
        ),
        parallel=ParallelConfig(**mode.get("fusions", {})),
        data=DataConfig(sequence_length=length),
        training=TrainingConfig(
            micro_batch_size=micro_batch_size,
            global_batch_size=micro_batch_size,
            train_iters=10_000,
            fp8=mode.get("fp8"),
        ),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_warmup_iters=20),
    )


def speed_modes(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return all modes with everything fused that can be, and "te bf16" with nothing fused too."""
    from plt_megatron.config.rules import fusions as fusion_rules

    found = {name: {**mode, "fusions": {}} for name, mode in modes(sizes).items()}
    if "te bf16" in found:
        off = dict.fromkeys(fusion_rules.NAMES, False)
        found["te bf16, nothing fused"] = {**found["te bf16"], "fusions": off}
    return found
