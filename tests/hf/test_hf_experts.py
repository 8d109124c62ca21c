"""Mixtures of experts in the exported model: routing, decoding of loops in parallel, and Qwen3-MoE as the reference."""

import pytest
import torch
from transformers import GenerationMixin

from plt_megatron.hf.modeling_plt import PLTForCausalLM
from tests.hf.tiny import TOLERANCE, decode, expected, full, make_config, make_model, make_tokens

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VARIANTS = {
    "normalized": {},
    "not normalized": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    "biased, dense first": {
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
    },
    "shared, normed": {"shared_expert_intermediate_size": 40, "ffn_output_norm": True, "qk_norm": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_and_decode_follow_the_equations(name):
    model = make_model(**{"loop_count": 3, **EXPERTS, **VARIANTS[name]})
    tokens = make_tokens(2, 20)
    want = expected(model, tokens)
    assert (full(model, tokens) - want).abs().max() < TOLERANCE
    for cache, mode in ((None, None), (None, "serial"), (model.new_cache(24), None)):
        assert (decode(model, tokens, 6, cache, loop_mode=mode) - want).abs().max() < TOLERANCE


def test_loops_choose_for_themselves():
    model = make_model(loop_count=2, **EXPERTS)
    chosen = []
    block = model.model.layers[0].mlp
    block.register_forward_pre_hook(lambda module, args: chosen.append(module.route(args[0].flatten(0, 1))[1]))
    full(model, make_tokens(1, 12))
    first, second = chosen
    assert first.shape == second.shape == (12, 2) and not torch.equal(first, second)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ["normalized", "biased, dense first"])
def test_offloaded_weights_are_loaded_where_they_are_used(name, buffers):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(**{**EXPERTS, **VARIANTS[name]})
    tokens = make_tokens(2, 10)
    want = full(model, tokens)
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=buffers)
    assert model.model.layers[1].mlp.gate.weight.device.type == "meta"
    assert torch.equal(full(model, tokens), want)


def test_linear_layers_can_be_replaced():
    """As quantization and adapters do: a replacement need not have a float weight, or a weight."""

    class Replacement(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.forward = linear.forward

    model = make_model(**EXPERTS, **VARIANTS["biased, dense first"])
    tokens = make_tokens(2, 10)
    want = full(model, tokens)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Replacement(module))
    assert torch.equal(full(model, tokens), want)


def test_routers_start_like_linear_layers():
    torch.manual_seed(0)
    config = make_config(**{**EXPERTS, "num_experts": 64}, **VARIANTS["biased, dense first"], initializer_range=0.1)
    router = PLTForCausalLM(config).model.layers[1].mlp.gate
    assert 0.09 < router.weight.std() < 0.11 and router.weight.requires_grad
    assert not router.e_score_correction_bias.any()


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    """DistributedDataParallel waits for one from each."""
    model = make_model(**{**EXPERTS, "num_experts": 64}).train()
    model(make_tokens(1, 4), labels=make_tokens(1, 4)).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if ".experts." in name]
    assert all(gradient is not None for gradient in gradients) and not all(map(torch.any, gradients))


def test_where_weights_are_partitioned_every_rank_runs_every_expert():
    """ZeRO-3 gathers them as they are used, from all ranks at once: without gradients too, in one order."""
    model, used = make_model(**{**EXPERTS, "num_experts": 64}).eval(), set()
    for name, module in model.named_modules():
        if name.endswith("gate_proj") and ".experts." in name:
            module.register_forward_hook(lambda *_, name=name: used.add(name))
            module.weight.ds_id = 0
    with torch.no_grad():
        model(make_tokens(1, 4))
    assert len(used) == 64 * model.config.num_hidden_layers


def test_generate_compiles_no_experts(monkeypatch):
    """Each choice of them would be another graph."""
    monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", lambda *_: True)
    compiled = [make_model(**settings)._valid_auto_compile_criteria({}, None) for settings in ({}, EXPERTS)]
    assert compiled == [True, False]


def test_every_expert_learns_and_none_is_a_constant():
    model = make_model(loop_count=2, **EXPERTS).train()
    model(make_tokens(4, 40), labels=make_tokens(4, 40, seed=2)).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 7}, "num_experts_per_tok 7 exceeds num_experts 6"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size must be a positive integer"),
        ({"mlp_bias": True}, "mlp_bias is not supported with experts"),
        ({"norm_between_loops": True, "hidden_norm": True}, "hidden_norm are mutually exclusive"),
        ({"scoring_func": "relu"}, "scoring_func must be one of softmax, sigmoid, not 'relu'"),
        ({"use_routing_bias": True}, 'use_routing_bias needs scoring_func "sigmoid"'),
        (
            {"first_k_dense_replace": 2},
            "first_k_dense_replace must be from 0 to one less than num_hidden_layers 2, not 2",
        ),
    ],
)
def test_configurations_that_are_refused(changes, message):
    with pytest.raises(Exception, match=message):
        make_config(**{**EXPERTS, **changes})


def test_biased_routing_is_deepseek_v3s():
    """transformers' own router, of one group: the bias chooses, the scores weigh."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    model = make_model(**EXPERTS, **VARIANTS["biased, dense first"])
    assert not hasattr(model.model.layers[0].mlp, "experts")
    block = model.model.layers[2].mlp
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=64,
            n_routed_experts=6,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            norm_topk_prob=True,
        )
    )
    router.load_state_dict(block.gate.state_dict())
    assert router.e_score_correction_bias.abs().min() > 0
    rows = torch.randn(50, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        weights, chosen = block.route(rows)
        _, their_weights, theirs = router(rows)
    one, other = (
        torch.zeros(50, 6).scatter(1, numbers, values)
        for numbers, values in ((chosen, weights), (theirs, their_weights))
    )
    assert torch.equal(one > 0, other > 0) and (one - other).abs().max() < 1e-6
    unbiased = block.gate(rows)[0].sigmoid().topk(2, dim=-1).indices
    assert not torch.equal(unbiased.sort(-1).values, chosen.sort(-1).values)


def test_one_loop_is_qwen3_moe():
    """transformers' own implementation, with the same tensors by the same names."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    model = make_model(loop_count=1, qk_norm=True, **EXPERTS)
    ours = model.config
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names = (*sizes, "num_key_value_heads", "rms_norm_eps", *EXPERTS, "norm_topk_prob")
    config = Qwen3MoeConfig(**{name: getattr(ours, name) for name in names}, rope_parameters=ours.rope_parameters)
    theirs = Qwen3MoeForCausalLM._from_config(config).eval()
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        copy_into(state, name, tensor)
    theirs.load_state_dict(state)
    tokens = make_tokens(2, 30)
    assert (full(model, tokens) - full(theirs, tokens)).abs().max() < 1e-5


def copy_into(state, name, tensor):
    """A tensor of ours to theirs, whose experts are stacked in memory."""
    if ".experts." not in name:
        state[name].copy_(tensor)
        return
    prefix, _, rest = name.partition(".experts.")
    expert, kind, _ = rest.split(".")
    if kind == "down_proj":
        state[f"{prefix}.experts.down_proj"][int(expert)].copy_(tensor)
        return
    half = state[f"{prefix}.experts.gate_up_proj"][int(expert)].chunk(2)[kind == "up_proj"]
    half.copy_(tensor)
