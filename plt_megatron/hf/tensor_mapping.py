"""How Hugging Face's tensors lie in ours: of what a mapping of the table (`param_mapping`) is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class Sizes:
    """The dimensions that shapes in the table are made of."""

    hidden: int
    ffn: int
    vocab: int
    heads: int
    groups: int
    head_dim: int
    experts: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> Sizes:
        return cls(
            hidden=model.hidden_size,
            ffn=model.ffn_hidden_size,
            vocab=vocab_size,
            heads=model.num_attention_heads,
            groups=derived.num_query_groups(model),
            head_dim=derived.head_dim(model),
            experts=model.num_moe_experts or 0,
            expert_ffn=derived.expert_ffn_hidden_size(model),
            shared_ffn=model.moe_shared_expert_intermediate_size or 0,
        )

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.groups * self.head_dim

    @property
    def qkv(self) -> int:
        return self.query + 2 * self.key_value

    @property
    def gate_up(self) -> int:
        return 2 * self.ffn

    @property
    def expert_gate_up(self) -> int:
        return 2 * self.expert_ffn

    @property
    def shared_gate_up(self) -> int:
        return 2 * self.shared_ffn

    def shape(self, names: Sequence[str]) -> tuple[int, ...]:
        return tuple(getattr(self, name) for name in names)


class DirectMapping:
    """One tensor, the same."""

    def to_hf(self, ours: Tensor, sizes: Sizes) -> list[Tensor]:
        return [ours]

    def to_megatron(self, theirs: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return theirs[0]


class NegatedMapping:
    """The gate of the other side: 1 - sigmoid(x) = sigmoid(-x)."""

    def to_hf(self, ours: Tensor, sizes: Sizes) -> list[Tensor]:
        return [-ours]

    def to_megatron(self, theirs: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return -theirs[0]


class QKVMapping:
    """Rows of Q, K and V by query group: the group's queries, its key, its value. Weights and biases."""

    def to_hf(self, ours: Tensor, sizes: Sizes) -> list[Tensor]:
        queries = sizes.heads // sizes.groups
        grouped = ours.unflatten(0, (sizes.groups, queries + 2, sizes.head_dim))
        return [part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1)]

    def to_megatron(self, theirs: Sequence[Tensor], sizes: Sizes) -> Tensor:
        grouped = [part.unflatten(0, (sizes.groups, -1, sizes.head_dim)) for part in theirs]
        return torch.cat(grouped, dim=1).flatten(0, 2)


class GateUpMapping:
    """SwiGLU's gate rows, then its up rows."""

    def to_hf(self, ours: Tensor, sizes: Sizes) -> list[Tensor]:
        return list(ours.chunk(2))

    def to_megatron(self, theirs: Sequence[Tensor], sizes: Sizes) -> Tensor:
        return torch.cat(list(theirs))


TensorMapping = DirectMapping | NegatedMapping | QKVMapping | GateUpMapping
