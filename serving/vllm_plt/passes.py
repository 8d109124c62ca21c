"""Units of torch.compile: the prelude, each loop, the coda, and the rows of a decode step.

vLLM drops dynamo's guards and names compiled files after the class's forward. Passes that differ in control flow, as
loops do, therefore need a class with its own code object; a shared one would silently run another loop's code.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType

import torch
from torch import nn

from vllm_plt.key_shift import KeyCarry
from vllm_plt.vllm_internals import VllmConfig, set_model_tag, support_torch_compile


class FirstKeys:
    """Loop 1's keys of a step's tokens, to which later loops attend with their own values.

    Args:
        given: [T, layers, K * D], the keys of all layers, for a later loop's pass; None for loop 1's, which records its
            own.
    """

    def __init__(self, given: torch.Tensor | None):
        self.given = given
        self.layers = 0
        self._kept: list[torch.Tensor] = []

    def keep(self, key: torch.Tensor) -> None:
        """Record the next layer's key [T, K * D], as a copy that does not keep the whole projection output alive."""
        self._kept.append(key.clone())

    def take(self) -> torch.Tensor:
        """Return the next layer's key, [T, K * D]."""
        self.layers += 1
        return self.given[:, self.layers - 1]

    def kept(self) -> torch.Tensor:
        return torch.stack(self._kept, 1)


@dataclass
class PassState:
    """State of one pass through some layers.

    Attributes:
        loop: the loop of all rows, from 0; None if the rows are loops 1..L of N / L tokens, one loop after the other.
        shifted: carry of the shifted keys; None if keys are not shifted.
        first: loop 1's keys; None if later loops' passes do not need them.
    """

    loop: int | None
    shifted: KeyCarry | None
    first: FirstKeys | None = None


class Stack:
    """Layers and the final norm. Not a module: the model owns them, and they must not be registered twice."""

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
    """Run loop `self.loop` on hidden_states [T, d].

    Args:
        carried, starts: see `KeyCarry`; None if this loop's keys are not shifted.
        first_keys: see `FirstKeys`; loop 1's keys, for later loops that attend to them with their own values.

    Returns:
        The output [T, d], normed if `self.is_normed`; what the keys hand on (`KeyCarry`), or None; this loop's keys if
        `self.keeps_keys`, else None.
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
    """Run all loops at once on their inputs [L, T, d] at positions [T]; for `carried`, see `KeyCarry`.

    Returns:
        h(1..L-1) [L - 1, T, d], normed if `self.are_normed`; h(L) [T, d], normed if `self.is_normed`; what the keys
        hand on (`KeyCarry`), or None.
    """
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
    """Return an instance of a new class called `name`, whose forward is a copy of `function`, compiled by vLLM."""
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
    """Return the pass of loop `loop`, from 0, over T tokens."""
    dims = {"positions": 0, "hidden_states": 0, "carried": 0, "starts": 0, "first_keys": 0}
    attributes = {"stack": stack, "loop": loop, "is_normed": is_normed, "keeps_keys": keeps_keys}
    return _pass(name, _loop_forward, dims, vllm_config, **attributes)


def rows_pass(stack: Stack, vllm_config: VllmConfig, *, are_normed: bool, is_normed: bool) -> nn.Module:
    """Return the pass of all loops at once over T tokens."""
    dims = {"positions": 0, "hidden_states": 1, "carried": 1}
    attributes = {"stack": stack, "are_normed": are_normed, "is_normed": is_normed}
    return _pass("PLTRows", _rows_forward, dims, vllm_config, **attributes)
