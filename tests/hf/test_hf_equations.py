"""The forward pass over whole sequences against the equations, packing included; test_hf_decode.py has the variants."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from plt_megatron.hf.modeling_plt import CACHE_NAME
from tests.hf.reference import Reference
from tests.hf.tiny import ALL, SIZES, TOLERANCE, VARIANTS, expected, full, left_pad, make_model, make_tokens


@pytest.mark.parametrize(("window", "length"), [(65, 150), (65, 20), (7, 150), (64, 64), (64, 65), (3, 2)])
def test_windows_shorter_and_longer_than_the_text(window, length):
    model = make_model(window_size=window, num_hidden_layers=1)
    tokens = make_tokens(1, length)
    assert (full(model, tokens) - expected(model, tokens)).abs().max() < TOLERANCE


def test_right_padding_changes_nothing_before_it():
    model = make_model(loop_count=3)
    tokens, mask = make_tokens(1, 20), torch.ones(1, 20, dtype=torch.long)
    mask[:, 13:] = 0
    logits = full(model, tokens, attention_mask=mask)
    assert (logits[:, :13] - expected(model, tokens[:, :13])).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("name", "attention"),
    [("vanilla", "sdpa"), ("plt", "eager"), ("naive", "eager"), ("iquest", "sdpa")]
    + [(name, attention) for name in ("shifted_channels", "last_loop_shifted") for attention in ("sdpa", "eager")],
)
def test_packed_documents_do_not_see_each_other(name, attention):
    model = make_model(attn_implementation=attention, **{**ALL[name], "window_size": 6})
    lengths = [[11, 1, 4, 15], [3, 20, 7, 1]]
    tokens = make_tokens(2, 31)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    logits = full(model, tokens, position_ids=positions)
    with torch.no_grad():
        # No cache comes back for packed documents: nothing could continue it.
        assert model(tokens, position_ids=positions).get(CACHE_NAME) is None
    for index, row in enumerate(lengths):
        begin = 0
        for n in row:
            alone = expected(model, tokens[index : index + 1, begin : begin + n])[0]
            assert (logits[index, begin : begin + n] - alone).abs().max() < TOLERANCE
            begin += n


def test_packed_documents_with_padding():
    model = make_model(loop_count=3)
    tokens, mask = left_pad([make_tokens(12), make_tokens(20, seed=2)])
    padded = torch.cat([torch.zeros(8, dtype=torch.long), torch.arange(12)])
    positions = torch.stack([padded, torch.cat([torch.arange(13), torch.arange(7)])])
    logits = full(model, tokens, attention_mask=mask, position_ids=positions)
    for row, part in ((0, slice(8, 20)), (1, slice(0, 13)), (1, slice(13, 20))):
        assert (logits[row, part] - expected(model, tokens[row, part][None])[0]).abs().max() < TOLERANCE


PUBLIC = {
    "llama": ({"attention_bias": True, "mlp_bias": True}, {}),
    "qwen2": ({}, {"qkv_bias": True}),
    "qwen3": ({}, {"qk_norm": True}),
    "olmo2": ({}, {"qk_norm": True, "norm_placement": "post"}),
}


@pytest.mark.parametrize("family", PUBLIC)
def test_one_loop_is_the_public_model_with_the_same_weights(family):
    theirs_only, ours_only = PUBLIC[family]
    sizes = {**SIZES, "rms_norm_eps": 1e-5}
    sizes.pop("window_size")
    # A Llama and an OLMo-2 take their head dimension from the hidden size.
    config = AutoConfig.for_model(family, **sizes, **theirs_only, tie_word_embeddings=False)
    torch.manual_seed(0)
    public = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for name, parameter in public.named_parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if "norm" in name else torch.randn_like(parameter) * 0.1
    model = make_model(**{**theirs_only, **ours_only, "loop_count": 1})
    model.load_state_dict(public.state_dict())
    rows = [make_tokens(n, seed=n) for n in (18, 7)]
    tokens, mask = left_pad(rows)
    with torch.no_grad():
        theirs = public(tokens, attention_mask=mask).logits
    ours = full(model, tokens, attention_mask=mask)
    for index, row in enumerate(rows):
        assert (ours[index, -len(row) :] - theirs[index, -len(row) :]).abs().max() < 1e-5


def test_gradients_follow_the_equations():
    model = make_model(loop_count=3, **VARIANTS["hidden_local"]).double()
    tokens = make_tokens(1, 9)
    out = model(tokens, labels=tokens, use_cache=False)
    names = [name for name, _ in model.named_parameters()]
    got = torch.autograd.grad(out.loss, list(model.parameters()))
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    reference = Reference(model.config, weights)
    logits = reference.logits(tokens[0])[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    want = torch.autograd.grad(loss, [weights[name] for name in names])
    for name, ours, theirs in zip(names, got, want, strict=True):
        # RMSNorm and the gate compute in fp32.
        assert (ours - theirs).abs().max() < 1e-5 * (1 + theirs.abs().max()), name
