"""Nearly free per-loop statistics of a training step: gate means, how far each loop moves the hidden states, and of
experts how even their load is, whether later loops choose other experts than the first, dropped tokens, and the
auxiliary losses.

Collected from one microbatch of each data-parallel rank at logging intervals. Names follow LoopCoder-v2's diagnostics
(arXiv 2606.18023, section 3.2), computed here over training text.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

LOSSES = ("aux_loss", "z_loss")  # of experts


class ExpertStatistics:
    """Sums over the tokens and layers of one microbatch, added up over the ranks by `reduce`. Layers that run once
    count with the first loop.

    Recomputation runs a layer twice; the first run counts. The losses exist only in the run that is differentiated.

    Args:
        parts: ranks that share a microbatch's tokens (TP x CP).
    """

    def __init__(
        self, loop_count: int, num_layers: int, num_experts: int, device: torch.device | int, parts: int = 1
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._parts = parts
        self._chosen = zeros(loop_count, num_layers, num_experts)
        self._dropped, self._as_first = zeros(loop_count), zeros(loop_count)
        self._losses = {name: zeros(loop_count, 2) for name in LOSSES}
        self._first_loop: dict[int, Tensor] = {}
        self._seen: set[tuple[int, int]] = set()

    @torch.no_grad()
    def add_routing(self, loop: int, layer_number: int, chosen: Tensor, kept: Tensor) -> None:
        """Add one layer's routing in one loop, bool [tokens, experts]: the router's choice, and what capacity kept."""
        if (loop, layer_number) in self._seen:
            return
        self._seen.add((loop, layer_number))
        self._chosen[loop - 1, layer_number - 1] += chosen.sum(dim=0)
        self._dropped[loop - 1] += chosen.sum() - kept.sum()
        if loop == 1:
            self._first_loop[layer_number] = chosen
        else:
            self._as_first[loop - 1] += (chosen & self._first_loop[layer_number]).sum()

    @torch.no_grad()
    def add_loss(self, name: str, loop: int, loss: Tensor) -> None:
        """Add this rank's part of one layer's `aux_loss` or `z_loss` in one loop, without its coefficient."""
        self._losses[name][loop - 1, 0] += loss
        self._losses[name][loop - 1, 1] += 1

    def reduce(self) -> dict[str, list]:
        """Reduce the sums to one entry per loop, None if no layer with experts runs in it. Collective over all ranks.

        Returns:
            `expert_load`: each expert's load relative to an even load, busiest first, mean over layers;
            `expert_load_max`: its first value. `expert_overlap`: the share of a token's experts that its first loop
            chose too, None for the first loop. `dropped_tokens`: how often an expert at its capacity dropped a token;
            `dropped_share`: the same as a share of all assignments. `aux_loss` and `z_loss`, if enabled: mean over
            layers, without their coefficients.
        """
        for tensor in (self._chosen, self._dropped, self._as_first, *self._losses.values()):
            dist.all_reduce(tensor)
        totals = self._chosen.sum(dim=(1, 2))
        even = self._chosen.mean(dim=2, keepdim=True).clamp(min=1.0)
        ran = (self._chosen.sum(dim=2) > 0).sum(dim=1, keepdim=True).clamp(min=1)  # layers; some run in one loop only
        load = (self._chosen / even).sort(dim=2, descending=True).values.sum(dim=1) / ran
        overlap = (self._as_first / totals.clamp(min=1.0)).tolist()
        record: dict[str, list] = {
            "expert_load": [[round(value, 4) for value in loads] for loads in load.tolist()],
            "expert_load_max": load[:, 0].tolist(),
            "expert_overlap": [None, *overlap[1:]],
            "dropped_tokens": [int(count) for count in self._dropped.tolist()],
            "dropped_share": (self._dropped / totals.clamp(min=1.0)).tolist(),
        }
        # A z-loss is a mean over a rank's tokens; an auxiliary loss's parts add up over the ranks of a microbatch.
        for name, parts in zip(LOSSES, (self._parts, 1), strict=True):
            if self._losses[name][0, 1] > 0:
                record[name] = [parts * total / max(count, 1) for total, count in self._losses[name].tolist()]
        for values in record.values():
            values[:] = [value if total else None for value, total in zip(values, totals.tolist(), strict=True)]
        return record


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
