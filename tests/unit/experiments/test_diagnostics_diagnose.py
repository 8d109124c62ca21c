"""What is measured on whole models: against the equations' reference, attention that the model itself reports, and
models whose weights make the answer known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plt_megatron.data.datasets import make_sample
from plt_megatron.experiments.diagnostics.diagnose import diagnose, measure_sequence, measures_for, record
from plt_megatron.experiments.diagnostics.inputs import HeldOut
from plt_megatron.experiments.diagnostics.report import make_figures
from tests.hf.reference import Reference
from tests.hf.tiny import ABLATIONS, VARIANTS, make_model, make_tokens

# What loops read and attend to; the layers' other parts are the model's own, through which hooks see nothing else.
DIFFERENT = ("loopcoder", "iquest", "shared_no_clp", "own_values", "learned_scale", "injected")
EVERY = ABLATIONS | {name: how for name, how in VARIANTS.items() if name in DIFFERENT or name.startswith("last_loop")}
WINDOWED = {name for name in EVERY if name.startswith("last_loop")}  # in the loops before the last

pytestmark = pytest.mark.usefixtures("one_thread")


def looped(name: str, **changes):
    return make_model(**{"loop_count": 3, **EVERY[name], **changes})


def silenced(**changes):
    """A model whose layers add nothing: f(x) = x."""
    model = make_model(loop_count=3, **changes)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    return model


# ---------------------------------------------------------------- against the equations


@pytest.mark.parametrize("name", EVERY)
def test_states_are_those_of_the_equations(name):
    model, tokens = looped(name), make_tokens(19)
    recording = record(model, tokens)
    _, states = Reference(model.config, model.state_dict()).logits(tokens)
    assert len(recording.states) == model.config.loop_count + 1 == len(states) + 1
    torch.testing.assert_close(recording.states[0], model.model.embed_tokens(tokens))
    for loop, state in enumerate(states, start=1):
        torch.testing.assert_close(recording.states[loop].double(), state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_the_lens_of_loop_r_is_the_loss_of_r_loops(name):
    """Validation loss of the same weights at every loop count, by the equations run with so many loops; not where only
    the last of those attends to the whole context."""
    model, tokens = looped(name), make_tokens(24)
    found = measure_sequence(model, tokens)["lens_loss"]
    count = model.config.loop_count
    for loops in range(1, count + 1):
        logits, _ = Reference(model.config, model.state_dict(), loops).logits(tokens[:-1])
        equal = found[loops] == pytest.approx(float(F.cross_entropy(logits, tokens[1:])), rel=1e-5)
        assert equal == (name not in WINDOWED or loops == count), loops


@pytest.mark.parametrize("name", EVERY)
def test_the_stack_applied_by_hand_is_the_next_loop(name):
    """One loop of a model's own: the input of loop r + 1 through `apply_stack` gives h(r + 1) for r >= 1; or of the
    last, which alone has the last loop's rules."""
    model, tokens = looped(name), make_tokens(17)
    recording = record(model, tokens)
    for loop in range(model.config.loop_count - 1 if name in WINDOWED else 1, model.config.loop_count):
        again = recording.apply_stack(recording.next_input(recording.states[loop]))
        torch.testing.assert_close(again, recording.states[loop + 1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["plt", "clp", "naive", "loopcoder", "clp_shared"])
def test_attention_is_what_the_model_reports(name):
    """Entropies and divergences from the weights that eager attention returns, layer by layer in each loop."""
    model = looped(name, attn_implementation="eager")
    tokens = make_tokens(15)
    recording = record(model, tokens)
    with torch.no_grad():
        reported = model(tokens[None], use_cache=False, output_attentions=True).attentions
    layers, loops = model.config.num_hidden_layers, model.config.loop_count
    assert len(reported) == layers * loops
    before = None
    for loop in range(1, loops + 1):
        p = torch.stack([each[0].double() for each in reported[(loop - 1) * layers : loop * layers]])
        entropy = torch.special.entr(p).sum(-1).mean(-1)
        np.testing.assert_allclose(recording.details["entropy_global"][loop], entropy, rtol=1e-4, atol=1e-5)
        if before is not None:
            terms = torch.where(p > 0, p * (p / before).log(), 0.0)
            divergence = terms.nan_to_num(0.0).sum(-1).mean(-1)
            np.testing.assert_allclose(recording.details["kl_global"][loop], divergence, rtol=1e-3, atol=1e-5)
        before = p
    assert np.isnan(recording.details["kl_global"][:2]).all()


# ---------------------------------------------------------------- models with known answers


def test_layers_that_add_nothing_in_a_naive_loop():
    """h(r) = E for all r: no step, no change of attention or prediction, every state a fixed point."""
    model = silenced(cross_loop_parallel=False, share_kv=False, gated_window=False)
    found = measure_sequence(model, make_tokens(20))
    for name in ("step_size", "relative_step", "fixed_point_gap", "loop_map_gap"):
        np.testing.assert_array_equal(found[name][1:], 0.0)
    np.testing.assert_array_equal(found["lens_kl"][2:], 0.0)
    np.testing.assert_array_equal(found["kl_global"][2:], 0.0)
    assert np.isnan(found["update_cosine"]).all()
    assert len(set(found["lens_loss"][1:])) == 1 == len(set(found["effective_rank"]))


def test_layers_that_add_nothing_in_a_plt():
    """h(1) = E and h(2)_i = e_i + e_(i-1): the step is the mean norm of what is shifted in, the offset cost by hand."""
    model, tokens = silenced(), make_tokens(12)
    found = measure_sequence(model, tokens)
    e = model.model.embed_tokens(tokens[:-1]).detach().double()
    shifted = torch.cat([torch.zeros_like(e[:1]), e[:-1]])
    assert found["step_size"][1] == 0 == found["fixed_point_gap"][1]
    assert found["step_size"][2] == pytest.approx(float(shifted.norm(dim=1).mean()), rel=1e-5)
    assert found["offset_cost"][2] == pytest.approx(float((e[1:] - e[:-1]).norm(dim=1).mean()), rel=1e-5)
    assert found["loop_map_gap"][1] == pytest.approx(found["step_size"][2], rel=1e-6)
    # h(3) = E + shift(E) + shift(shift(E)), h(4) one more: the last loop's map goes one shift further.
    thrice = torch.cat([torch.zeros_like(e[:3]), e[:-3]])
    assert found["loop_map_gap"][3] == pytest.approx(float(thrice.norm(dim=1).mean()), rel=1e-5)


@pytest.mark.parametrize("bias", [0.0, 2.0])
def test_gates_that_are_known(bias):
    model = make_model(loop_count=3)
    for layer in model.model.layers:
        layer.self_attn.plt_gate.weight.data.zero_()
        layer.self_attn.plt_gate.bias.data = torch.full((4,), bias) * torch.tensor([0.0, 1.0, -1.0, 2.0])
    found = measure_sequence(model, make_tokens(9))["gate_mean"]
    expected = [1 / (1 + math.exp(-bias * factor)) for factor in (0, 1, -1, 2)]
    np.testing.assert_allclose(found[2:], np.broadcast_to(expected, (2, 2, 4)), rtol=1e-6)
    assert np.isnan(found[:2]).all(), "the first loop has no gate"


def test_gates_of_tanh_are_drawn_from_minus_one():
    """Zero, where they begin, is in the middle of the colours, as one half is for a sigmoid's."""
    held_out = HeldOut(np.stack([make_tokens(9).numpy()] * 2), np.zeros((2, 9), dtype=bool), 2, 1)
    limits = {}
    for activation in ("sigmoid", "tanh"):
        model = make_model(gate_activation=activation)
        for layer in model.model.layers:
            layer.self_attn.plt_gate.weight.data.zero_()
            layer.self_attn.plt_gate.bias.data.fill_(-1.0)
        diagnosis = diagnose(model, held_out)
        expected = math.tanh(-1) if activation == "tanh" else 1 / (1 + math.e)
        np.testing.assert_allclose(diagnosis.loops["gate_mean"].mean[2], expected, rtol=1e-5)
        gates = next(made for made in make_figures(diagnosis) if made.name == "gates")
        limits[gates.caption] = gates.figure.axes[0].collections[0].get_clim()
    (half, to_half), (zero, to_zero) = limits.items()
    assert (
        "0.5, its initial value" in half and to_half == (0, 1) and "0, its initial value" in zero and to_zero == (-1, 1)
    )


@pytest.mark.parametrize(("name", "whole", "local"), [("plt", [1, 2, 3], [2, 3]), ("last_loop", [3], [1, 2])])
def test_attention_without_queries_is_uniform(name, whole, local):
    """Entropy log n over all keys, and of the window log min(n, w)."""
    model = looped(name)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    found = measure_sequence(model, make_tokens(31))
    everything = np.mean([math.log(i + 1) for i in range(30)])
    window = np.mean([math.log(min(i + 1, 5)) for i in range(30)])
    for kind, loops, entropy in (("global", whole, everything), ("local", local, window)):
        others = [loop for loop in range(4) if loop not in loops]
        np.testing.assert_allclose(found[f"entropy_{kind}"][loops], entropy, rtol=1e-5)
        assert np.isnan(found[f"entropy_{kind}"][others]).all()
        np.testing.assert_allclose(found[f"kl_{kind}"][loops[1:]], 0.0, atol=1e-6)
        assert np.isnan(found[f"kl_{kind}"][[*others, loops[0]]]).all()


def test_windows_as_long_as_the_text_are_attention_to_all_tokens():
    """Of loops before the last, which are measured as windows."""
    tokens = make_tokens(20)
    every, last = (record(looped(name, window_size=20), tokens).details for name in ("clp", "last_loop"))
    for measure in ("entropy", "kl"):
        np.testing.assert_allclose(last[f"{measure}_local"][:3], every[f"{measure}_global"][:3], rtol=1e-4)
    np.testing.assert_allclose(last["entropy_global"][3], every["entropy_global"][3], rtol=1e-4)


def test_copied_heads_are_one():
    model = make_model(loop_count=2, num_key_value_heads=1)
    for layer in model.model.layers:
        attention = layer.self_attn
        query = attention.q_proj.weight.data
        query.copy_(query[:16].repeat(4, 1))
        gate = attention.plt_gate
        gate.weight.data.copy_(gate.weight.data[:1].repeat(4, 1))
        gate.bias.data.fill_(0.3)
    found = measure_sequence(model, make_tokens(20))
    np.testing.assert_allclose(found["head_rank"][1:], 1.0, atol=1e-3)
    np.testing.assert_allclose(found["head_cosine"][1:], 1.0, atol=1e-5)


# ---------------------------------------------------------------- documents, and many sequences


@pytest.mark.parametrize("name", ["plt", "loopcoder", "naive"])
def test_packed_documents_are_measured_as_if_alone(name):
    model = looped(name)
    first, second = make_tokens(9, seed=3), make_tokens(14, seed=4)
    starts = torch.zeros(23, dtype=torch.bool)
    starts[[0, 9]] = True
    packed = record(model, torch.cat([first, second]), starts)
    for loop in range(model.config.loop_count + 1):
        alone = torch.cat([record(model, document).states[loop] for document in (first, second)])
        torch.testing.assert_close(packed.states[loop], alone, rtol=1e-4, atol=1e-4)
    alone = [record(model, document) for document in (first, second)]
    for measure in ("entropy_global", "kl_global"):
        expected = (9 * alone[0].details[measure] + 14 * alone[1].details[measure]) / 23
        np.testing.assert_allclose(packed.details[measure], expected, rtol=1e-3, atol=1e-5)


def test_labels_of_other_documents_do_not_count():
    model, tokens = looped("plt"), make_tokens(24)
    starts = torch.zeros(24, dtype=torch.bool)
    starts[[0, 10]] = True
    found = measure_sequence(model, tokens, starts)
    parts = [measure_sequence(model, part) for part in (tokens[:10], tokens[10:])]
    expected = (9 * parts[0]["lens_loss"] + 13 * parts[1]["lens_loss"]) / 22
    np.testing.assert_allclose(found["lens_loss"], expected, rtol=1e-5)


def test_losses_are_of_the_tokens_that_a_mask_counts():
    """A mask says more than the token that ends documents, which may end each message of a conversation."""
    model, tokens = looped("plt"), make_tokens(24)
    mask = torch.arange(24) // 3 % 2 == 0
    found = measure_sequence(model, tokens, masked_token=int(tokens[3]), mask=mask.to(torch.uint8))
    for loops in range(1, model.config.loop_count + 1):
        logits, _ = Reference(model.config, model.state_dict(), loops).logits(tokens[:-1])
        losses = F.cross_entropy(logits, tokens[1:], reduction="none")
        assert found["lens_loss"][loops] == pytest.approx(float(losses[mask[1:]].mean()), rel=1e-5)
    rows = np.stack([tokens.numpy()] * 2)
    held_out = HeldOut(rows, np.zeros(rows.shape, dtype=bool), 2, mask=np.stack([mask.numpy().astype(np.uint8)] * 2))
    assert diagnose(model, held_out).loops["lens_loss"].mean[1:] == pytest.approx(found["lens_loss"][1:], rel=1e-9)


def test_a_masked_token_leaves_out_what_training_leaves_out():
    """With a mask: the first token of each document, though the mask counts it."""
    model, tokens = looped("plt"), make_tokens(24)
    starts = np.arange(24) % 10 == 0
    sample = make_sample(tokens.numpy(), [10, 10, 4], reset=False, masked_token=3, counted=np.ones(24, np.uint8))
    assert sample["loss_mask"].sum() == 21
    seen = measure_sequence(model, tokens, mask=torch.cat((torch.ones(1), sample["loss_mask"])).to(torch.uint8))
    row = HeldOut(np.stack([tokens.numpy()] * 2), np.stack([starts] * 2), 2, mask=np.ones((2, 24), np.uint8))
    found = diagnose(model, row, masked_token=3).loops["lens_loss"].mean[1:]
    assert found == pytest.approx(seen["lens_loss"][1:], rel=1e-9)


def tokens_with_copies(seed):
    """From within every window and from beyond."""
    tokens = make_tokens(25, seed=seed).tolist()
    return [0, 0, 0, 0, *tokens, *tokens[:4]]


def test_a_diagnosis_is_the_mean_of_its_sequences():
    model = looped("plt")
    tokens = np.stack([tokens_with_copies(seed) for seed in range(4)])
    starts = np.zeros(tokens.shape, dtype=bool)
    steps = []
    found = diagnose(model, HeldOut(tokens, starts, 9), progress=lambda done, total: steps.append((done, total)))
    rows = [measure_sequence(model, torch.from_numpy(row)) for row in tokens]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)] and found.sequences == 4
    for measure in found.measures:
        values = np.stack([row[measure.name] for row in rows])
        assert np.isfinite(values[:, measure.first_loop :]).all(), measure.name
        assert np.isnan(values[:, : measure.first_loop]).all(), measure.name
        by_loop = values.reshape(4, 4, -1).mean(-1)
        np.testing.assert_allclose(found.loops[measure.name].mean, by_loop.mean(0), rtol=1e-9)
        if measure.detail is not None:
            np.testing.assert_allclose(found.details[measure.name].mean, values.mean(0), rtol=1e-9)
    assert found.details["gate_mean"].mean.shape == (4, 2, 4) and found.details["head_rank"].mean.shape == (4, 2)
    change = found.differences["effective_rank"].mean
    np.testing.assert_allclose(change[1:], np.diff(found.loops["effective_rank"].mean), rtol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_every_kind_of_model_has_its_measures(name):
    model = looped(name)
    tokens = np.stack([tokens_with_copies(seed) for seed in range(2)])
    found = diagnose(model, HeldOut(tokens, np.zeros(tokens.shape, dtype=bool), 2))
    count = model.config.loop_count
    for measure in found.measures:
        last = count - 1 if name in WINDOWED and measure.name.endswith("_local") else count
        known = np.isfinite(found.loops[measure.name].mean)
        assert measure.first_loop <= last, measure.name
        assert known.tolist() == [measure.first_loop <= loop <= last for loop in range(count + 1)], measure.name
    names = {measure.name for measure in found.measures}
    later = count > 1
    assert ("gate_mean" in names) == (model.config.gated_window and later)
    assert ("offset_cost" in names) == (model.config.cross_loop_parallel and later)
    assert ("entropy_local" in names) == (name in WINDOWED or (model.config.gated_window and later))
    assert ("kl_global" in names) == (later and name not in WINDOWED)
    assert found.windows_earlier_loops == (name in WINDOWED)


@pytest.mark.parametrize(("loops", "expected"), [(1, "entropy_global"), (2, "entropy_global entropy_local")])
def test_measures_of_few_loops_with_full_attention_in_the_last(loops, expected):
    config = looped("last_loop", loop_count=loops).config
    assert " ".join(each.name for each in measures_for(config) if each.of in ("global", "local")) == expected
    assert next(each.first_loop for each in measures_for(config) if each.of == "global") == loops
