"""`generate` with everything users ask of it."""

import copy

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, pipeline

from plt_megatron.hf.configuration_plt import PLTConfig
from plt_megatron.hf.modeling_plt import CACHE_NAME, PLTForCausalLM
from tests.hf.tiny import ALL, full, left_pad, make_model, make_tokens


def greedy(model, tokens, count, **kwargs):
    """Greedy text from full forwards, without a cache."""
    for _ in range(count):
        tokens = torch.cat([tokens, full(model, tokens, **kwargs)[:, -1:].argmax(-1)], 1)
    return tokens


def generate(model, tokens, count, **kwargs):
    kwargs = {"do_sample": False, "pad_token_id": 0, **kwargs}
    kwargs.setdefault("attention_mask", torch.ones_like(tokens))
    return model.generate(tokens, max_new_tokens=count, **kwargs)


STATIC = {"cache_implementation": "static"}


# Which logits each model has is test_hf_decode.py's; here are the kinds of cache that `generate` fills.
@pytest.mark.parametrize(
    "name", ["vanilla", "plt", "clp", "naive", "iquest", "own_values", "last_loop_shifted", "span_loopcoder"]
)
def test_greedy_text_is_that_of_full_forwards(name):
    model = make_model(**ALL[name])
    tokens = make_tokens(2, 7)
    text = greedy(model, tokens, 14)
    for how in ({}, STATIC, {"loop_mode": "serial"}, {"use_cache": False}):
        assert torch.equal(generate(model, tokens, 14, **how), text), how


@pytest.mark.parametrize("name", ["vanilla", "clp", "loopcoder", "iquest", "last_loop_shifted"])
def test_left_padded_batch_generates_what_each_prompt_does_alone(name):
    model = make_model(**ALL[name])
    rows = [make_tokens(n, seed=n) for n in (12, 5, 1)]
    tokens, mask = left_pad(rows)
    alone = torch.stack([greedy(model, row[None], 12)[0, len(row) :] for row in rows])
    for how in ({}, STATIC):
        assert torch.equal(generate(model, tokens, 12, attention_mask=mask, **how)[:, 12:], alone)


@pytest.mark.parametrize("name", ["plt", "naive", "iquest", "learned_shift", "last_loop_shifted"])
def test_beam_search_is_the_same_with_and_without_a_cache(name):
    model = make_model(**ALL[name])
    tokens, mask = left_pad([make_tokens(8), make_tokens(5, seed=2)])
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    text = generate(model, tokens, 10, use_cache=False, **beams)
    for how in ({}, STATIC):
        assert torch.equal(generate(model, tokens, 10, **beams, **how), text)


def test_sampling_is_the_same_with_and_without_a_cache():
    model = make_model(loop_count=3)
    tokens = make_tokens(3, 6)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(4)
        texts.append(
            generate(model, tokens, 12, do_sample=True, top_p=0.9, use_cache=use_cache, num_return_sequences=2)
        )
    assert torch.equal(*texts)


@pytest.mark.parametrize("how", [{}, STATIC])
def test_prefill_chunk_size(how):
    model = make_model(loop_count=3)
    tokens, mask = left_pad([make_tokens(23), make_tokens(9, seed=2)])
    whole = generate(model, tokens, 8, attention_mask=mask)
    assert torch.equal(generate(model, tokens, 8, attention_mask=mask, prefill_chunk_size=5, **how), whole)


@pytest.mark.parametrize("name", ["clp", "iquest", "learned_shift", "last_loop_shifted"])
def test_prompt_lookup_takes_wrong_guesses_back(name):
    """Assisted decoding adds several tokens at once and crops those that were wrong."""
    model = make_model(**ALL[name])
    tokens = make_tokens(1, 4).repeat(1, 6)
    assert torch.equal(generate(model, tokens, 20, prompt_lookup_num_tokens=4), greedy(model, tokens, 20))


def test_a_shallow_assistant_drafts_for_the_whole_model():
    model, assistant = make_model(loop_count=3), make_model(loop_count=1)
    tokens = make_tokens(1, 9)
    assert torch.equal(generate(model, tokens, 16, assistant_model=assistant), greedy(model, tokens, 16))


@pytest.mark.parametrize("loops", [2, 3])
def test_an_assistant_with_fewer_loops_than_are_asked_for(loops):
    model, assistant = make_model(loop_count=3), make_model(loop_count=1)
    tokens = make_tokens(1, 9)
    text = generate(model, tokens, 16, assistant_model=assistant, loop_count=loops)
    assert torch.equal(text, greedy(model, tokens, 16, loop_count=loops))


@pytest.mark.parametrize("asked", [{"loop_count": 2}, {"loop_mode": "parallel"}, {"loop_mode": "serial"}], ids=str)
@pytest.mark.parametrize("kind", ["plain", "naive"])
def test_an_assistant_does_not_get_what_the_call_asks_of_loops(kind, asked):
    """A plain transformer has no loops, and those of a naive PLT cannot run in parallel."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model, tokens = make_model(loop_count=3), make_tokens(1, 9)
    assistant = make_model(loop_count=2, cross_loop_parallel=False)
    if kind == "plain":
        config = model.config
        size = {"vocab_size": config.vocab_size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        assistant = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2)).eval()
    text = generate(model, tokens, 12, assistant_model=assistant, **asked)
    assert torch.equal(text, greedy(model, tokens, 12, **asked))


def test_buffers_of_a_static_cache_are_marked_where_chunks_of_a_prompt_are_compiled():
    """As on a GPU: what is allocated within a graph cannot be marked, and a step would be no CUDA graph."""
    from transformers import CompileConfig

    model, compiled = make_model(), CompileConfig(backend="eager", mode=None)
    compiled._compile_all_devices = True
    options = {"compile_config": compiled, "prefill_chunk_size": 4, "return_dict_in_generate": True}
    found = model.generate(make_tokens(1, 9), max_new_tokens=3, do_sample=False, **STATIC, **options)
    cache = found[CACHE_NAME]
    buffers = [cache.length, cache.carry.last, *(tensor for layer in cache.layers for tensor in layer.tensors())]
    assert {getattr(buffer, "_dynamo_static_input_type", None) for buffer in buffers} == {"unguarded"}


def test_early_exit_is_refused_and_leaves_nothing_behind():
    model = make_model()
    tokens = make_tokens(1, 9)
    with pytest.raises(ValueError, match="assistant_early_exit: .* loop_count=1"):
        generate(model, tokens, 8, assistant_early_exit=1)
    assert model.config.num_hidden_layers == 2
    assert torch.equal(generate(model, tokens, 8), greedy(model, tokens, 8))


def test_loop_count_and_a_stored_prefix():
    model = make_model(loop_count=3)
    prefix, tail = make_tokens(1, 12), make_tokens(1, 4, seed=2)
    assert torch.equal(generate(model, prefix, 9, loop_count=1), greedy(model, prefix, 9, loop_count=1))
    stored = model.new_cache()
    with torch.no_grad():
        model(prefix, cache=stored)
    whole = torch.cat([prefix, tail], 1)
    for _ in range(2):
        text = generate(model, whole, 9, **{CACHE_NAME: copy.deepcopy(stored)})
        assert torch.equal(text, greedy(model, whole, 9))
    with pytest.raises(ValueError, match="leave out past_key_values, or the assistant"):
        generate(model, whole, 9, prompt_lookup_num_tokens=3, **{CACHE_NAME: copy.deepcopy(stored)})
    with pytest.raises(ValueError, match=r"holds 20 tokens, and this call needs 2\d"):
        generate(model, whole, 9, **{CACHE_NAME: model.new_cache(20)})


def test_inputs_embeds():
    model = make_model()
    tokens = make_tokens(1, 9)
    embeds = model.get_input_embeddings()(tokens)
    text = model.generate(inputs_embeds=embeds, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(text[0], greedy(model, tokens, 8)[0, 9:])


def test_recorded_states_and_weights():
    model = make_model(attn_implementation="eager", loop_count=3)
    tokens = make_tokens(2, 8)
    with torch.no_grad():
        out = model(tokens, output_hidden_states=True, output_attentions=True)
        assert len(out.hidden_states) == 1 + 3 * 2 and len(out.attentions) == 3 * 2
        assert out.attentions[-1].shape == (2, 4, 8, 8)
        step = model(tokens[:, :1], cache=out[CACHE_NAME], output_hidden_states=True, output_attentions=True)
    assert step.hidden_states[1].shape == (2, 3, 64)
    assert step.attentions[0].shape == (2, 4, 3, 9)
    assert torch.allclose(step.attentions[0].sum(-1), torch.ones(()))


def test_recorded_weights_are_those_of_attention_to_the_whole_context():
    model = make_model(attn_implementation="eager", **ALL["last_loop_shifted"])
    with torch.no_grad():
        out = model(make_tokens(2, 8), output_attentions=True)
        step = model(make_tokens(2, 1), cache=out[CACHE_NAME], output_attentions=True)
    assert [weights.shape for weights in out.attentions] == [(2, 4, 8, 8)] * 2
    assert [weights.shape for weights in step.attentions] == [(2, 4, 1, 9)] * 2


def test_caches_that_cannot_hold_a_plt_are_refused():
    model = make_model()
    tokens = make_tokens(1, 5)
    with pytest.raises(ValueError, match="decodes with a PLTCache .* not with DynamicCache"):
        generate(model, tokens, 3, **{CACHE_NAME: DynamicCache()})
    with pytest.raises(ValueError, match='must be "dynamic" or "static" for a PLT, not \'quantized\''):
        generate(model, tokens, 3, cache_implementation="quantized")
    with pytest.raises(ValueError, match="continuous batching cannot hold a PLT's state"):
        model.generate_batch([[1, 2, 3]])
    # Continuous batching comes with a mask of its own, which is not what is wrong.
    with pytest.raises(ValueError, match="decodes with a PLTCache .* not with DynamicCache"):
        model(tokens, torch.ones(1, 1, 5, 5), **{CACHE_NAME: DynamicCache()})


def make_tokenizer():
    words = {"<pad>": 0, "<unk>": 1, "<s>": 2, **{f"w{i}": i for i in range(3, 97)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


def test_pipeline():
    AutoConfig.register("plt", PLTConfig, exist_ok=True)
    AutoModelForCausalLM.register(PLTConfig, PLTForCausalLM, exist_ok=True)
    model, tokenizer = make_model(), make_tokenizer()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    prompts = ["w5 w9 w44 w10", "w20"]
    texts = write(prompts, max_new_tokens=6, do_sample=False, batch_size=2, pad_token_id=0)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        want = tokenizer.decode(greedy(model, ids, 6)[0, ids.shape[1] :], skip_special_tokens=True)
        assert text[0]["generated_text"].replace(" ", "") == (prompt + want).replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plt", "span", "last_loop"])
def test_a_compiled_static_step_is_one_graph(name):
    """No graph break and no recompilation: what a CUDA graph needs."""
    model = make_model(**ALL[name] | {"loop_count": 3})
    tokens = make_tokens(1, 16)
    cache = model.new_cache(16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = [model(tokens[:, :4], cache=cache).logits]
        for i in range(4, 16):
            with torch._dynamo.config.patch(error_on_recompile=i > 5):
                logits.append(compiled(tokens[:, i : i + 1], cache=cache).logits)
    assert (torch.cat(logits, 1) - full(model, tokens)).abs().max() < 1e-4
