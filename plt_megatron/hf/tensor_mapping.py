"""Conversion between our tensors and Hugging Face's, for each form of the table (`model/parameters.py`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plt_megatron.model.parameters import Form, Sizes


class DirectMapping:
    """One tensor, unchanged."""

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
MAPPINGS: dict[Form, TensorMapping] = {"direct": DirectMapping(), "qkv": QKVMapping(), "gate_up": GateUpMapping()}
