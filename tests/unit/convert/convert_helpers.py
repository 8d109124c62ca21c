"""What the conversion tests share: a tiny model's weights, checkpoints of them, and the training model's logits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import DataConfig, ModelConfig, ParallelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.checkpoint_writer import LazyTensor, write_checkpoint
from plt_megatron.hf.conversion import mappings_for
from plt_megatron.hf.exporting import ExportOptions, ExportResult, export
from plt_megatron.hf.importing import ImportOptions, ImportResult, import_model
from plt_megatron.hf.verification import single_process
from plt_megatron.train.checkpoint.reading import read_weights
from tests import settings
from tests.reference.gates import GATES
from tests.reference.loop_inputs import LOOP_INPUTS
from tests.settings import make

VOCAB = 117
# No two sizes agree by accident, and the window is shorter than the texts.
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 40,
    "ffn_hidden_size": 56,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 12,
    "window_size": 5,
    "backend": "torch",
}
LOOPCODER = {**settings.LOOPCODER, "rotary_base": 5e5}
LAST_LOOP = {"loop_count": 3, "share_kv": False, "gated_window": False, "full_attention": "last_loop"}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"loop_count": 1},
    "one loop, which shares nothing": {"loop_count": 1, "share_kv": False, "share_values": False},
    "naive loop": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False},
    "plt3": {"loop_count": 3},
    "full attention in the last loop": LAST_LOOP,
    "full attention in the last loop, serial": {**LAST_LOOP, "cross_loop_parallel": False},
    "full attention in the last loop, span, keys shifted": {
        **LAST_LOOP,
        "num_layers": 3,
        "loop_span": [1, 2],
        "key_shift": "heads",
    },
    **GATES,
    **{name: LOOP_INPUTS[name] for name in ("scale per model", "scale per channel", "naive loop with E", "scaled")},
    "scale without a gate": {"gated_window": False, "learned_hidden_scale": "channel"},
    "tanh gate": {"gate_activation": "tanh"},
    "paper norms": {"qk_layernorm": True, "norm_placement": "pre_ffn_output"},
    "loopcoder": LOOPCODER,
    "biases, untied": {"qkv_bias": True, "share_embeddings_and_output_weights": False},
    "olmo2": {"norm_placement": "post", "qk_layernorm": True},
    "experts": {
        "moe.num_experts": 5,
        "moe.ffn_hidden_size": 24,
        "moe.router_topk": 3,
        "moe.router_score_function": "pre_softmax",
    },
    "experts, shared": {
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 28,
        "moe.shared_expert_intermediate_size": 36,
        "norm_placement": "pre_ffn_output",
        "qk_layernorm": True,
    },
    "experts, biased, dense first": {
        "num_layers": 3,
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 24,
        "moe.first_k_dense_replace": 2,
        "moe.shared_expert_intermediate_size": 20,
        "moe.router_score_function": "sigmoid",
        "moe.router_bias_update_rate": 1e-3,
    },
    "experts, sigmoid, one": {
        "moe.num_experts": 4,
        "moe.ffn_hidden_size": 24,
        "moe.router_topk": 1,
        "moe.router_score_function": "sigmoid",
        "loop_count": 1,
    },
    "span": {"num_layers": 4, "loop_span": [1, 3], "loop_count": 3, **LOOP_INPUTS["scale per model"]},
    "by layer": {"cross_loop_parallel": False, "loop_order": "layer", "loop_count": 3},
    "llama3 rope": {"rope_scaling.factor": 8.0, "rotary_base": 5e5},
    "yarn rope": {
        "rope_scaling.factor": 4.0,
        "rope_scaling.yarn.original_max_position_embeddings": 16,
        "rope_scaling.yarn.beta_fast": 2.0,
        "rope_scaling.yarn.beta_slow": 0.25,
        "rotary_base": 100.0,
    },
}


def make_model(**changes: Any) -> ModelConfig:
    return make(ModelConfig, {**SIZES, **changes})


def random_weights(
    model: ModelConfig, vocab_size: int = VOCAB, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Everything random, gates and norms included, so that no mistake cancels out."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for rule in mappings_for(model, vocab_size):
        values = torch.randn(rule.shape, generator=generator)
        norm = len(rule.shape) == 1 and not rule.name.endswith("bias")
        values = 1 + 0.2 * values if norm else 0.15 * values
        weights[rule.name] = values if rule.parameter.is_buffer else values.to(dtype)
    return weights


def save_run(
    folder: Path,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    tokenizer: Path | None = None,
    precision: str = "fp32",
    eod_mask_loss: bool = False,
    sequence_length: int = 64,
    **progress: Any,
) -> Path:
    """A run's folder with one checkpoint."""
    config = RunConfig(
        model=model,
        data=DataConfig(
            tokenizer=str(tokenizer) if tokenizer else None,
            sequence_length=sequence_length,
            eod_mask_loss=eod_mask_loss,
        ),
        training=TrainingConfig(precision=precision, train_iters=1),  # type: ignore[arg-type]
    )
    vocab_size = len(weights["embedding.word_embeddings.weight"])
    rows = derived.padded_vocab_size(model, vocab_size)
    tensors = []
    for name, tensor in weights.items():
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            tensor = F.pad(tensor, (0, 0, 0, rows - vocab_size), value=7.0)  # padding must not show anywhere
        tensors.append(LazyTensor(name, tuple(tensor.shape), lambda tensor=tensor: tensor))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    write_checkpoint(folder / "checkpoints", tensors, config, vocab_size, dtype, progress)
    return folder


def megatron_logits(
    model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor, vocab_size: int = VOCAB, **options: Any
) -> Tensor:
    """Logits [b, s, vocab_size] of the training model with these weights, in fp32."""
    with single_process(), torch.no_grad():
        from plt_megatron.model.looped_gpt import MicroBatch

        built = _build(model, weights, tokens.shape[1], vocab_size)
        return built.eval()(MicroBatch(tokens), **options)[..., :vocab_size]


def megatron_gradients(model: ModelConfig, weights: Mapping[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The gradient of each parameter, of the summed loss of predicting each next token."""
    with single_process():
        from plt_megatron.model.build import global_names
        from plt_megatron.model.looped_gpt import MicroBatch

        built = _build(model, weights, tokens.shape[1] - 1, VOCAB)
        built(MicroBatch(tokens[:, :-1], labels=tokens[:, 1:])).sum().backward()
        return {name: torch.clone(parameter.grad) for name, parameter in global_names(built)}


def _build(model: ModelConfig, weights: Mapping[str, Tensor], length: int, vocab_size: int) -> Any:
    """The training model with these weights."""
    from plt_megatron.model.build import global_tensors
    from plt_megatron.model.looped_gpt import LoopedGPT
    from plt_megatron.model.transformer_config import transformer_config

    rows = derived.padded_vocab_size(model, vocab_size)
    built = LoopedGPT(transformer_config(model, ParallelConfig()), vocab_size, length, padded_vocab_size=rows)
    parameters = dict(global_tensors(built))
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            value = weights[name].float()
            table = name in ("embedding.word_embeddings.weight", "output_layer.weight")
            parameter.copy_(F.pad(value, (0, 0, 0, rows - vocab_size)) if table else value)
    return built


def make_tokens(rows: int = 2, length: int = 33, vocab_size: int = VOCAB) -> Tensor:
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def hf_logits(folder: Path, tokens: Tensor, **options: Any) -> Tensor:
    """Logits of an exported folder, loaded as a user would."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)
    with torch.no_grad():
        return model.eval()(tokens, use_cache=False).logits


def quiet(options: tuple, **others: Any) -> ExportResult:
    """Export without output."""
    return export(ExportOptions(*options, **others), say=lambda line: None)


def save_random(folder: Path, precision: str = "fp32", **changes: Any) -> tuple[ModelConfig, dict[str, Tensor]]:
    """A run's folder with one checkpoint of random weights; its model, and the weights."""
    model = make_model(**changes)
    weights = random_weights(model, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    save_run(folder, model, weights, precision=precision)
    return model, weights


def refuse_import(source: Path, message: str, **options: Any) -> None:
    """Importing it is refused in one line, and nothing is written."""
    before = set(source.parent.iterdir())
    with pytest.raises(UserError, match=message) as refused:
        import_model(ImportOptions(source, source.parent / "refused", **options))
    assert "\n" not in str(refused.value) and set(source.parent.iterdir()) == before


def imported(folder: Path, output: Path, **options: Any) -> tuple[ImportResult, dict[str, Tensor]]:
    """(result, weights by our names)"""
    result = import_model(ImportOptions(folder, output, **options))
    return result, dict(read_weights(output))
