"""The layer stack as units of torch.compile: one for each loop, and one for the rows of a decode step.

vLLM drops dynamo's guards and names compiled files after the class's forward. What differs in control flow, as the loop
does, therefore needs a class with a code object of its own; a shared one would run another loop's code, silently.
"""

from types import FunctionType

import torch
from torch import nn

from vllm_plt.key_shift import KeyCarry
from vllm_plt.vllm_internals import VllmConfig, set_model_tag, support_torch_compile


class Stack:
    """The layers and the final norm, which belong to the model: not a module, so that they are not registered twice."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, norm_between_loops: bool):
        self.layers = tuple(layers)
        self.norm = norm
        self.norm_between_loops = norm_between_loops


def _loop_forward(
    self,
    positions: torch.Tensor,
    hidden_states: torch.Tensor,
    carried: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h(l) [T, d] of loop `self.loop` from its input [T, d], normed if it is the last or all are; what keys hand on.

    `KeyCarry` says what carried, starts and the latter are; None where this loop's keys are not shifted.
    """
    carry = None if carried is None else KeyCarry(carried, starts)
    residual = None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, self.loop, carry)
    if self.is_last or self.stack.norm_between_loops:
        states = self.stack.norm(hidden_states, residual)[0]
    else:
        states = hidden_states + residual
    return states, None if carry is None else carry.handed_on()


def _rows_forward(
    self, positions: torch.Tensor, hidden_states: torch.Tensor, carried: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """h(1..L-1) [L - 1, T, d], the normed h(L) [T, d] and what keys hand on, from the loops' inputs [L, T, d] at
    positions [T] and what keys take, or None (see `KeyCarry`)."""
    loops, tokens, size = hidden_states.shape
    carry = None if carried is None else KeyCarry(carried, None)
    positions = positions.repeat(loops)
    hidden_states, residual = hidden_states.reshape(loops * tokens, size), None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, None, carry)
    states = hidden_states + residual
    if self.stack.norm_between_loops:
        states = self.stack.norm(states)
    states = states.view(loops, tokens, size)
    last = states[-1]
    if not self.stack.norm_between_loops:
        last = self.stack.norm(last)
    return states[:-1], last, None if carry is None else carry.handed_on()


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


def loop_pass(stack: Stack, loop: int, is_last: bool, vllm_config: VllmConfig) -> nn.Module:
    """Loop `loop`, from 0, over T tokens."""
    dims = {"positions": 0, "hidden_states": 0, "carried": 0, "starts": 0}
    return _pass(f"PLTLoop{loop}", _loop_forward, dims, vllm_config, stack=stack, loop=loop, is_last=is_last)


def rows_pass(stack: Stack, vllm_config: VllmConfig) -> nn.Module:
    """All loops over T tokens at once."""
    dims = {"positions": 0, "hidden_states": 1, "carried": 1}
    return _pass("PLTRows", _rows_forward, dims, vllm_config, stack=stack)
