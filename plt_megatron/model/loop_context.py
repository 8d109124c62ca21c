"""State that a layer needs during a pass: the loop, the first loop's K and V, document boundaries, statistics.

It is passed as the `packed_seq_params` argument, which megatron-core hands to `core_attention` on every path, including
activation recomputation. It is not a global, since recomputation and pipelines return to a loop later.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class AccumulateSharedKVGrad(torch.autograd.Function):
    """Identity on (K, V); in backward, adds the gradients that later loops left on the published leaves."""

    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, leaves: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ctx.leaves = leaves
        return key.view_as(key), value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        totals = []
        for grad, leaf in zip(grads, ctx.leaves, strict=True):
            totals.append(grad if leaf.grad is None else leaf.grad.add_(grad))
            leaf.grad = None
        return totals[0], totals[1], None


class FirstLoopKV:
    """The first loop's K and V of one microbatch, per layer of this pipeline stage, and their gradients.

    The first loop publishes K and V of each layer as detached leaves. Later loops read the leaves; their gradients
    accumulate there, and an identity function in the first loop's graph adds them when its own backward runs. So the
    loops are separate autograd graphs connected only by hidden states: the same code serves one process, activation
    recomputation and pipelines, where a loop's backward runs long after its forward.

    The gradients are exact because a loop's input depends on the previous loop's output: every backward of loop l is
    over before the backward of loop l-1 starts, in any schedule.
    """

    def __init__(self) -> None:
        self._leaves: dict[int, tuple[Tensor, Tensor]] = {}

    def publish(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Share K and V of `layer_number` with the later loops.

        When recomputation runs the first loop again, the leaves that later loops have read are kept; only the identity
        is added to the new graph.

        Args:
            layer_number: the layer's number in the whole model.
            key, value: [s, b, num_query_groups / TP, head_dim], after RoPE.

        Returns:
            (key, value) for the rest of the first loop.
        """
        if layer_number not in self._leaves:
            self._leaves[layer_number] = (key.detach().requires_grad_(), value.detach().requires_grad_())
        if not torch.is_grad_enabled():
            return key, value
        return AccumulateSharedKVGrad.apply(key, value, self._leaves[layer_number])

    def read(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Return K and V of the first loop, as leaves that collect gradients; shapes as in `publish`."""
        return self._leaves[layer_number]


EXPERT_LOSSES = ("aux_loss", "z_loss")  # of experts


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
        self._losses = {name: zeros(loop_count, 2) for name in EXPERT_LOSSES}
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
        even = self._chosen.mean(dim=2, keepdim=True).clamp(min=1e-9)
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
        for name, parts in zip(EXPERT_LOSSES, (self._parts, 1), strict=True):
            if self._losses[name][0, 1] > 0:
                record[name] = [parts * total / max(count, 1) for total, count in self._losses[name].tolist()]
        for values in record.values():
            values[:] = [value if total else None for value, total in zip(values, totals.tolist(), strict=True)]
        return record


class LoopStatistics:
    """Nearly free statistics of each loop: gate means, and how far it moves the hidden states.

    Sums over tokens (and heads) of one microbatch, added up over the ranks by `reduce`, at logging intervals. Names
    follow LoopCoder-v2's diagnostics (arXiv 2606.18023, section 3.2), computed here over training text.
    """

    def __init__(
        self, loop_count: int, num_layers: int, device: torch.device | int, experts: ExpertStatistics | None = None
    ) -> None:
        self.experts = experts
        self._gates = torch.zeros(loop_count, num_layers, 2, dtype=torch.float64, device=device)
        self._hidden = torch.zeros(loop_count, 4, dtype=torch.float64, device=device)
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
                self._hidden[loop - 1, 3] += hidden_states.shape[:2].numel()
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
            "hidden_norm": [norm / count if count else None for norm, _, count, _ in hidden],
            "step_size": [step / steps if steps else None for _, step, _, steps in hidden],
        } | ({} if self.experts is None else self.experts.reduce())


def document_lengths(starts: Tensor) -> list[int]:
    """Return the lengths of packed documents in tokens, row after row; they add up to b * s.

    Args:
        starts: bool [b, s], True at each document's first token. On a GPU this blocks the host.
    """
    starts = starts.clone()
    starts[:, 0] = True
    first = torch.nonzero(starts.flatten()).flatten().tolist()
    return [end - start for start, end in zip(first, [*first[1:], starts.numel()], strict=True)]


class Documents:
    """The documents packed into a microbatch's rows: whole rows, even if a rank holds only part of them.

    Attributes:
        starts: bool [b, s], True at each document's first token. A row's first token always starts a document.
        segments: int [b, s], the number of a token's document within its row, from 1.
        lengths: `document_lengths(starts)`; if known at construction, nothing is read from the device.
    """

    def __init__(self, starts: Tensor, lengths: list[int] | None = None) -> None:
        self.starts = starts.clone()
        self.starts[:, 0] = True
        self.segments = self.starts.cumsum(dim=1)
        self.lengths = document_lengths(starts) if lengths is None else lengths

    @cached_property
    def spans(self) -> list[list[range]]:
        """The token ranges of each row's documents."""
        rows, start = [list[range]()], 0
        for length in self.lengths:
            if start == self.starts.shape[1]:
                rows.append([])
                start = 0
            rows[-1].append(range(start, start + length))
            start += length
        return rows

    @property
    def position_ids(self) -> Tensor:
        """int64 [b, s]: a token's index within its document."""
        return torch.arange(self.starts.shape[1], device=self.starts.device) - self.first_tokens

    @cached_property
    def first_tokens(self) -> Tensor:
        """int32 [b, s]: the index in its row of the first token of each token's document."""
        index = torch.arange(self.starts.shape[1], dtype=torch.int32, device=self.starts.device)
        return torch.where(self.starts, index, 0).cummax(dim=1).values

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 [documents + 1]: where each document begins in the concatenated rows."""
        # Computed on the device: copying a list to it would block the host.
        first = torch.nonzero_static(self.starts.flatten(), size=len(self.lengths)).flatten()
        return F.pad(first, (0, 1), value=self.starts.numel()).int()


@dataclass
class LoopContext(PackedSeqParams):
    """One loop's pass over one microbatch.

    Attributes:
        loop: 1 for the first loop.
        loop_count: loops of this pass; in an evaluation or a phase of training it may differ from the model's.
        first_loop_kv: K and V of this microbatch's first loop.
        documents: the packed documents, or None if a row is one text.
        statistics: collects the loops' statistics, or None.
    """

    loop: int = 1
    loop_count: int = 1
    first_loop_kv: FirstLoopKV = field(default_factory=FirstLoopKV)
    documents: Documents | None = None
    statistics: LoopStatistics | None = None

    @property
    def is_last_loop(self) -> bool:
        """Whether this is the last loop, which the head follows."""
        return self.loop == self.loop_count

    def at_loop(self, loop: int) -> LoopContext:
        """Return the same microbatch's context in another loop."""
        return replace(self, loop=loop)
