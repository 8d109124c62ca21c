"""Which parameters a forward pass reads before it would have waited for them.

`overlap_param_gather` waits for a module's own parameters before the module's forward, and for nothing else: one that
another module reads, or that lies in a container whose forward never runs, may be read while it is still gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Reads(TorchDispatchMode):
    """Notes in `first` the parameters that an operation gets, and in `early` those not in `awaited` by then."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self._names = {each.untyped_storage().data_ptr(): name for name, each in stage.named_parameters()}
        assert len(self._names) == len(list(stage.parameters())), "parameters share their memory"
        self.awaited: set[str] = set()
        self.early: set[str] = set()
        self.read: set[str] = set()

    def await_those_of(self, module: nn.Module, *unused: Any) -> None:
        """A forward pre-hook."""
        own = module.parameters(recurse=False)
        self.awaited |= {self._names[each.untyped_storage().data_ptr()] for each in own}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for each in tree_leaves((args, kwargs)):
            name = self._names.get(each.untyped_storage().data_ptr()) if isinstance(each, Tensor) else None
            if name is not None:
                self.read.add(name)
                self.early |= {name} - self.awaited
        return function(*args, **(kwargs or {}))


def early_and_unread(stage: nn.Module, forward: Callable[[], Any]) -> tuple[set[str], set[str]]:
    """Names of the parameters that `forward` reads too early, and of those that it does not read."""
    reads = _Reads(stage)
    handles = [module.register_forward_pre_hook(reads.await_those_of) for module in stage.modules()]
    with reads:
        forward()
    for handle in handles:
        handle.remove()
    return reads.early, {name for name, _ in stage.named_parameters()} - reads.read
