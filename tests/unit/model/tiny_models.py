"""The tiny models that the tests of plt_megatron.model share, a batch for them, and how tensors are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from plt_megatron.config.schema import ModelConfig, ParallelConfig
from tests.reference.megatron_weights import randomize_biases, randomize_gates_and_norms, to_plain
from tests.reference.plain_plt import PlainPLT
from tests.settings import LOOPCODER, make

VOCAB_SIZE, PADDED_VOCAB_SIZE = 50, 64
SHAPE = (2, 23)  # rows, tokens; windows below do not divide 23
BASE: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "window_size": 5,
    "init_method_std": 0.2,
    "backend": "torch",
}
VANILLA_LOOP = {"cross_loop_parallel": False, "share_kv": False, "gated_window": False}
CLP = {**VANILLA_LOOP, "cross_loop_parallel": True}
KV_SHARING = {**CLP, "share_kv": True}
LAST_LOOP = {**CLP, "full_attention": "last_loop"}
LOOPCODER_V2 = {**LOOPCODER, "window_size": 9, "rotary_base": 5e5}


# Of the four pairs of channels two are on the ramp, one at each end.
YARN: dict[str, Any] = {
    "rope_scaling.factor": 4.0,
    "rope_scaling.yarn.original_max_position_embeddings": 64,
    "rope_scaling.yarn.beta_fast": 8.0,
    "rope_scaling.yarn.beta_slow": 0.5,
    "rotary_base": 100.0,
    "kv_channels": 8,
}


def build(
    settings: dict[str, Any],
    *,
    recompute: str = "none",
    seed: int = 7,
    padded_vocab_size: int = PADDED_VOCAB_SIZE,
    random: bool = True,
) -> Any:
    """A LoopedGPT of BASE's settings and these, its gates and norms random unless told otherwise."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from plt_megatron.model.build import initialize
    from plt_megatron.model.looped_gpt import LoopedGPT
    from plt_megatron.model.transformer_config import transformer_config

    model = make(ModelConfig, {**BASE, **settings})
    parallel = ParallelConfig(recompute_granularity=recompute)  # type: ignore[arg-type]
    stage = LoopedGPT(
        transformer_config(model, parallel),
        VOCAB_SIZE,
        SHAPE[1],
        padded_vocab_size=padded_vocab_size,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    initialize(stage, seed)
    if random:
        randomize_gates_and_norms(stage)
        randomize_biases(stage)
    return stage.to(device=torch.cuda.current_device())


def draw(seed: int = 0) -> dict[str, Tensor]:
    """A batch of random tokens, of which a fifth does not count, and documents of a few tokens each."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(SHAPE, generator=generator) < 0.25
    starts[0, 7], starts[0, 8] = True, True  # a document of one token
    return {
        "tokens": torch.randint(0, VOCAB_SIZE, SHAPE, generator=generator),
        "labels": torch.randint(0, VOCAB_SIZE, SHAPE, generator=generator),
        "loss_mask": (torch.rand(SHAPE, generator=generator) < 0.8).double(),
        "starts": starts,
    }


def plain_of(stage: Any) -> PlainPLT:
    """The stage's model in plain PyTorch, with weights of its own."""
    from plt_megatron.model.build import global_names

    weights = to_plain(stage.plt, dict(global_names(stage)), VOCAB_SIZE)
    return PlainPLT(stage.plt, {name: tensor.clone().requires_grad_() for name, tensor in weights.items()})


def gradients(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Zero where there is none."""
    return {name: torch.zeros_like(each) if each.grad is None else each.grad for name, each in weights.items()}


def losses_and_gradients(stage: Any, data: dict[str, Tensor], loops: int, factor: float = 1.0) -> dict[str, Tensor]:
    """Of the sum of the losses that count, times a factor; under the plain model's names."""
    from plt_megatron.model.build import global_names
    from plt_megatron.model.looped_gpt import MicroBatch

    stage.zero_grad()
    losses = stage(MicroBatch(data["tokens"], labels=data["labels"], loss_mask=data["loss_mask"]), loops)
    (factor * (losses * data["loss_mask"]).sum()).backward()
    found = to_plain(stage.plt, gradients(dict(global_names(stage))), VOCAB_SIZE)
    return {"losses": losses.detach().double(), **found}


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each tensor, relative to the expected one's largest element."""
    assert actual.keys() == expected.keys()
    result = {}
    for name, tensor in expected.items():
        scale = tensor.abs().max().item()
        difference = (actual[name] - tensor).abs().max().item()
        result[name] = difference / scale if scale else difference
    return result
