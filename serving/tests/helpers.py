"""Small random models, transformers' decoding of them, and vLLM engines that serve them.

Heavy packages are imported inside functions, since this file is also read where vLLM is not installed.
"""

import gc
import json
import os
import random
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

VOCAB = 160
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "window_size": 8,
    "eos_token_id": 0,
}
LOOPCODER = {
    "gate_input": "hidden",
    "gate_side": "global",
    "norm_between_loops": True,
    "embedding_scale": 0.7,
    "hidden_scale": 0.3,
}
RECOMMENDED = {
    "input_injection": True,
    "hidden_norm": True,
    "learned_hidden_scale": "channel",
    "residual_scale": 0.5,
}
LAST_LOOP = {"share_kv": False, "gated_window": False, "full_attention": "last_loop"}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 8.0,
    "beta_slow": 0.5,
    "truncate": False,
}
# Changes to a PLT of two loops.
VARIANTS = {
    "plt1": {"loop_count": 1},
    "plt2": {},
    "plt3": {"loop_count": 3},
    "plt4": {"loop_count": 4, "num_hidden_layers": 2},
    "loopcoder": LOOPCODER,
    "loopcoder3": {**LOOPCODER, "loop_count": 3},
    "query gate on the global side": {"gate_side": "global", "norm_between_loops": True},
    "hidden gate on the local side": {"gate_input": "hidden", "hidden_scale": 0.5},
    "qk norm, ffn norm, qkv bias": {"qk_norm": True, "ffn_output_norm": True, "qkv_bias": True, "loop_count": 3},
    "biases, tied": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "OLMo-2": {"norm_placement": "post", "qk_norm": True},
    "llama3 rope": {"rope_parameters": LLAMA3},
    "YaRN": {"rope_parameters": YARN, "key_shift": "heads"},
    "tanh gate": {"gate_activation": "tanh"},
    "window 1": {"window_size": 1},
    "window above blocks": {"window_size": 75, "loop_count": 3},
    "window above the context": {"window_size": 900},
    "uneven slices": {"hidden_size": 80, "loop_count": 3, "head_dim": 32},
    "wide slices": {"hidden_size": 256, "num_key_value_heads": 1, "loop_count": 4, "num_hidden_layers": 2},
    "experts": MOE,
    "shared expert": {**MOE, "shared_expert_intermediate_size": 32, "norm_topk_prob": False, "loop_count": 3},
    "naive loops": {"cross_loop_parallel": False, "share_kv": False, "gated_window": False, "loop_count": 3},
    "CLP only": {"share_kv": False, "gated_window": False},
    "CLP only, 3 loops": {"share_kv": False, "gated_window": False, "loop_count": 3},
    "no window": {"gated_window": False, "loop_count": 3},
    "no CLP": {"cross_loop_parallel": False},
    "recommended": {**RECOMMENDED, "loop_count": 3},
    "shifted heads": {"key_shift": "heads", "loop_count": 3},
    "shifted channels": {**LOOPCODER, "key_shift": "channels", "qk_norm": True},
    "learned shift": {**RECOMMENDED, "key_shift": "learned", "loop_count": 3},
    "shift, one loop": {"key_shift": "heads", "num_key_value_heads": 4, "loop_count": 1},
    "shift, no window": {"key_shift": "channels", "gated_window": False, "loop_count": 3},
    "shift, CLP only": {"key_shift": "learned", "share_kv": False, "gated_window": False},
    "shift, naive loops": {
        "key_shift": "heads",
        "cross_loop_parallel": False,
        "share_kv": False,
        "gated_window": False,
    },
    "shift, no CLP": {"key_shift": "learned", "cross_loop_parallel": False, "num_key_value_heads": 1},
    "shift, OLMo-2": {"key_shift": "heads", "norm_placement": "post", "qk_norm": True},
    "span": {"loop_span": [1, 3], "num_hidden_layers": 4},
    "span of all": {"loop_span": [0, 3]},
    "prelude alone, loopcoder": {**LOOPCODER, "loop_span": [1, 4], "num_hidden_layers": 4},
    "coda alone, experts": {**MOE, "loop_span": [0, 2], "loop_count": 3, "norm_between_loops": True},
    "span, shifted": {"loop_span": [2, 3], "key_shift": "learned", "loop_count": 3, "num_hidden_layers": 4},
    "span, recommended, tied": {**RECOMMENDED, "loop_span": [1, 2], "tie_word_embeddings": True, "loop_count": 3},
    "span, naive loops": {
        "loop_span": [1, 2],
        "key_shift": "channels",
        "cross_loop_parallel": False,
        "share_kv": False,
        "gated_window": False,
    },
    "keys alone": {"share_values": False, "loop_count": 3},
    "keys alone, no window": {
        "share_values": False,
        "gated_window": False,
        "key_shift": "learned",
        "loop_span": [1, 3],
    },
    "keys alone, span, shifted": {"share_values": False, "loop_span": [1, 2], "key_shift": "heads"},
    "keys alone, no CLP": {"share_values": False, "cross_loop_parallel": False, "key_shift": "heads"},
    "last loop": LAST_LOOP,
    "last loop, 3 loops, shifted": {**LAST_LOOP, "loop_count": 3, "key_shift": "heads"},
    "last loop, no CLP": {**LAST_LOOP, "cross_loop_parallel": False, "loop_count": 3},
    "last loop, span": {**LAST_LOOP, "loop_span": [1, 3], "num_hidden_layers": 4, "loop_count": 3, "qk_norm": True},
    "last loop, span, shifted, recommended": {
        **LAST_LOOP,
        **RECOMMENDED,
        "loop_span": [1, 2],
        "key_shift": "learned",
    },
    "last loop, experts, YaRN": {**LAST_LOOP, **MOE, "rope_parameters": YARN},
    "scaled branches, scale of the model": {**RECOMMENDED, "learned_hidden_scale": "model", "norm_placement": "post"},
    "naive loops with embeddings": {
        **RECOMMENDED,
        "cross_loop_parallel": False,
        "share_kv": False,
        "gated_window": False,
    },
}


def make_model(**changes):
    """Return a random fp32 model whose weights are large enough for gates, norms and later loops to matter."""
    import torch

    from plt_megatron.hf.configuration_plt import PLTConfig
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    torch.manual_seed(0)
    config = PLTConfig(**{**SIZES, "loop_count": 2, **changes})
    model = PLTForCausalLM._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "norm" in name:
                param.copy_(1 + 0.3 * torch.randn_like(param))
            else:
                matters = "plt_gate" in name or "key_shift" in name
                param.normal_(std=0.6 if matters else 1.1 * config.hidden_size**-0.5)
    return model


class Export:
    """A model's folder, and its greedy decoding by transformers."""

    def __init__(self, folder: Path, model):
        self.folder = folder
        self.model = model
        self._decoded: dict = {}

    def decode(self, prompt: list[int], tokens: int, **kwargs) -> list[int]:
        """Return the next tokens by transformers; kwargs (loop_count, ...) are passed to the model."""
        import torch

        key = (tuple(prompt), tokens, *kwargs.items())
        if key not in self._decoded:
            cache = self.model.new_cache(loop_count=kwargs.get("loop_count"))
            new, out = torch.tensor([prompt]), []
            for _ in range(tokens):
                logits = self.model(new, cache=cache, logits_to_keep=1, **kwargs).logits
                new = logits[:, -1:].argmax(-1)
                out.append(int(new))
            self._decoded[key] = out
        return self._decoded[key]


class Exports:
    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict = {}

    def __call__(self, variant: str = "plt2", tokenizer: bool = False, **changes) -> Export:
        settings = {**VARIANTS[variant], **changes}
        key = json.dumps([settings, tokenizer], sort_keys=True)
        if key not in self.made:
            folder = self.folder / str(len(self.made))
            model = make_model(**settings)
            model.save_pretrained(folder)
            if tokenizer:
                write_tokenizer(folder, settings.get("vocab_size", VOCAB))
            self.made[key] = Export(folder, model)
        return self.made[key]


def write_tokenizer(folder: Path, vocab: int) -> None:
    """Write a tokenizer with the words "t1", "t2", ... and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0, **{f"t{index}": index for index in range(1, vocab)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    fast.chat_template = "{% for message in messages %}t2 {{ message['content'] }} {% endfor %}"
    fast.save_pretrained(folder)


def prompts(count: int = 20, seed: int = 0, longest: int = 110) -> list[list[int]]:
    """Return random prompts of different lengths, some of them near block and window boundaries."""
    rng = random.Random(seed)
    lengths = [1, 2, 7, 8, 9, 31, 32, 33, 64, longest]
    lengths += [rng.randrange(1, longest) for _ in range(count - len(lengths))]
    return [[rng.randrange(1, VOCAB) for _ in range(length)] for length in lengths[:count]]


@contextmanager
def engine(export: Export, **options):
    """Yield an engine in this process; shut it down and clean up on exit."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 24,
        "max_num_batched_tokens": 64,
        "block_size": 32,
        "num_gpu_blocks_override": 600,
        "kv_cache_memory_bytes": 1 << 28,
        "seed": 0,
    }
    # vLLM compiles its sharded embedding even in eager mode, which takes half a minute per process.
    eager = {"TORCHDYNAMO_DISABLE": "1"} if options.get("tensor_parallel_size", 1) > 1 else {}
    # vLLM collects nine times an engine, 3 of its 4 seconds with all that is imported. Once is enough, here, where the
    # last test has let go of its engine.
    gc.collect()
    uncollected = patch("gc.collect", lambda *args: 0)
    with patch.dict(os.environ, eager), uncollected:
        llm = LLM(model=str(export.folder), **{**defaults, **options})
    try:
        yield llm
    finally:
        with uncollected:
            llm.llm_engine.engine_core.shutdown()
            cleanup_dist_env_and_memory()


def generate(llm, token_lists: list[list[int]], tokens: int = 24, **sampling):
    """Return vLLM's outputs; decoding is greedy unless `sampling` changes it."""
    from vllm import SamplingParams

    settings = {"temperature": 0, "max_tokens": tokens, "ignore_eos": True, "detokenize": False, **sampling}
    return llm.generate([{"prompt_token_ids": ids} for ids in token_lists], SamplingParams(**settings), use_tqdm=False)


def greedy(llm, token_lists: list[list[int]], tokens: int = 24) -> list[list[int]]:
    return [list(out.outputs[0].token_ids) for out in generate(llm, token_lists, tokens)]


def assert_same(export: Export, llm, token_lists: list[list[int]], tokens: int = 24, **kwargs) -> None:
    """Assert that the engine's greedy tokens equal transformers'."""
    expected = [export.decode(ids, tokens, **kwargs) for ids in token_lists]
    assert greedy(llm, token_lists, tokens) == expected


def free_blocks(llm) -> int:
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def served_model(llm):
    """Return the engine's model, which is in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
