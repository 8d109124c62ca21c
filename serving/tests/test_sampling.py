"""Sampling, log-probabilities, aborted requests and speculative decoding."""

import pytest
from helpers import assert_same, engine, free_blocks, generate, prompts

torch = pytest.importorskip("torch")


def logprobs(export, ids: list[int], loop_count: int | None = None):
    with torch.no_grad():
        return export.model(torch.tensor([ids]), use_cache=False, loop_count=loop_count).logits[0].log_softmax(-1)


@pytest.mark.parametrize("variant", ["plt2", "plt3", "loopcoder", "experts", "shifted channels", "last loop"])
def test_logprobs_of_prompts_and_answers(exports, variant):
    export = exports(variant)
    ids = prompts(12)
    with engine(export, max_num_batched_tokens=50) as llm:
        outputs = generate(llm, ids, 16, prompt_logprobs=0, logprobs=0)
    for out, prompt in zip(outputs, ids, strict=True):
        answer = list(out.outputs[0].token_ids)
        expected = logprobs(export, prompt + answer)
        got = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[1:], prompt[1:], strict=True)]
        got += [entry[token].logprob for entry, token in zip(out.outputs[0].logprobs, answer, strict=True)]
        chosen = expected[torch.arange(len(got)), torch.tensor((prompt + answer)[1:])]
        torch.testing.assert_close(torch.tensor(got), chosen, atol=2e-5, rtol=0)


def test_several_samples_of_one_prompt(exports):
    """Samples of one prompt differ, and the log-probabilities of each are the model's for its text."""
    export = exports("plt3")
    ids = prompts(6)
    with engine(export) as llm:
        outputs = generate(llm, ids, 20, n=4, temperature=1.0, logprobs=0, prompt_logprobs=0)
    for out, prompt in zip(outputs, ids, strict=True):
        assert len({tuple(sample.token_ids) for sample in out.outputs}) > 1
        for sample in out.outputs:
            answer = list(sample.token_ids)
            expected = logprobs(export, prompt + answer)[len(prompt) - 1 : -1]
            got = torch.tensor([entry[token].logprob for entry, token in zip(sample.logprobs, answer, strict=True)])
            torch.testing.assert_close(got, expected[torch.arange(len(answer)), answer], atol=2e-5, rtol=0)


def test_aborted_requests(exports):
    """Aborted requests do not change the other requests' tokens, and their blocks are freed."""
    from vllm import SamplingParams

    export = exports("plt3")
    ids = prompts(16)
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
    with engine(export) as llm:
        whole, core, out = free_blocks(llm), llm.llm_engine, {}
        for index, prompt in enumerate(ids):
            core.add_request(str(index), {"prompt_token_ids": prompt}, params)
        for step in range(400):
            for request in core.step():
                if request.finished and request.outputs[0].finish_reason == "length":
                    out[int(request.request_id)] = list(request.outputs[0].token_ids)
            if step in (1, 4, 9):
                core.abort_request([str(index) for index in range(len(ids)) if index % 3 == step % 3])
            if not core.has_unfinished_requests():
                break
        assert free_blocks(llm) == whole
    assert 0 < len(out) < len(ids)
    assert all(tokens == export.decode(ids[index], 24) for index, tokens in out.items())


@pytest.mark.parametrize(
    ("variant", "drafts"),
    [
        ("plt2", 1),
        ("plt3", 4),
        ("loopcoder", 2),
        ("shifted heads", 3),
        ("keys alone, span, shifted", 3),
        ("YaRN", 3),
        ("last loop", 4),
        ("last loop, 3 loops, shifted", 2),
        ("last loop, no CLP", 3),
    ],
)
def test_speculation_by_ngrams(exports, variant, drafts):
    """Tokens are the same with n-gram drafts, accepted or not; steps that verify drafts run loop by loop."""
    export = exports(variant)
    ids = [(prompt * 6)[:90] for prompt in prompts(16, longest=14)]  # repetitive, so that there are drafts
    speculation = {
        "method": "ngram",
        "num_speculative_tokens": drafts,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
    with engine(export, speculative_config=speculation) as llm:
        assert_same(export, llm, ids, tokens=30)
