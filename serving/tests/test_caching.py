"""Prefix caching, preemption and the block pool, with carries stored in pages as K and V are."""

import pytest
from helpers import assert_same, engine, free_blocks, generate, greedy, prompts, scheduler, served_model

SHARED = prompts(1, seed=7)[0] + prompts(10, seed=8)[9] + prompts(10, seed=9)[9]  # 221 tokens


def assert_same_with_hits(export, llm, token_lists: list[list[int]], tokens: int = 24) -> int:
    """Assert that the tokens equal transformers'; return how many prompt tokens came from the cache."""
    outputs = generate(llm, token_lists, tokens)
    expected = [export.decode(ids, tokens) for ids in token_lists]
    assert [list(out.outputs[0].token_ids) for out in outputs] == expected
    return sum(out.num_cached_tokens for out in outputs)


@pytest.mark.parametrize(
    "variant",
    [
        "plt3",
        "loopcoder",
        "wide slices",
        "CLP only",
        "learned shift",
        "keys alone, span, shifted",
        "YaRN",
        "last loop",
        "last loop, 3 loops, shifted",
        "last loop, no CLP",
        "last loop, span",
    ],
)
@pytest.mark.parametrize("kept", [{}, {"prefix_cache_retention_interval": None}], ids=["prompt ends", "every block"])
def test_hits_at_every_class_of_position(exports, variant, kept):
    """Prefix hits give transformers' tokens for prompts cut before, at and after block ends, and with other endings."""
    export = exports(variant)
    cuts = [33, 64, 65, 95, 96, 97, 127, 128, 129, 160, 191, 192, 193, 200]
    with engine(export, max_model_len=320, max_num_batched_tokens=320, **kept) as llm:
        assert_same(export, llm, [SHARED[:200]], tokens=6)
        found = [assert_same_with_hits(export, llm, [SHARED[:cut], SHARED[:cut] + [5, 6, 7]], tokens=6) for cut in cuts]
    assert sum(found) > 1000 if kept else any(found)


@pytest.mark.parametrize("variant", ["plt3", "last loop, no CLP"])
def test_a_conversation(exports, variant):
    """A multi-turn conversation, whose answers are part of the next prompt, gives transformers' tokens."""
    export = exports(variant)
    with engine(export, max_model_len=512, max_num_batched_tokens=128) as llm:
        ids = SHARED[:60]
        for turn in range(6):
            answer = greedy(llm, [ids], 30)[0]
            assert answer == export.decode(ids, 30)
            ids = ids + answer + [turn + 1, turn + 2]


@pytest.mark.parametrize(
    "variant",
    [
        "plt2",
        "plt3",
        "plt4",
        "shifted heads",
        "shift, one loop",
        "keys alone, span, shifted",
        "last loop",
        "last loop, 3 loops, shifted",
        "last loop, no CLP",
    ],
)
def test_prompts_of_one_step_share_a_prefix(exports, variant):
    """A request may hit blocks that another request computes in the same step."""
    export = exports(variant)
    ids = [SHARED[:128] + [index + 1, index + 2] for index in range(6)]
    with engine(export, max_num_batched_tokens=256) as llm:
        assert assert_same_with_hits(export, llm, ids) >= 128


def test_without_waiting_prompts_of_one_step_take_the_wrong_keys(exports, monkeypatch):
    """Prompts with shifted keys must wait too, since those are read before the step's own are stored."""
    from vllm_plt.carry_cache import CarryManager

    export = exports("shifted heads")
    ids = [SHARED[:128] + [index + 1, index + 2] for index in range(6)]
    monkeypatch.setattr(CarryManager, "needs_carry_of_this_step", lambda *args: False)
    with engine(export, max_num_batched_tokens=256) as llm:
        first, *hits = generate(llm, ids)
    assert list(first.outputs[0].token_ids) == export.decode(ids[0], 24)
    assert all(hit.num_cached_tokens for hit in hits)
    wrong = [list(hit.outputs[0].token_ids) != export.decode(own, 24) for hit, own in zip(hits, ids[1:], strict=True)]
    assert any(wrong)


@pytest.mark.parametrize("variant", ["plt2", "plt3", "shifted channels", "span", "last loop"])
def test_a_carry_of_the_same_step_is_waited_for(exports, variant, monkeypatch):
    """In decode steps, requests that hit a block wait one step while another request computes its last token."""
    served, expected, waits = serve_same_step_hits(exports(variant), monkeypatch)
    assert served == expected
    assert waits == [True], "one step had to be waited for, and no more"


def test_without_waiting_the_carry_is_wrong(exports, monkeypatch):
    from vllm_plt.carry_cache import CarryManager

    monkeypatch.setattr(CarryManager, "needs_carry_of_this_step", lambda *args: False)
    served, expected, waits = serve_same_step_hits(exports("plt3"), monkeypatch)
    assert served["decoding"] == expected["decoding"] and served != expected and not waits


def serve_same_step_hits(export, monkeypatch) -> tuple[dict, dict, list[bool]]:
    """Return the served tokens, transformers' tokens, and one True for each time a request had to wait."""
    from vllm_plt.carry_cache import CarryManager

    waits, asked = [], CarryManager.needs_carry_of_this_step
    monkeypatch.setattr(CarryManager, "needs_carry_of_this_step", lambda *args: asked(*args) and not waits.append(True))
    start = SHARED[:40]
    known = start + export.decode(start, 24)  # 64 tokens: two blocks
    wanted = {"decoding": start, **{f"hit {token}": [*known, token] for token in range(1, 7)}}
    kept = {"prefix_cache_retention_interval": None, "async_scheduling": False}
    with engine(export, max_num_seqs=8, **kept) as llm:
        add(llm, "decoding", start, tokens=48)
        for _ in range(24):  # the prompt and 23 decode steps; the next step computes the second block's last token
            llm.llm_engine.step()
        for name, ids in wanted.items():
            if name != "decoding":
                add(llm, name, ids)
        served = step_until_done(llm)
    return served, {name: export.decode(ids, len(served[name])) for name, ids in wanted.items()}, waits


def add(llm, name: str, ids: list[int], tokens: int = 24) -> None:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)


def step_until_done(llm) -> dict[str, list[int]]:
    out = {}
    while llm.llm_engine.has_unfinished_requests():
        for request in llm.llm_engine.step():
            if request.finished:
                out[request.request_id.rsplit("-", 1)[0]] = list(request.outputs[0].token_ids)
    return out


@pytest.mark.parametrize(
    ("variant", "blocks", "caching"),
    [
        ("plt3", 40, True),
        ("plt3", 60, False),
        ("learned shift", 80, True),
        ("span, shifted", 100, True),
        ("keys alone", 90, True),
        ("YaRN", 60, True),
        ("last loop", 40, True),
        ("last loop, 3 loops, shifted", 60, False),
        ("last loop, no CLP", 60, True),
    ],
)
def test_preempted_requests_go_on(exports, variant, blocks, caching):
    """Requests that are preempted for lack of blocks and computed again give transformers' tokens."""
    export = exports(variant)
    options = {"num_gpu_blocks_override": blocks, "max_num_batched_tokens": 64, "enable_prefix_caching": caching}
    with engine(export, **options) as llm:
        preempted = count_preemptions(llm)
        assert_same(export, llm, prompts(20, seed=2), tokens=60)
        assert preempted
        assert free_blocks(llm) == blocks - 1  # one is the null block


def count_preemptions(llm) -> list:
    """Return a list that grows with each preemption."""
    found, target = [], scheduler(llm)
    preempt = target._preempt_request

    def counted(*args, **kwargs):
        found.append(args)
        return preempt(*args, **kwargs)

    target._preempt_request = counted
    return found


@pytest.mark.parametrize("variant", ["no CLP", "last loop, no CLP"])
def test_windows_in_caches_of_the_whole_context(exports, variant):
    """Without a carry, vLLM may give windows whole caches, as without its hybrid manager: tokens stay the same."""
    export = exports(variant)
    with engine(export, disable_hybrid_kv_cache_manager=True) as llm:
        assert len(scheduler(llm).kv_cache_manager.kv_cache_config.kv_cache_groups) == 1
        assert_same(export, llm, prompts(12))


def test_blocks_come_back(exports):
    export = exports("plt3")
    with engine(export) as llm:
        whole = free_blocks(llm)
        greedy(llm, prompts())
        assert free_blocks(llm) == whole


def test_a_cache_that_is_taken_away_is_freed(exports):
    """vLLM captures graphs with a small cache first, and frees it before it allocates the real one."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from vllm.forward_context import ForwardContext, override_forward_context
    from vllm.v1.worker.utils import clear_layer_kv_caches

    export = exports("plt3")
    with engine(export) as llm:
        carry = served_model(llm).model.carry
        assert_same(export, llm, prompts(5))
        real = [layer.kv_cache for layer in carry.slices]
        small = torch.zeros(len(real), 4, *real[0].shape[1:])
        freed = StorageWeakRef(small.untyped_storage())
        for layer, cache in zip(carry.slices, small.unbind(), strict=True):
            layer.kv_cache = cache
        del cache
        with override_forward_context(ForwardContext({}, dict.fromkeys(layer.name for layer in carry.slices), {})):
            assert [view.data_ptr() for _, view in carry.views()] == [small.data_ptr()]
        del small
        assert not freed.expired()
        clear_layer_kv_caches(carry.slices)
        assert freed.expired()
        for layer, cache in zip(carry.slices, real, strict=True):
            layer.kv_cache = cache
        assert_same(export, llm, prompts(5, seed=1))


@pytest.mark.parametrize("variant", ["plt3", "last loop, 3 loops, shifted"])
def test_long_contexts_hold_windows_and_one_carry(exports, variant):
    """The blocks of windows and of the carry do not grow with the context."""
    export = exports(variant, window_size=8)
    with engine(export, max_model_len=1024, max_num_batched_tokens=32) as llm:
        whole = free_blocks(llm)
        add(llm, "long", SHARED * 3)
        for _ in range(30):
            llm.llm_engine.step()
        held = whole - free_blocks(llm)
        full = -(-len(SHARED * 3) // 32)
        assert full <= held <= full + 1 + 2 * 2 + 2
        llm.llm_engine.abort_request(["long"])
        llm.llm_engine.step()
        assert free_blocks(llm) == whole
