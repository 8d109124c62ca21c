"""Check that a checkpoint has all of a model's tensors.

vLLM itself checks few: a linear layer may be read in part, or not at all, and is then served as it was allocated.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch

_EXPERTS = ".experts."
# Parts of the experts' stacked weights in vLLM.
_STACKED_EXPERTS = {"w13_": ("gate_proj", "up_proj"), "w2_": ("down_proj",)}


class ReadTensors:
    """Record of the tensors read for a model; made before its weights are read.

    Args:
        parameters: the model's parameters by name, as they were allocated.
        stacked: name of a part (`.q_proj`) -> name of the stacked module (`.qkv_proj`).
        experts: number of experts.
        all_experts: each expert must be read; otherwise vLLM skips those of other ranks.
        quantized: the quantization method decides what a weight consists of, and may create parts itself.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, torch.Tensor]],
        stacked: Mapping[str, str],
        experts: int = 0,
        *,
        all_experts: bool = True,
        quantized: bool = False,
    ):
        self.names: set[str] = set()
        self._is_checked = False
        self._wanted = {name: list(_parts(name, stacked, experts)) for name, param in parameters if param.numel()}
        self._all_experts, self._quantized = all_experts, quantized

    def recorded(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self.names.add(name)
            yield name, tensor

    def check(self, folder: str) -> None:
        """Raise a one-line `ValueError` that names missing or unknown tensors, if there are any.

        Check on the first call only: afterwards a trainer may send new weights in parts. Accept a model that has read
        no tensor (`--load-format dummy`).
        """
        is_first, self._is_checked = not self._is_checked, True
        if not is_first or not self.names:
            return
        kinds = {name.rpartition(".")[2] for name in self.names}
        missing = {part for name in self._wanted for part in self._missing(name, kinds)}
        # vLLM refuses other unknown tensors, but not biases, which some quantizers write needlessly.
        known = {part for parts in self._wanted.values() for part in parts}
        unknown = {name for name in self.names - known if name.endswith(".bias") and not self._quantized}
        for names, fault in ((missing, "lacks"), (unknown, "has unknown")):
            if names:
                first = ", ".join(sorted(names)[:3])
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(f"{folder}: {fault} tensors of this PLT: {first}{more}")

    def _missing(self, name: str, kinds: set[str]) -> set[str]:
        kind = name.rpartition(".")[2].removeprefix("w13_").removeprefix("w2_")
        parts = set(self._wanted[name])
        if self._quantized and kind not in ("weight", "bias", *kinds):
            return set()  # e.g. a scale that the checkpoint has nowhere; if it has one, it must have all
        if _EXPERTS in name and not self._all_experts:
            owners = {_expert(read) for read in self.names}
            parts = {part for part in parts if _expert(part) in owners}
        return parts - self.names


def _parts(name: str, stacked: Mapping[str, str], experts: int) -> Iterator[str]:
    """Yield the checkpoint names of the tensors that a parameter holds."""
    if _EXPERTS in name:
        owner, leaf = name.partition(_EXPERTS)[0], name.rpartition(".")[2]
        for prefix, modules in _STACKED_EXPERTS.items():
            if leaf.startswith(prefix):
                kind = leaf.removeprefix(prefix)
                yield from (f"{owner}{_EXPERTS}{expert}.{part}.{kind}" for expert in range(experts) for part in modules)
        return
    parts = [name.replace(f"{whole}.", f"{part}.") for part, whole in stacked.items() if f"{whole}." in name]
    yield from parts or [name]


def _expert(name: str) -> str:
    """Return the layer and number of the expert that a checkpoint tensor belongs to."""
    owner, _, rest = name.partition(_EXPERTS)
    return f"{owner}.{rest.partition('.')[0]}"
