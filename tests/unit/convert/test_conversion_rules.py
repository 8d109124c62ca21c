"""The tables of tensors, against index arithmetic written out here, and of switches, against both configurations."""

from __future__ import annotations

import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from convert_helpers import LOOPCODER, VARIANTS, VOCAB, make_model, random_weights

from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.hf.configuration_plt import PLTConfig
from plt_megatron.hf.conversion import check_tensors, mappings_for, to_hf, to_megatron
from plt_megatron.hf.switches import SWITCHES


def test_qkv_rows_lie_by_query_group():
    model = make_model(num_layers=1, qkv_bias=True)
    heads, groups, dim = 6, 2, 12
    weights = random_weights(model)
    theirs = dict(to_hf(weights.items(), mappings_for(model, VOCAB)))
    for suffix in ("weight", "bias"):
        ours = weights[f"decoder.layers.0.self_attention.linear_qkv.{suffix}"]
        per_group = heads // groups + 2
        for head in range(heads):
            group, place = divmod(head, heads // groups)
            start = (group * per_group + place) * dim
            found = theirs[f"model.layers.0.self_attn.q_proj.{suffix}"][head * dim : (head + 1) * dim]
            assert torch.equal(found, ours[start : start + dim])
        for group in range(groups):
            for name, place in (("k_proj", per_group - 2), ("v_proj", per_group - 1)):
                start = (group * per_group + place) * dim
                found = theirs[f"model.layers.0.self_attn.{name}.{suffix}"][group * dim : (group + 1) * dim]
                assert torch.equal(found, ours[start : start + dim])


def test_gate_rows_come_before_up_rows():
    model = make_model(num_layers=1)
    weights = random_weights(model)
    theirs = dict(to_hf(weights.items(), mappings_for(model, VOCAB)))
    ours = weights["decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(theirs["model.layers.0.mlp.gate_proj.weight"], ours[:56])
    assert torch.equal(theirs["model.layers.0.mlp.up_proj.weight"], ours[56:])


@pytest.mark.parametrize("style", ["plt", "loopcoder"])
@pytest.mark.parametrize("name", VARIANTS)
def test_there_and_back_is_the_same_bit_for_bit(name, style):
    model = make_model(**VARIANTS[name])
    weights = random_weights(model, dtype=torch.bfloat16)
    rules = mappings_for(model, VOCAB, style)
    theirs = dict(to_hf(reversed(weights.items()), rules))  # in any order
    check_tensors({name: tuple(tensor.shape) for name, tensor in theirs.items()}, rules, "here")
    back = dict(to_megatron(theirs.__getitem__, rules))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_the_gate_of_the_other_side_is_its_negative():
    local, other = (make_model(gate_side=side) for side in ("local", "global"))
    weights = random_weights(local)
    plt, loopcoder = (dict(to_hf(weights.items(), mappings_for(local, VOCAB, s))) for s in ("plt", "loopcoder"))
    for name in plt:
        sign = -1 if "plt_gate" in name else 1
        assert torch.equal(loopcoder[name], sign * plt[name])
    unchanged = dict(to_hf(weights.items(), mappings_for(other, VOCAB, "loopcoder")))
    assert all(torch.equal(unchanged[name], plt[name]) for name in plt)
    hidden = make_model(**{**LOOPCODER, "gate_side": "local"})
    weights = random_weights(hidden)
    loopcoder = dict(to_hf(weights.items(), mappings_for(hidden, VOCAB, "loopcoder")))
    gate = "self_attention.core_attention.plt_gate."
    norm = loopcoder["model.layers.1.self_attn.plt_gate.gate_norm.weight"]
    assert torch.equal(norm, weights[f"decoder.layers.1.{gate}gate_norm.weight"])  # the norm keeps its sign


def test_a_tensor_without_a_place_and_a_place_without_a_tensor():
    model = make_model()
    rules = mappings_for(model, VOCAB)
    weights = random_weights(model)
    name = "decoder.layers.1.mlp.linear_fc2.weight"

    def convert(changed):
        return list(to_hf(changed, rules))

    with pytest.raises(UserError, match=f"lack tensor {name}$"):
        convert((key, value) for key, value in weights.items() if key != name)
    with pytest.raises(UserError, match=r"mlp\.router\.weight has no place"):
        convert([*weights.items(), ("decoder.layers.0.mlp.router.weight", torch.zeros(3))])
    with pytest.raises(UserError, match=f"{name} appears twice"):
        convert([*weights.items(), (name, weights[name])])
    with pytest.raises(UserError, match=r"fc2\.weight has shape \(40, 55\), the configuration says \(40, 56\)"):
        convert({**weights, name: weights[name][:, 1:]}.items())
    extra = "decoder.layers.0.self_attention.linear_qkv._extra_state"
    assert len(convert([*weights.items(), (extra, torch.zeros(1))])) == sum(len(rule.hf) for rule in rules)


def test_checking_tells_what_is_wrong():
    rules = mappings_for(make_model(), VOCAB)
    right = dict(pair for rule in rules for pair in rule.hf)
    check_tensors(right, rules, "here")
    without = {name: shape for name, shape in right.items() if ".1.self_attn" not in name}
    with pytest.raises(UserError, match=r"^here: lacks tensors .* and 3 more$"):
        check_tensors(without, rules, "here")
    with pytest.raises(UserError, match=r"^here: has unknown tensor model\.layers\.2\.extra$"):
        check_tensors({**right, "model.layers.2.extra": (1,)}, rules, "here")
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \(41,\), config\.json says \(40,\)"):
        check_tensors({**right, "model.norm.weight": (41,)}, rules, "here")


def test_every_setting_with_a_key_of_its_name_is_a_switch_with_one_default():
    """A key that is missing from a file means what the setting's default does."""
    ours, theirs = ({field.name: field.default for field in dataclasses.fields(k)} for k in (ModelConfig, PLTConfig))
    sizes = {"hidden_size", "num_attention_heads", "vocab_size"}
    named = {each.setting for each in SWITCHES if each.setting in each.keys}
    assert named == (ours.keys() & theirs) - sizes - {"residual_scale"}
    assert all(each.write(ours[each.setting]) == tuple(theirs[key] for key in each.keys) for each in SWITCHES)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        (name, value)
        for name in ("norm_placement", "loop_norm")
        for value in get_args(get_type_hints(ModelConfig)[name])
    ],
)
def test_a_switch_of_two_keys_comes_back(setting, value):
    switch = next(each for each in SWITCHES if each.setting == setting)
    assert len(switch.keys) == 2 and switch.read(*switch.write(value)) == value
