"""The layer stack as units of torch.compile: one for each loop, and one for the rows of a decode step.

vLLM drops dynamo's guards and names compiled files after the class's forward. What differs in control flow, as the loop
does, therefore needs a class with a code object of its own; a shared one would run another loop's code, silently.
"""

from types import FunctionType

import torch
from torch import nn

from vllm_plt.vllm_internals import VllmConfig, set_model_tag, support_torch_compile


class Stack:
    """The layers and the final norm, which belong to the model: not a module, so that they are not registered twice."""

    def __init__(self, layers: nn.ModuleList, norm: nn.Module, norm_between_loops: bool):
        self.layers = tuple(layers)
        self.norm = norm
        self.norm_between_loops = norm_between_loops


def _loop_forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """h(l) [T, d] of loop `self.loop` from its input [T, d]; normed if it is the last or all are."""
    residual = None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, self.loop)
    if self.is_last or self.stack.norm_between_loops:
        return self.stack.norm(hidden_states, residual)[0]
    return hidden_states + residual


def _rows_forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """h(1..L-1) [L - 1, T, d] and the normed h(L) [T, d] from the loops' inputs [L, T, d] at positions [T]."""
    loops, tokens, size = hidden_states.shape
    positions = positions.repeat(loops)
    hidden_states, residual = hidden_states.reshape(loops * tokens, size), None
    for layer in self.stack.layers:
        hidden_states, residual = layer(positions, hidden_states, residual, None)
    states = hidden_states + residual
    if self.stack.norm_between_loops:
        states = self.stack.norm(states)
    states = states.view(loops, tokens, size)
    last = states[-1]
    return states[:-1], last if self.stack.norm_between_loops else self.stack.norm(last)


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
    dims = {"positions": 0, "hidden_states": 0}
    return _pass(f"PLTLoop{loop}", _loop_forward, dims, vllm_config, stack=stack, loop=loop, is_last=is_last)


def rows_pass(stack: Stack, vllm_config: VllmConfig) -> nn.Module:
    """All loops over T tokens at once."""
    return _pass("PLTRows", _rows_forward, {"positions": 0, "hidden_states": 1}, vllm_config, stack=stack)
