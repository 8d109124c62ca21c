"""GGUF files: a tiny one of llama.cpp's own writer, imported, against transformers' reading of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from convert_helpers import imported, make_tokens, megatron_logits, refuse_import

from plt_megatron.hf import importing
from plt_megatron.hf.importing import ImportOptions, import_model
from tests.checkpoints import read_progress

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
LAYERS, HIDDEN, FFN, HEADS, GROUPS = 2, 64, 96, 4, 2


MLP = {"ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN), "ffn_down": (HIDDEN, FFN)}


def experts_of(count: int) -> dict[str, tuple[int, ...]]:
    norms = dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HIDDEN // HEADS,))
    stacked = {f"{name}_exps": (count, *shape) for name, shape in MLP.items()}
    return {**norms, **stacked, "ffn_gate_inp": (count, HIDDEN)}


def write_gguf(path: Path, quantized: bool = False, experts: int = 0, also: Callable[[Any], None] | None = None) -> int:
    """A llama of random weights with a byte-level BPE, or a Qwen3-MoE, and what `also` writes; the ids that it has."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th", "the"]
    writer = gguf.GGUFWriter(path, "qwen3moe" if experts else "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(FFN)
        writer.add_key_length(HIDDEN // HEADS)
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
        block |= {"attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN)}
        block |= experts_of(experts) if experts else MLP
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        values = draw(shape, np.float32) * 0.1 + (len(shape) == 1)
        kind = gguf.GGMLQuantizationType.Q4_1
        if quantized and len(shape) == 2:
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", values)
    if also is not None:
        also(writer)
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


def test_a_temporary_folder_that_is_too_small_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors

    write_gguf(tmp_path / "tiny.gguf")
    full = Mock(side_effect=safetensors.SafetensorError("Error while serializing: No space left on device"))
    monkeypatch.setattr("safetensors.torch.serialize_file", full)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "small"))
    (tmp_path / "small").mkdir()
    message = r"/small/plt-gguf-.*: No space .* tiny.gguf take \d+ kB there.* TMPDIR"
    refuse_import(tmp_path / "tiny.gguf", message)
    assert not list((tmp_path / "small").glob("plt-gguf-*"))


def test_what_the_tokenizers_library_raises_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    merges = Exception("Error while initializing BPE: Token `ab` out of vocabulary")  # no type of its own
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", Mock(side_effect=merges))
    refuse_import(tmp_path / "tiny.gguf", r"tiny\.gguf: transformers cannot read it \(Error while initializing BPE")


@pytest.mark.parametrize("content", [b"GGUF", b"not one at all", b""])
def test_a_broken_file_is_one_line(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(content)
    refuse_import(tmp_path / "broken.gguf", r"broken\.gguf")


def test_experts(tmp_path: Path) -> None:
    """transformers holds a layer's in one tensor, and takes its own default for their width."""
    vocab = write_gguf(tmp_path / "tiny.gguf", experts=4)
    result, weights = imported(tmp_path / "tiny.gguf", tmp_path / "run")
    assert result.model.moe is not None and result.model.moe.ffn_hidden_size == FFN
    tokens = make_tokens(2, 24, vocab)
    found = megatron_logits(result.model, weights, tokens, vocab)
    expected = qwen3_moe(tmp_path / "tiny.gguf", vocab)(tokens).logits.detach()
    assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def qwen3_moe(path: Path, vocab: int) -> Any:
    """transformers' model with the file's tensors, as llama.cpp names and stacks them."""
    from gguf import GGUFReader
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_hidden_layers": LAYERS, "hidden_size": HIDDEN, "head_dim": HIDDEN // HEADS, "vocab_size": vocab}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": FFN, "norm_topk_prob": True}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts, tie_word_embeddings=True)).eval()
    tensors = {each.name: torch.tensor(each.data) for each in GGUFReader(path).tensors}
    names = {"token_embd": "embed_tokens", "output_norm": "norm"}
    block = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.gate"}
    block |= {"attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
    block |= {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"}
    for layer in range(LAYERS):
        names |= {f"blk.{layer}.{theirs}": f"layers.{layer}.{ours}" for theirs, ours in block.items()}
    state = {f"{ours}.weight": tensors[f"{theirs}.weight"] for theirs, ours in names.items()}
    for layer in range(LAYERS):
        gate, up, down = (tensors[f"blk.{layer}.ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
        state[f"layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        state[f"layers.{layer}.mlp.experts.down_proj"] = down
    model.model.load_state_dict(state)
    return model


def rope_keys(kind: str | None = None, factor: float | None = None) -> Callable[[Any], None]:
    def add(writer: Any) -> None:
        import gguf

        writer.add_rope_scaling_orig_ctx_len(64)
        if kind is not None:
            writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        if factor is not None:
            writer.add_rope_scaling_factor(factor)

    return add


SCALED = {
    "a table, as of Llama 3.1": lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32)),
    "yarn": rope_keys("yarn", 4.0),
    "linear": rope_keys("linear", 4.0),
    "no type, which is linear": rope_keys(None, 4.0),
    "the former key": lambda writer: writer.add_float32("llama.rope.scale_linear", 2.0),
}


@pytest.mark.parametrize("scaling", SCALED)
def test_scaled_rope_is_refused(scaling: str, tmp_path: Path) -> None:
    """transformers would read the model without it."""
    write_gguf(tmp_path / "tiny.gguf", also=SCALED[scaling])
    message = r"^\S+tiny\.gguf: its RoPE is scaled, .*; import the original folder$"
    refuse_import(tmp_path / "tiny.gguf", message)


@pytest.mark.parametrize(("kind", "factor"), [("none", 4.0), ("linear", 1.0), (None, 1.0), (None, None)])
def test_keys_that_scale_nothing_are_no_fault(kind: str | None, factor: float | None, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", also=rope_keys(kind, factor))
    assert import_model(ImportOptions(tmp_path / "tiny.gguf", tmp_path / "run")).model.rope_scaling is None


def test_tensors_of_other_shapes_are_one_line(tmp_path: Path) -> None:
    def add(writer: Any) -> None:
        writer.add_tensor("output.weight", np.ones((7, HIDDEN), np.float32))

    write_gguf(tmp_path / "tiny.gguf", also=add)
    refuse_import(tmp_path / "tiny.gguf", r"tiny\.gguf: transformers cannot read it")


def biases(writer: Any) -> None:
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.attn_q.bias", np.ones(HIDDEN, np.float32))


@pytest.mark.parametrize(
    ("also", "without", "message"),
    [
        (lambda writer: writer.add_sliding_window(8), "nothing", r"attention\.sliding_window 8 is not supported"),
        (biases, "nothing", "LlamaForCausalLM .* would leave some out"),
        (None, "ffn_up.weight", r"reads as model\.layers\.0\.mlp\.up_proj\.weight and 1 more"),  # as a Mixtral's
    ],
    ids=["window", "more tensors", "fewer tensors"],
)
def test_what_transformers_would_drop_or_make_up_is_refused(
    also: Callable[[Any], None] | None, without: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    add = gguf.GGUFWriter.add_tensor
    with monkeypatch.context() as patch:
        patch.setattr(
            gguf.GGUFWriter, "add_tensor", lambda w, name, *a, **k: name.endswith(without) or add(w, name, *a, **k)
        )
        write_gguf(tmp_path / "tiny.gguf", also=also)
    refuse_import(tmp_path / "tiny.gguf", rf"^\S+tiny\.gguf: .*{message}")


def test_a_tokenizer_that_is_read_wrongly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers 5.16 does of a Llama's: every document of the run would end with another token."""
    import transformers

    write_gguf(tmp_path / "tiny.gguf")
    read = transformers.AutoTokenizer.from_pretrained

    def misread(**source: Any) -> Any:
        tokenizer = read(**source)
        tokenizer.eos_token = "<|im_start|>"
        return tokenizer

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", misread)
    refuse_import(tmp_path / "tiny.gguf", r"tiny\.gguf: transformers .* end of a text")


def test_a_configuration_without_quantization(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.4 does not put GGUF's quantization into the configuration of the model that it returns."""
    from types import SimpleNamespace

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    loaded = (None, SimpleNamespace(save_pretrained=lambda folder: None), LlamaForCausalLM(config))
    monkeypatch.setattr(importing, "_load", lambda path: loaded)
    importing.unpack(tmp_path / "tiny.gguf", tmp_path / "folder")
    assert (tmp_path / "folder/config.json").is_file()
