"""GGUF files: a tiny one of llama.cpp's own writer, imported, against transformers' reading of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_helpers import imported, make_tokens, megatron_logits

from plt_megatron.errors import UserError
from plt_megatron.hf.importing import ImportOptions, import_model
from plt_megatron.run_folder.checkpoints import read_progress

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LAYERS, HIDDEN, FFN, HEADS, GROUPS = 2, 64, 96, 4, 2


def byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def write_gguf(path: Path, quantized: bool) -> int:
    """A llama of random weights with a byte-level BPE; the ids that it has."""
    import gguf

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *byte_alphabet(), "th", "the"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(tokens) - 3))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    draw = np.random.default_rng(3).standard_normal
    kv = HIDDEN * GROUPS // HEADS
    shapes = {"token_embd": (len(tokens), HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        block = {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN)}
        block |= {"attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN)}
        block |= {"ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = draw(shape, np.float32) * 0.1 + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.Q4_1
        if quantized and len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(tokens)


@pytest.mark.parametrize("quantized", [False, True], ids=["fp32", "Q4_1"])
def test_a_gguf_becomes_a_plt_with_the_same_logits(quantized: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocab = write_gguf(tmp_path / "tiny.gguf", quantized)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32).eval()
    tokens = make_tokens(2, 24, vocab)
    with torch.no_grad():
        expected = reference(tokens).logits
    result, weights = imported(tmp_path / "tiny.gguf", tmp_path / "run", loop_count=2, preset="recommended")
    found = megatron_logits(result.model, weights, tokens, vocab)
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/tokenizer")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|im_end|>"
    own: Any = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    assert tokenizer("<|im_start|>the \u65e5 thing").input_ids == own("<|im_start|>the \u65e5 thing").input_ids
    progress = read_progress(result.checkpoint)
    assert progress["imported_from"] == "tiny (llama)"
    assert (progress["base_model"], progress["license"]) == ("tiny", "apache-2.0")


@pytest.mark.parametrize("content", [b"GGUF", b"not one at all", b""])
def test_a_broken_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.gguf") as refused:
        import_model(ImportOptions(tmp_path / "broken.gguf", tmp_path / "run"))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
