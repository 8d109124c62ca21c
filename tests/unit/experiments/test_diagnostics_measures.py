"""Each measure against a closed form or a hand-made tensor."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from plt_megatron.experiments.diagnostics import measures


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- steps


def test_identical_states_make_no_step():
    state = random(7, 5)
    assert measures.mean_norm(state - state) == 0 == measures.relative_step(state, state)
    assert math.isnan(measures.update_cosine(state - state, state)), "a token that stays has no direction"


def test_step_size_is_the_mean_of_norms():
    assert measures.mean_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])) == 5.0
    assert math.isnan(measures.mean_norm(torch.empty(0, 2)))


def test_relative_step_leaves_out_states_of_zero():
    previous = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    state = torch.tensor([[1.0, 3.0], [0.0, 1.0], [9.0, 9.0]])
    assert measures.relative_step(state, previous) == pytest.approx((3 / 1 + 1 / 2) / 2)


@pytest.mark.parametrize(("factor", "cosine"), [(2.5, 1.0), (-0.5, -1.0)])
def test_updates_along_one_line(factor, cosine):
    update = random(9, 4)
    assert measures.update_cosine(factor * update, update) == pytest.approx(cosine)


def test_cosine_averages_tokens_and_skips_those_that_stay():
    first = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    second = torch.tensor([[0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    assert measures.update_cosine(first, second) == pytest.approx((0 + 1 + math.sqrt(0.5)) / 3)


def test_offset_cost():
    assert measures.offset_cost(torch.ones(6, 3)) == 0
    ramp = torch.arange(6.0)[:, None] * torch.tensor([3.0, 4.0])  # every token 5 away from the one before
    assert measures.offset_cost(ramp) == pytest.approx(5)
    assert math.isnan(measures.offset_cost(torch.ones(1, 3))), "no token has one before it"


def test_offset_cost_does_not_cross_documents():
    state = torch.tensor([[0.0], [1.0], [100.0], [103.0]])
    starts = torch.tensor([True, False, True, False])
    assert measures.offset_cost(state, starts) == pytest.approx((1 + 3) / 2)


# ---------------------------------------------------------------- ranks


@pytest.mark.parametrize("directions", [1, 2, 5, 16])
def test_equally_many_tokens_along_orthogonal_directions(directions):
    states = torch.eye(16)[:directions].repeat(3, 1)
    assert measures.effective_rank(states) == pytest.approx(directions, abs=1e-4)


@pytest.mark.parametrize("shape", [(40, 12), (12, 40)], ids=["tall", "wide"])
def test_effective_rank_by_its_definition(shape):
    states = random(*shape)
    rows = states / states.pow(2).mean(1, keepdim=True).sqrt()
    p = np.linalg.svd(rows.numpy(), compute_uv=False)
    p = p / p.sum()
    assert measures.effective_rank(states) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    rotation = torch.linalg.qr(random(shape[1], shape[1], seed=2)).Q
    scales = random(shape[0], 1, seed=3).exp()
    assert measures.effective_rank(scales * states @ rotation) == pytest.approx(measures.effective_rank(states))


def test_states_of_zero_have_no_rank():
    assert math.isnan(measures.effective_rank(torch.zeros(4, 3)))


def test_heads_that_say_the_same():
    outputs = random(20, 1, 8).expand(20, 6, 8)
    rank, cosine = measures.head_diversity(outputs)
    assert rank == pytest.approx(1, abs=1e-4) and cosine == pytest.approx(1)


def test_orthogonal_heads():
    outputs = torch.eye(5).expand(20, 5, 5) * random(20, 5, 1).abs()
    rank, cosine = measures.head_diversity(outputs)
    assert rank == pytest.approx(5) and cosine == pytest.approx(0, abs=1e-12)


def test_opposite_heads_and_a_single_one():
    head = random(20, 1, 8)
    rank, cosine = measures.head_diversity(torch.cat([head, -head], 1))
    assert rank == pytest.approx(1, abs=1e-4) and cosine == pytest.approx(-1)
    rank, cosine = measures.head_diversity(head)
    assert rank == pytest.approx(1, abs=1e-4) and math.isnan(cosine)


# ---------------------------------------------------------------- the logit lens


def lens(logits, labels, counted=None):
    """Of logits [L, T, V]: the states are the logits themselves."""
    states = [torch.zeros_like(torch.as_tensor(logits[0])), *map(torch.as_tensor, logits)]
    counted = torch.ones(len(labels), dtype=torch.bool) if counted is None else torch.tensor(counted)
    return measures.lens_statistics(states, torch.tensor(labels), counted, lambda state: state)


def test_a_uniform_prediction():
    found = lens(np.zeros((1, 4, 32)), [0, 5, 9, 31])
    assert found["lens_loss"][1] == pytest.approx(math.log(32)) == found["lens_entropy"][1]
    assert math.isnan(found["lens_kl"][1]) and math.isnan(found["lens_loss"][0])


def test_a_certain_prediction():
    logits = np.full((1, 2, 8), -1000.0)
    logits[0, 0, 3] = logits[0, 1, 6] = 0.0
    found = lens(logits, [3, 6])
    assert found["lens_loss"][1] == found["lens_entropy"][1] == 0 and found["lens_rank"][1] == 1


def test_the_place_of_the_truth():
    logits = np.array([[[5.0, 3.0, 4.0, 1.0], [5.0, 3.0, 4.0, 1.0]]])
    assert lens(logits, [2, 3])["lens_rank"][1] == (2 + 4) / 2


def test_losses_of_groups_are_those_of_their_tokens_that_count():
    logits = random(2, 6, 9).numpy()
    labels, counted = torch.tensor([3, 1, 4, 1, 5, 2]), torch.tensor([True, True, False, True, True, True])
    groups = {"some": torch.tensor([False, True, True, False, False, True]), "none": torch.zeros(6, dtype=torch.bool)}
    states = [torch.zeros(6, 9), *torch.as_tensor(logits)]
    found = measures.lens_statistics(states, labels, counted, lambda state: state, groups)
    for loop in (1, 2):
        expected = torch.nn.functional.cross_entropy(states[loop][[1, 5]], labels[[1, 5]])
        assert found["some"][loop] == pytest.approx(float(expected), rel=1e-5)
    assert math.isnan(found["some"][0]) and np.isnan(found["none"]).all()
    np.testing.assert_array_equal(found["lens_loss"], lens(logits, labels.tolist(), counted.tolist())["lens_loss"])


def test_what_can_be_copied_and_from_how_far():
    #         0  1  2  3  4  5  6  7  8  9 10 11
    tokens = [7, 1, 2, 3, 9, 1, 2, 3, 1, 2, 4, 3]
    # After the second (1, 2), at place 6, 3 follows again, four places on; the third is followed by another token.
    expected = [0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0]
    assert measures.copy_distances(torch.tensor(tokens)).tolist() == expected
    repeated = torch.arange(10).repeat(3)
    assert measures.copy_distances(repeated).tolist() == [0] * 11 + [10] * 18


def test_nothing_is_copied_from_another_document():
    tokens = torch.arange(10).repeat(3)
    starts = torch.zeros(30, dtype=torch.bool)
    starts[[0, 20]] = True
    # The last token of the first document still has its label, which is not counted: another document's first token.
    assert measures.copy_distances(tokens, starts).tolist() == [0] * 11 + [10] * 9 + [0] * 9


def test_divergence_and_peaks_of_known_distributions():
    p = np.log([[[0.5, 0.25, 0.25]] * 2, [[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]], [[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]])
    found = lens(p, [0, 1])
    moved = 0.25 * math.log(0.25 / 0.5) + 0.5 * math.log(0.5 / 0.25)
    last = 2 * 0.1 * math.log(0.1 / 0.5) / 2 + 0.8 * math.log(0.8 / 0.25) + 0.1 * math.log(0.1 / 0.25)
    assert found["lens_kl"][2] == pytest.approx(moved / 2, rel=1e-6)
    assert found["lens_kl"][3] == pytest.approx(last / 2, rel=1e-6)
    np.testing.assert_allclose(found["peak_loop"], [math.nan, math.nan, 0.5, 0.5])
    np.testing.assert_allclose(found["lens_loss"][1:], [(math.log(2) + math.log(4)) / 2, math.log(4),
                                                       (math.log(4) - math.log(0.8)) / 2], rtol=1e-6)  # fmt: skip


def test_tokens_that_do_not_count_change_nothing():
    logits = random(2, 6, 9).numpy()
    counted = [True, False, True, True, False, True]
    kept = [index for index, each in enumerate(counted) if each]
    labels = [3, 1, 4, 1, 5, 2]
    whole, part = lens(logits, labels, counted), lens(logits[:, kept], [labels[index] for index in kept])
    for name, values in part.items():
        np.testing.assert_allclose(whole[name], values, rtol=1e-9)
    assert all(np.isnan(values).all() for values in lens(logits, labels, [False] * 6).values())


def test_parts_of_the_tokens_add_up(monkeypatch):
    logits, labels = random(3, 11, 7).numpy(), [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]
    whole = lens(logits, labels)
    monkeypatch.setattr(measures, "BLOCK_ELEMENTS", 3 * 7)
    for name, values in lens(logits, labels).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-9)
