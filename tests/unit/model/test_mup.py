"""muP: initial weights and rates follow the width as plain muP, and as megatron-core where its rules are the same."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_mup_config_overrides
from megatron.core.transformer.transformer_config import TransformerConfig
from test_against_reference import EXPERTS
from tiny_models import LOOPCODER_V2, SHAPE, VOCAB_SIZE, build, plain_of
from torch import Tensor

from plt_megatron.config.schema import ModelConfig, OptimizerConfig, RateFactors, RunConfig, TrainingConfig
from plt_megatron.model.build import global_names
from plt_megatron.train.optimizers import described, group_overrides, groups
from tests.reference.plain_plt import PlainPLT

pytestmark = pytest.mark.usefixtures("one_process")

BASE_WIDTH = 8  # of models that are twice as wide
FORMS: dict[str, dict[str, Any]] = {
    "PLT": {},
    "hidden gate, untied": {**LOOPCODER_V2, "loop_norm": "none"},
    "recommended": {
        "loop_norm": "rms",
        "learned_hidden_scale": "channel",
        "hidden_scale": 0.0,
        "residual_scaling": "layers",
        "residual_scale": 4.0,
        "loop_count": 3,
    },
    "experts": {
        **EXPERTS,
        "moe.shared_expert_intermediate_size": 8,
        "moe.aux_loss_coeff": 0.0,
        "moe.z_loss_coeff": 0.0,
    },
}


def _config(model: ModelConfig, **optimizer: Any) -> RunConfig:
    settings = OptimizerConfig(lr=3e-3, min_lr=3e-4, weight_decay=0.5, adam_eps=1e-12, **optimizer)
    return RunConfig(model=model, optimizer=settings, training=TrainingConfig(train_iters=10))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_training_is_plain_mup(form):
    """By the paper's table 8: logits divided by the width multiplier, matrices of the layers at a rate divided by it,
    everything else at the base's. Ours has the logits' factor in the final norm's weight."""
    stage = build({**form, "mup_base_hidden_size": BASE_WIDTH})
    config = _config(stage.plt)
    with torch.no_grad():
        stage.final_layernorm.weight /= 2  # the test's models have random norms
    plain = plain_of(stage)
    plain.weights["final_norm"] = (plain.weights["final_norm"].detach() * 2).requires_grad_()
    ours, theirs = _our_adam(config, stage), _plain_mup_adam(config.optimizer, plain)
    tokens = torch.randint(0, VOCAB_SIZE, (SHAPE[0], SHAPE[1] + 1), generator=torch.Generator().manual_seed(3))
    losses = []
    for _ in range(4):
        ours.zero_grad(), theirs.zero_grad()
        loss, expected = _loss(stage, tokens), _plain_loss(plain, tokens)
        losses.append((loss, expected))
        loss.backward(), expected.backward()
        ours.step(), theirs.step()
    first, last = losses[0][1], losses[-1][1]
    assert abs(last - first) > 0.01 * first, "nothing was learned, so nothing is shown"
    for loss, expected in losses:
        assert loss.item() == pytest.approx(expected.item(), rel=2e-5)


def _our_adam(config: RunConfig, stage: Any) -> torch.optim.Optimizer:
    settings = config.optimizer
    kinds = [
        {
            "params": [tensor for name, tensor in stage.named_parameters() if group.has(name)],
            "lr": group.rate * settings.lr,
            "weight_decay": group.decay * settings.weight_decay,
            "eps": group.eps * settings.adam_eps,
        }
        for group in groups(config)
    ]
    assert sum(len(kind["params"]) for kind in kinds) == len(list(stage.parameters())), "each is in one group"
    return torch.optim.AdamW(kinds, betas=(settings.adam_beta1, settings.adam_beta2))


def _plain_mup_adam(settings: OptimizerConfig, plain: PlainPLT) -> torch.optim.Optimizer:
    def kind(name: str, tensor: Tensor) -> dict[str, Any]:
        is_matrix = tensor.dim() == 2
        # A query gate sums over a head's channels, which are as many at every width.
        is_wide = is_matrix and name.startswith("layers.") and tensor.shape[1] != stage_head_dim
        factor = 0.5 if is_wide else 1.0
        return {
            "params": [tensor],
            "lr": settings.lr * factor,
            "weight_decay": settings.weight_decay / factor if is_matrix else 0.0,
            "eps": settings.adam_eps * factor,
        }

    stage_head_dim = plain.config.hidden_size // plain.config.num_attention_heads
    kinds = [kind(name, tensor) for name, tensor in plain.weights.items()]
    return torch.optim.AdamW(kinds, betas=(settings.adam_beta1, settings.adam_beta2))


def _loss(stage: Any, tokens: Tensor) -> Tensor:
    from plt_megatron.model.looped_gpt import MicroBatch

    losses: Tensor = stage(MicroBatch(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous()))
    return losses.mean()


def _plain_loss(plain: PlainPLT, tokens: Tensor) -> Tensor:
    logits = plain.logits(tokens[:, :-1]) / 2
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def test_rates_of_a_tied_model_are_megatron_cores():
    stage = build({"mup_base_hidden_size": BASE_WIDTH}, random=False)
    config = _config(stage.plt)
    stage.embedding.word_embeddings.weight.is_embedding_parameter = True  # as its LanguageModule marks it
    theirs = get_mup_config_overrides(MegatronOptimizerConfig(lr=3e-3, min_lr=3e-4, adam_eps=1e-12), 2.0)
    own = group_overrides(config)
    for name, tensor in stage.named_parameters():
        if "final_layernorm" in name or "plt_gate" in name:
            continue  # it has no gates, and multiplies the logits instead
        assert _matching(own, tensor, name) == _matching(theirs, tensor, name), name


def _matching(overrides: dict[Any, Any], tensor: Tensor, name: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, override in overrides.items():
        if key.matches(tensor, name):
            found |= {setting: value for setting, value in override.items() if setting != "wd_mult"}
    return found


def test_initial_weights_are_megatron_cores():
    """By their standard deviations, and as a whole smaller by the width multiplier's root."""
    form = {"hidden_size": 64, "ffn_hidden_size": 128, "init_method_std": 0.02}
    stage = build({**form, "mup_base_hidden_size": 16}, random=False)
    base = dict(global_names(build(form, random=False)))
    theirs = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, init_method_std=0.02, use_mup=True, mup_base_hidden_size=16
    )
    for name, tensor in global_names(stage):
        if name == "final_layernorm.weight":
            assert torch.all(tensor == 0.25) and theirs.mup_output_mult == 0.25
        elif tensor.dim() == 1 or "plt_gate" in name:
            assert torch.equal(tensor, base[name])
        elif "embedding" in name:
            assert torch.equal(tensor, base[name])
            assert _std_of(theirs.embedding_init_method) == pytest.approx(0.02, rel=0.01)
        else:
            torch.testing.assert_close(tensor, base[name] / 2)
            writes = "linear_proj" in name or "linear_fc2" in name
            init = theirs.output_layer_init_method if writes else theirs.init_method
            assert tensor.std().item() == pytest.approx(_std_of(init), rel=0.1)


def _std_of(init: Any) -> float:
    return init(torch.empty(1000, 1000)).std().item()


def test_a_model_of_the_base_width_is_none():
    plain = build({}, random=False)
    stage = build({"mup_base_hidden_size": plain.plt.hidden_size}, random=False)
    for (name, ours), (_, theirs) in zip(global_names(stage), global_names(plain), strict=True):
        assert torch.equal(ours, theirs), name
    config = _config(stage.plt)
    assert all(group.override(config.optimizer) in ({}, {"wd_mult": 0.0}) for group in groups(config))


@pytest.mark.parametrize(
    ("mode", "rate"), [("spectral", 0.5), ("shape_scaling", 1.0), ("unit_rms_norm", 1.0)], ids=lambda value: str(value)
)
def test_muons_updates_follow_the_width_by_themselves_unless_they_are_as_large_as_adams(mode, rate):
    model = dataclasses.replace(build({}).plt, mup_base_hidden_size=BASE_WIDTH)
    config = _config(model, name="muon", muon_scale_mode=mode)
    assert {group.rate for group in groups(config) if group.name == "hidden"} == {rate}


def test_rates_are_printed_with_their_width():
    model = dataclasses.replace(build({}).plt, mup_base_hidden_size=BASE_WIDTH)
    said = described(_config(model, lr_mult=RateFactors(hidden=3.0)))
    assert said == (
        "AdamW; learning rate, weight decay: embedding 0.003, 0.5; hidden 0.0045, 1; gates (vectors) 0.003, 0; "
        "gates 0.003, 0.5; norms 0.003, 0; final norm 0.0015, 0"
    )
