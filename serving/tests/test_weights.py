"""Weights other than an export's: LoRA adapters, quantized by vLLM's methods, and with missing or unknown tensors."""

import json
import shutil

import pytest
from helpers import assert_same, engine, generate, prompts, served_model

torch = pytest.importorskip("torch")


def make_adapter(folder, variant: str, targets: tuple[str, ...], seed: int):
    """Write a LoRA adapter of rank 8 for the `targets` layers; return the model with the adapter merged."""
    from adapters import write_adapter
    from helpers import VARIANTS, Export, make_model

    merged, pairs, rank = make_model(**VARIANTS[variant]), {}, 8
    torch.manual_seed(seed)
    for name, module in merged.named_modules():
        if name.endswith(targets):
            a, b = 0.2 * torch.randn(rank, module.in_features), 0.2 * torch.randn(module.out_features, rank)
            pairs[name] = a, b
            module.weight.data += 2 * b @ a
    write_adapter(folder, pairs, alpha=2 * rank)
    return Export(folder, merged)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("plt2", {}),
        ("plt2", {"additional_config": {"plt": {"loop_mode": "serial"}}}),
        ("shifted heads", {}),
        ("span", {}),
        ("last loop", {}),
        ("plt3", {"tensor_parallel_size": 2}),
    ],
    ids=["parallel", "serial", "shifted", "span", "last loop", "two ranks"],
)
def test_lora_adapters(exports, tmp_path, variant, options):
    """In one batch of requests with two adapters and none, tokens equal those of models with the adapter merged."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    base = exports(variant)
    first = make_adapter(tmp_path / "first", variant, ("q_proj", "v_proj", "o_proj", "down_proj"), seed=1)
    second = make_adapter(tmp_path / "second", variant, ("k_proj", "gate_proj", "up_proj"), seed=2)
    models = [base, first, second, first, base, second, second, first, base]
    requests = {first: LoRARequest("first", 1, str(first.folder)), second: LoRARequest("second", 2, str(second.folder))}
    ids = prompts(len(models))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    # One more than needed: vLLM's CPU kernels take no adapter for the last one.
    with engine(base, enable_lora=True, max_loras=3, max_lora_rank=8, **options) as llm:
        if "tensor_parallel_size" not in options:  # else the model is in other processes
            assert (served_model(llm).model.rows is None) == ("additional_config" in options)
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in ids],
            params,
            use_tqdm=False,
            lora_request=[requests.get(model) for model in models],
        )
    expected = [model.decode(prompt, 16) for model, prompt in zip(models, ids, strict=True)]
    assert [list(out.outputs[0].token_ids) for out in outputs] == expected
    assert expected != [base.decode(prompt, 16) for prompt in ids]


def test_adapters_outside_the_loops_alone(exports):
    """A server whose adapters may be in the embedding only has no kernels to call by loop."""
    with engine(exports("plt2"), enable_lora=True, max_lora_rank=8, lora_target_modules=["embed_tokens"]) as llm:
        assert served_model(llm).model.rows is not None
        assert_same(exports("plt2"), llm, prompts(4))


@pytest.mark.parametrize(
    ("variant", "mode"),
    [("plt3", "parallel"), ("plt3", "serial"), ("shifted channels", "parallel"), ("span", "parallel")],
)
def test_int8_weights_and_activations(exports, tmp_path, variant, mode):
    """Log-probabilities with compressed-tensors' W8A8 are close to those of the same rounding in transformers."""
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


def write_without(export, folder, gone=(), **added):
    """Write a copy of the export without the tensors `gone` and with those `added`; return it."""
    from safetensors.torch import save_file

    shutil.copytree(export.folder, folder, dirs_exist_ok=True)
    tensors = {name: tensor.clone() for name, tensor in export.model.state_dict().items() if name not in gone}
    save_file(tensors | added, folder / "model.safetensors")
    return type(export)(folder, export.model)


MLP, EXPERTS = "model.layers.1.mlp", "model.layers.2.mlp.experts"


@pytest.mark.parametrize(
    ("variant", "gone", "added"),
    [
        ("plt2", [f"{MLP}.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"], []),
        ("shared expert", [f"{EXPERTS}.4.up_proj.weight", f"{MLP}.shared_expert.gate_proj.weight"], []),
        ("plt2", [], ["model.layers.0.self_attn.o_proj.bias"]),
    ],
)
def test_a_tensor_that_was_not_read_ends_the_start(exports, tmp_path, variant, gone, added):
    """A missing or unknown tensor stops the start; vLLM would serve the folder, as it does not track linear layers."""
    damaged = write_without(exports(variant), tmp_path, gone, **{name: torch.zeros(64) for name in added})
    with pytest.raises(ValueError) as error:
        with engine(damaged):
            pass
    assert all(name in str(error.value) for name in [str(tmp_path), *gone, *added])


# Parameters of a model with one layer, with vLLM's names.
PARAMETERS = {
    name: torch.zeros(1)
    for name in (
        *("model.embed_tokens.weight", "l.0.self_attn.qkv_proj.weight", "l.0.self_attn.qkv_proj.weight_scale"),
        *("l.0.self_attn.qkv_proj.sort_indices", "l.0.mlp.experts.routed_experts.w13_weight_scale"),
        *("l.0.mlp.experts.routed_experts.w13_weight", "l.0.mlp.experts.routed_experts.w2_weight"),
    )
}
ATTENTION, EXPERT = "l.0.self_attn", "l.0.mlp.experts"
FILES = [
    "model.embed_tokens.weight",
    *(f"{ATTENTION}.{part}.{kind}" for part in ("q_proj", "k_proj", "v_proj") for kind in ("weight", "weight_scale")),
    *(f"{EXPERT}.{index}.{part}.weight" for index in (0, 1) for part in ("gate_proj", "up_proj", "down_proj")),
    *(f"{EXPERT}.{index}.{part}.weight_scale" for index in (0, 1) for part in ("gate_proj", "up_proj")),
]


@pytest.mark.parametrize("name", FILES)
def test_each_part_of_quantized_weights_must_be_read(name):
    assert name in missing(FILES, [name])


def test_what_need_not_be_read():
    """Accepted as missing: scales that the method creates, other ranks' experts, all tensors if none was read."""
    assert missing(FILES) is None
    assert missing([name for name in FILES if not name.endswith("_scale")]) is None
    second = [name for name in FILES if f"{EXPERT}.1." in name]
    assert second[0] in missing(FILES, second[:1], all_experts=False)
    assert missing(FILES, second, all_experts=False) is None
    assert missing([]) is None


def missing(files, gone=(), **options):
    """Return the error for a checkpoint with these names without those `gone`, or None."""
    from vllm_plt.model import PLTForCausalLM
    from vllm_plt.weights import ReadTensors

    stacked = {part: whole for part, (whole, _) in PLTForCausalLM.hf_to_vllm_mapper.orig_to_new_stacked.items()}
    read = ReadTensors(PARAMETERS.items(), stacked, 2, quantized=True, **options)
    for _ in read.recorded((name, None) for name in files if name not in gone):
        pass
    try:
        read.check("folder")
    except ValueError as error:
        return str(error)
    return None


def test_one_loop_has_no_use_for_gates(exports, tmp_path):
    """Gate weights are ignored if one loop is served, as is a second copy of a tied head."""
    export = exports("biases, tied")
    twice = write_without(export, tmp_path)
    with engine(twice, additional_config={"plt": {"loop_count": 1}}) as llm:
        assert_same(export, llm, prompts(4), 8, loop_count=1)


def linears(model):
    return [(name, module) for name, module in model.named_modules() if name.endswith("_proj")]


def write_int8(export, folder) -> None:
    """Write the export with int8 weights (a scale per row) and per-token activation quantization in its layers."""
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


def test_transformers_loads_an_adapter_over_its_base(exports, tmp_path):
    """The modeling file's check of tensors accepts an adapter's, which are not the model's."""
    import peft
    from helpers import make_model

    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    base, tokens = exports("plt2").folder, torch.tensor(prompts(1)[:1])
    targets = ["q_proj", "up_proj"]
    adapted = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=targets, init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(tmp_path)
    loaded = PLTForCausalLM.from_pretrained(base, dtype=torch.float32)
    for model in (peft.PeftModel.from_pretrained(loaded, tmp_path), PLTForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            got, expected = (each.eval()(tokens, use_cache=False).logits for each in (model, adapted))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
