"""The first loop's K and V: the gradients of later loops come back exactly once, in every order of events."""

from __future__ import annotations

import pytest
import torch

from plt_megatron.model.loop_context import FirstLoopKV


def _first_loop(x: torch.Tensor, box: FirstLoopKV, layer: int = 1) -> torch.Tensor:
    """Stands for a layer's first loop: K = 2x, V = x^2, its own output K * V."""
    key, value = box.publish(layer, 2 * x, x * x)
    return (key * value).sum()


def _later_loop(y: torch.Tensor, box: FirstLoopKV, layer: int = 1) -> torch.Tensor:
    key, value = box.read(layer)
    return (y * key).sum() + (value * value * y).sum()


def _whole(x: torch.Tensor, ys: list[torch.Tensor]) -> torch.Tensor:
    key, value = 2 * x, x * x
    loss = (key * value).sum()
    for y in ys:
        loss = loss + (y * key).sum() + (value * value * y).sum()
    return loss


def _inputs() -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    return draws[0], draws[1:]


@pytest.mark.parametrize("loops", [1, 2, 3])
def test_gradients_equal_those_of_one_graph(loops):
    x, ys = _inputs()
    expected = torch.autograd.grad(_whole(x, ys[: loops - 1]), [x, *ys[: loops - 1]])
    box = FirstLoopKV()
    outputs = [_first_loop(x, box), *(_later_loop(y, box) for y in ys[: loops - 1])]
    for output in reversed(outputs):  # the last loop's backward is the first
        output.backward()
    for tensor, gradient in zip([x, *ys], expected, strict=False):
        torch.testing.assert_close(tensor.grad, gradient)


def test_a_later_loop_does_not_hold_the_first_loops_graph():
    x, (y, _) = _inputs()
    box = FirstLoopKV()
    _first_loop(x, box)
    _later_loop(y, box).backward()
    assert x.grad is None and y.grad is not None
    assert all(tensor.is_leaf for tensor in box.read(1))


def test_publishing_again_for_recomputation_keeps_the_leaves_and_their_gradients():
    x, (y, _) = _inputs()
    expected = torch.autograd.grad(_whole(x, [y]), [x, y])
    box = FirstLoopKV()
    with torch.no_grad():  # as a checkpointed layer's forward runs
        _first_loop(x, box)
    leaves = box.read(1)
    _later_loop(y, box).backward()
    output = _first_loop(x, box)  # recomputed in backward
    assert all(one is other for one, other in zip(leaves, box.read(1), strict=True))
    output.backward()
    torch.testing.assert_close([x.grad, y.grad], list(expected))


def test_a_gradient_is_delivered_once():
    x, (y, _) = _inputs()
    box = FirstLoopKV()
    outputs = _first_loop(x, box), _later_loop(y, box)
    outputs[1].backward()
    outputs[0].backward(retain_graph=True)
    first = x.grad.clone()
    outputs[0].backward()
    own = torch.autograd.grad(_whole(x, []), x)[0]
    torch.testing.assert_close(x.grad - first, own)


def test_layers_do_not_mix():
    x, (y, _) = _inputs()
    box = FirstLoopKV()
    outputs = [_first_loop(x, box, 1), _first_loop(3 * x, box, 2)]
    _later_loop(y, box, 2).backward()
    outputs[0].backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(_whole(x, []), x)[0])


def test_reading_what_was_not_published_is_an_error():
    with pytest.raises(KeyError):
        FirstLoopKV().read(3)
