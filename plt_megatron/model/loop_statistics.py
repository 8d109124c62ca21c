"""Nearly free per-loop statistics of a training step: gate means, and how far each loop moves the hidden states.

Collected from one microbatch at logging intervals. Names follow LoopCoder-v2's diagnostics (arXiv 2606.18023, section
3.2), computed here over training text.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from plt_megatron.model.expert_statistics import ExpertStatistics


class LoopStatistics:
    """Sums over tokens (and heads) of one microbatch, added up over the ranks by `reduce`.

    Args:
        experts: the statistics of a mixture of experts, or None.
    """

    def __init__(
        self, loop_count: int, num_layers: int, device: torch.device | int, experts: ExpertStatistics | None = None
    ) -> None:
        self.experts = experts
        self._gates = torch.zeros(loop_count, num_layers, 2, dtype=torch.float64, device=device)
        self._hidden = torch.zeros(loop_count, 3, dtype=torch.float64, device=device)
        self._previous: Tensor | None = None

    @torch.no_grad()
    def add_gate(self, loop: int, layer_number: int, gate: Tensor) -> None:
        """Add one layer's gate values in one loop, in any shape."""
        self._gates[loop - 1, layer_number - 1, 0] += gate.double().sum()
        self._gates[loop - 1, layer_number - 1, 1] += gate.numel()

    @torch.no_grad()
    def add_hidden(self, loop: int, hidden_states: Tensor) -> None:
        """Add h^(loop) as passed to the next loop, [s (/ TP), b, h]; loop 0 is the first loop's input. Call this in
        order of loops."""
        hidden_states = hidden_states.detach().float()
        if loop > 0:
            self._hidden[loop - 1, 0] += hidden_states.norm(dim=-1).double().sum()
            self._hidden[loop - 1, 2] += hidden_states.shape[:2].numel()
            if self._previous is not None:
                self._hidden[loop - 1, 1] += (hidden_states - self._previous).norm(dim=-1).double().sum()
        self._previous = hidden_states

    def reduce(self) -> dict[str, list]:
        """Reduce the sums to means over tokens, one entry per loop. Collective over all ranks.

        Returns:
            `gate_mean` (over heads and layers; None without gates), `hidden_norm` (L2), `step_size` (L2 of
            h^(r) - h^(r-1); None in the first loop of a pipeline, whose last stage never sees the embeddings), and
            the experts' statistics.
        """
        self._previous = None
        dist.all_reduce(self._gates)
        dist.all_reduce(self._hidden)
        gates, hidden = self._gates.sum(dim=1).tolist(), self._hidden.tolist()
        return {
            "gate_mean": [total / count if count else None for total, count in gates],
            "hidden_norm": [norm / count if count else None for norm, _, count in hidden],
            "step_size": [step / count if count and step else None for _, step, count in hidden],
        } | ({} if self.experts is None else self.experts.reduce())
