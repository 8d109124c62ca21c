"""Training: loss, gradient checkpointing, Trainer, devices."""

import sys

import pytest
import torch
import torch.nn.functional as F

from plt_megatron.hf.modeling_plt import CACHE_NAME, PLTForCausalLM
from tests.hf.tiny import ALL, decode, full, make_model, make_tokens
from tests.running import run


def gradients(model, tokens, **kwargs):
    model.zero_grad()
    loss = model(tokens, labels=tokens, **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_is_the_last_loops_cross_entropy():
    model = make_model(loop_count=3)
    tokens = make_tokens(2, 12)
    labels = tokens.clone()
    labels[:, :4] = -100
    logits = full(model, tokens)
    want = F.cross_entropy(logits[:, 3:-1].flatten(0, 1), tokens[:, 4:].flatten())
    assert torch.allclose(model(tokens, labels=labels).loss, want)


def test_the_padding_token_is_trained():
    """Exports pad with the token that ends documents, which pretraining trains."""
    model = make_model(pad_token_id=3)
    tokens = torch.full((1, 6), 3)
    assert gradients(model, tokens)[1]["model.embed_tokens.weight"][3].abs().sum() > 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["vanilla", "loopcoder", "naive", "iquest", "clp_shared", "span", "last_loop"])
def test_gradient_checkpointing_changes_nothing(name, reentrant):
    """Gradients reach the first loop's keys and values through every later loop."""
    model = make_model(**{"loop_count": 3, **ALL[name]}).train()
    tokens = make_tokens(2, 13)
    loss, plain = gradients(model, tokens)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    again, checkpointed = gradients(model, tokens)
    assert torch.equal(loss, again)
    for gradient, other in zip(plain.values(), checkpointed.values(), strict=True):
        assert torch.allclose(gradient, other, atol=1e-7)
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())


@pytest.mark.parametrize("name", ["plt", "scales", "iquest", "last_loop"])
def test_eager_and_sdpa_gradients_agree(name):
    tokens = make_tokens(2, 40)
    results = [gradients(make_model(attn_implementation=a, **ALL[name]), tokens)[1] for a in ("sdpa", "eager")]
    for gradient, other in zip(*(r.values() for r in results), strict=True):
        assert torch.allclose(gradient, other, atol=1e-4 * float(other.abs().max()))


def test_no_future_token_and_no_other_document_gets_a_gradient():
    model = make_model(loop_count=3)
    embeds = model.get_input_embeddings()(make_tokens(1, 14)).detach().requires_grad_()
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    logits = model(inputs_embeds=embeds, position_ids=positions).logits
    (grad,) = torch.autograd.grad(logits[0, 10].sum(), embeds)
    reached = grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [False] * 6 + [True] * 5 + [False] * 3


def test_a_cache_is_for_inference():
    model = make_model()
    tokens = make_tokens(1, 8)
    assert model(tokens).get(CACHE_NAME) is None and model(tokens).logits.requires_grad
    for positions in (None, torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])):
        assert model.train()(tokens, position_ids=positions, use_cache=True).get(CACHE_NAME) is None
    out = model.eval()(tokens, use_cache=True)
    assert out[CACHE_NAME].get_seq_length() == 8 and not out.logits.requires_grad


def test_trainer_shifts_the_labels_that_it_smooths(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model, tokens = make_model(), make_tokens(2, 12)
    settings = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=0.1)
    minus_log = -full(model, tokens)[:, :-1].log_softmax(-1)
    want = 0.9 * minus_log.gather(-1, tokens[:, 1:, None]).mean() + 0.1 * minus_log.mean()
    assert torch.allclose(Trainer(model, settings).compute_loss(model, {"input_ids": tokens, "labels": tokens}), want)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model(loop_count=3).train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in make_tokens(8, 16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        max_steps=2,
        gradient_checkpointing=True,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        learning_rate=1e-2,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert trainer.evaluate()["eval_loss"] < 10
    predictions = trainer.predict(rows).predictions
    assert predictions.shape == (8, 16, 97)


@pytest.mark.parametrize("experts", [{}, {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}])
def test_device_map(experts, tmp_path):
    pytest.importorskip("accelerate")

    model = make_model(loop_count=3, **experts)
    model.save_pretrained(tmp_path / "model")
    tokens = make_tokens(2, 10)
    # Layers that live on disk pass through accelerate's hooks, as layers on other devices do.
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    mapped = PLTForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offload"),
    )
    assert all(parameter.device.type == "meta" for parameter in mapped.model.layers[1].parameters())
    assert torch.allclose(full(mapped, tokens), full(model, tokens), atol=1e-5)
    text = mapped.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(text, model.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0))


def test_device_map_of_two_gpus():
    """accelerate puts the final norm and the loops' input where the last layers are.

    In a process of its own: in the others of this suite, the CPU runtime turns CUDA devices into the CPU.
    """
    pytest.importorskip("accelerate")
    names = ("loopcoder", "learned_shift", "last_loop_shifted")
    calls = "; ".join(f"decode_on_two_gpus({name!r})" for name in names)
    run([sys.executable, "-c", f"from tests.hf.test_hf_training import decode_on_two_gpus; {calls}"])


def decode_on_two_gpus(name):
    from accelerate import infer_auto_device_map
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():  # tensors without data, on GPUs that need not be there
        model = make_model(**ALL[name], num_hidden_layers=3)
        size = sum(parameter.nbytes for parameter in model.parameters())
        memory = {0: size * 7 // 10, 1: 2 * size}
        devices = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
        assert (devices["model.layers.0"], devices["model.norm"], devices["model.loop_input"]) == (0, 1, 1)
        for part, device in devices.items():
            for module in model.get_submodule(part).modules():
                for tensors in (module._parameters, module._buffers):  # `to` cannot swap fake parameters
                    moved = {key: t.detach().to(f"cuda:{device}") for key, t in tensors.items() if t is not None}
                    tensors.update(moved)
            hook = AlignDevicesHook(execution_device=f"cuda:{device}", io_same_device=False)
            add_hook_to_module(model.get_submodule(part), hook, append=True)
        tokens = torch.zeros(2, 7, dtype=torch.long, device="cuda:0")
        cache = model.new_cache()
        cache.activate_past_recording()
        assert full(model, tokens).shape == decode(model, tokens, 6, cache).shape == (2, 7, 97)


@pytest.mark.parametrize(
    ("name", "attention"),
    [("loopcoder", "sdpa"), ("paper_norms", "eager"), ("olmo2", "sdpa"), ("learned_shift", "eager")]
    + [(name, attention) for name in ("learned_shift_normed", "last_loop_shifted") for attention in ("sdpa", "eager")],
)
def test_autocast(name, attention):
    learned = {**ALL["learned_shift"], "qk_norm": True}
    model = make_model(attn_implementation=attention, **{**ALL, "learned_shift_normed": learned}[name])
    tokens = make_tokens(2, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = gradients(model, tokens)
        cached = [decode(model, tokens, 12, cache) for cache in (model.new_cache(), model.new_cache(24))]
    want, plain = gradients(model, tokens)
    assert torch.isfinite(loss) and (loss - want).abs() < 0.1 * want
    assert all(torch.isfinite(gradient).all() for gradient in grads.values())
    for parameter in (name for name in plain if "plt_gate.weight" in name or "key_shift" in name):
        assert F.cosine_similarity(grads[parameter].flatten(), plain[parameter].flatten(), 0) > 0.9, parameter
    logits = full(model, tokens)
    assert all((found.float() - logits).abs().max() < 0.1 * logits.abs().max() for found in cached)
