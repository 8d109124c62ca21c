"""Weights that are not an export's own: LoRA adapters and quantized ones, through vLLM's own methods."""

import json

import pytest
from helpers import assert_same, engine, generate, prompts

torch = pytest.importorskip("torch")


@pytest.mark.parametrize("variant", ["plt2", "shifted heads"])
def test_a_lora_adapter(exports, tmp_path, variant):
    """Served beside the model; the tokens are those of a model that has it in its weights."""
    from helpers import VARIANTS, Export, make_model
    from safetensors.torch import save_file
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    export = exports(variant)
    merged, tensors, rank = make_model(**VARIANTS[variant]), {}, 8
    torch.manual_seed(1)
    for name, module in merged.named_modules():
        if name.endswith(("q_proj", "v_proj", "o_proj", "down_proj")):
            a, b = 0.2 * torch.randn(rank, module.in_features), 0.2 * torch.randn(module.out_features, rank)
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
            module.weight.data += 2 * b @ a
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    targets = ["q_proj", "v_proj", "o_proj", "down_proj"]
    adapter = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    ids = prompts(8)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    with engine(export, enable_lora=True, max_lora_rank=rank) as llm:
        assert_same(export, llm, ids)
        request = LoRARequest("adapter", 1, str(tmp_path))
        inputs = [{"prompt_token_ids": prompt} for prompt in ids]
        outputs = llm.generate(inputs, params, use_tqdm=False, lora_request=request)
    adapted = Export(tmp_path, merged)
    assert [list(out.outputs[0].token_ids) for out in outputs] == [adapted.decode(prompt, 16) for prompt in ids]


@pytest.mark.parametrize(
    ("variant", "mode"), [("plt3", "parallel"), ("plt3", "serial"), ("shifted channels", "parallel")]
)
def test_int8_weights_and_activations(exports, tmp_path, variant, mode):
    """compressed-tensors' W8A8: log-probabilities are those of the same rounding in transformers."""
    from helpers import VARIANTS, make_model

    export, rounded = exports(variant), make_model(**VARIANTS[variant])
    write_int8(export, tmp_path)
    simulate_int8(rounded)
    ids = prompts(8)
    options = {"dtype": "bfloat16", "additional_config": {"plt": {"loop_mode": mode}}}  # the kernel wants bf16
    with engine(type(export)(tmp_path, rounded), **options) as llm:
        outputs = generate(llm, ids, 8, logprobs=0)
    differences = []
    for out, prompt in zip(outputs, ids, strict=True):
        answer = list(out.outputs[0].token_ids)
        with torch.no_grad():
            logits = rounded(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
        got = torch.tensor([entry[token].logprob for entry, token in zip(out.outputs[0].logprobs, answer, strict=True)])
        differences += (got - expected).abs().tolist()
    assert sum(differences) / len(differences) < 0.06 and max(differences) < 0.3


def linears(model):
    return [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]


def write_int8(export, folder) -> None:
    """The export with its layers' weights in int8, one scale a row, and activations to be rounded a token."""
    from safetensors.torch import save_file

    tensors = {name: tensor.clone() for name, tensor in export.model.state_dict().items()}
    for name, module in linears(export.model):
        scale = module.weight.data.abs().amax(1, keepdim=True) / 127
        tensors[f"{name}.weight"] = (module.weight.data / scale).round().to(torch.int8)
        tensors[f"{name}.weight_scale"] = scale
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((export.folder / "config.json").read_text())
    eight = {"num_bits": 8, "type": "int", "symmetric": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**eight, "strategy": "channel", "dynamic": False},
                "input_activations": {**eight, "strategy": "token", "dynamic": True},
            }
        },
    }
    (folder / "config.json").write_text(json.dumps(config))


def simulate_int8(model) -> None:
    def round_rows(x: "torch.Tensor") -> "torch.Tensor":
        scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
        return (x / scale).round() * scale

    for _, module in linears(model):
        module.weight.data = round_rows(module.weight.data)
        module.register_forward_pre_hook(lambda module, args: (round_rows(args[0]),))
