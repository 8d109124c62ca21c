"""The layers as units of torch.compile: those before the loops, each loop, those after, and the rows of a decode step.

vLLM drops dynamo's guards and names compiled files after the class's forward. What differs in control flow, as the loop
does, therefore needs a class with a code object of its own; a shared one would run another loop's code, silently.
"""

from collections.abc import Iterable
from types import FunctionType

import torch
from torch import nn

from vllm_plt.key_shift import KeyCarry
from vllm_plt.pass_state import FirstKeys, PassState
from vllm_plt.vllm_internals import VllmConfig, set_model_tag, support_torch_compile


class Stack:
    """Layers and the final norm, which belong to the model: not a module, so that they are not registered twice."""

    def __init__(self, layers: Iterable[nn.Module], norm: nn.Module):
        self.layers = tuple(layers)
        self.norm = norm


def _loop_forward(
    self,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    carried: torch.Tensor | None,
    starts: torch.Tensor | None,
    first_keys: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The output [T, d] of loop `self.loop` from its input [T, d], normed if `self.is_normed`; what keys hand on; keys.

    `KeyCarry` says what carried, starts and the second are; None where this loop's keys are not shifted. Loop 1 returns
    its keys if `self.keeps_keys`, and later loops get them as first_keys (`FirstKeys`).
    """
    state = PassState(self.loop, None if carried is None else KeyCarry(carried, starts))
    if self.keeps_keys or first_keys is not None:
        state.first = FirstKeys(first_keys)
    residual = None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, state)
    if self.is_normed:
        states = self.stack.norm(hidden_states, residual)[0]
    else:
        states = hidden_states + residual
    handed_on = None if carried is None else state.shifted.handed_on()
    return states, handed_on, state.first.kept() if self.keeps_keys else None


def _rows_forward(
    self, positions: torch.Tensor, hidden_states: torch.Tensor, carried: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """h(1..L-1) [L - 1, T, d], h(L) [T, d] and what keys hand on, from the loops' inputs [L, T, d] at positions [T] and
    what keys take, or None (see `KeyCarry`). `self.are_normed` and `self.is_normed` say which of the former are."""
    loops, tokens, size = hidden_states.shape
    state = PassState(None, None if carried is None else KeyCarry(carried, None))
    positions = positions.repeat(loops)
    hidden_states, residual = hidden_states.reshape(loops * tokens, size), None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, state)
    states = hidden_states + residual
    earlier, last = states.split([(loops - 1) * tokens, tokens])
    if self.are_normed:
        earlier = self.stack.norm(earlier)
    if self.is_normed:
        last = self.stack.norm(last)
    return earlier.view(loops - 1, tokens, size), last, None if carried is None else state.shifted.handed_on()


def _pass(name: str, function: FunctionType, dims: dict[str, int], vllm_config: VllmConfig, **attributes) -> nn.Module:
    """An instance of a class of this name whose forward is a copy of `function`, compiled by vLLM."""
    code = function.__code__.replace(co_name=name, co_qualname=f"{name}.forward")
    forward = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    forward.__annotations__ = function.__annotations__

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        for key, value in attributes.items():
            setattr(self, key, value)

    kind = type(name, (nn.Module,), {"__init__": __init__, "forward": forward, "__module__": __name__})
    with set_model_tag(name):
        return support_torch_compile(kind, dynamic_arg_dims=dims)(vllm_config=vllm_config)


def layers_pass(
    name: str, stack: Stack, loop: int, vllm_config: VllmConfig, *, is_normed: bool, keeps_keys: bool = False
) -> nn.Module:
    """Layers over T tokens of loop `loop`, from 0."""
    dims = {"positions": 0, "hidden_states": 0, "carried": 0, "starts": 0, "first_keys": 0}
    attributes = {"stack": stack, "loop": loop, "is_normed": is_normed, "keeps_keys": keeps_keys}
    return _pass(name, _loop_forward, dims, vllm_config, **attributes)


def rows_pass(stack: Stack, vllm_config: VllmConfig, *, are_normed: bool, is_normed: bool) -> nn.Module:
    """All loops over T tokens at once."""
    dims = {"positions": 0, "hidden_states": 1, "carried": 1}
    attributes = {"stack": stack, "are_normed": are_normed, "is_normed": is_normed}
    return _pass("PLTRows", _rows_forward, dims, vllm_config, **attributes)
