"""Tensor parallelism: an engine of two processes over gloo, and key shift on each rank of up to four."""

import pytest
from helpers import YARN, assert_same, engine, prompts

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("loopcoder3", {}),
        ("OLMo-2", {"num_key_value_heads": 1}),
        ("shared expert", {}),
        ("shifted heads", {}),  # the first rank has none of them
        ("learned shift", {"num_key_value_heads": 4}),
        ("shifted channels", {"num_key_value_heads": 1, "rope_parameters": YARN}),
        ("keys alone, span, shifted", {"qk_norm": True}),
        ("last loop, 3 loops, shifted", {"qk_norm": True}),
    ],
)
def test_two_ranks(exports, variant, changes):
    """Two ranks give transformers' tokens with sharded gates, heads and norms, and with a K/V head that both have."""
    export = exports(variant, **changes)
    with engine(export, tensor_parallel_size=2) as llm:
        assert_same(export, llm, prompts(12))


@pytest.mark.parametrize("form", ["heads", "channels", "learned"])
@pytest.mark.parametrize(("heads", "ranks"), [(2, 1), (3, 1), (4, 2), (2, 2), (6, 3), (4, 4), (2, 4)])
def test_ranks_shift_their_own_heads(monkeypatch, form, heads, ranks):
    """For two requests in one step, each rank computes its part of the exported module's result for all heads."""
    import vllm_plt.heads
    from vllm_plt.configuration_plt import PLTConfig
    from vllm_plt.heads import Heads
    from vllm_plt.key_shift import KeyCarry, KeyShift

    from plt_megatron.hf.modeling_plt import PLTKeyShift

    torch.manual_seed(0)
    dim, lengths = 8, (4, 3)
    sizes = {"num_attention_heads": 12, "num_key_value_heads": heads, "head_dim": dim}
    config = PLTConfig(key_shift=form, hidden_size=96, **sizes)
    whole = PLTKeyShift(config)
    for param in whole.parameters():
        param.data.normal_()
    texts = [torch.randn(2, 1, 1 + length, heads, dim) for length in lengths]  # first tokens belong to an earlier step
    expected = [whole(key[:, 1:], value[:, 1:], whole.taken(key, value)[:, :-1]) for key, value in texts]
    expected = [torch.cat(parts, 1)[0] for parts in zip(*expected, strict=True)]
    monkeypatch.setattr(vllm_plt.heads, "get_tensor_model_parallel_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(vllm_plt.heads, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        share = Heads(config)
        served = KeyShift(config, share)
        for param, loaded in zip(served.parameters(), whole.parameters(), strict=True):
            param.weight_loader(param, loaded.data)
        first = share.kv_shard * share.kv

        def own(x, first=first, share=share):
            return x[..., first : first + share.kv, :].flatten(-2)

        earlier = KeyCarry(torch.zeros(2, 1, served.width), torch.arange(2))
        served(*own(torch.stack([text[:, 0, 0] for text in texts], 1)), earlier)
        carry = KeyCarry(earlier.handed_on(), torch.tensor([0, lengths[0]]))
        got = served(*own(torch.cat([text[:, 0, 1:] for text in texts], 1)), carry)
        for part, of_all in zip(got, expected, strict=True):
            torch.testing.assert_close(part, own(of_all))
