"""What a process sets up before it uses its GPU: variables that CUDA's libraries read, and silence from imports."""

from __future__ import annotations

import logging
import os
import warnings

from plt_megatron.config.schema import RunConfig

# The first is every torch's, and since 2.9 an alias of the second.
ALLOCATOR, ALLOCATOR_TOO = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"


def cuda_environment(config: RunConfig) -> dict[str, str]:
    """The variables that a run needs, by name."""
    # Less memory is lost to fragments: sizes change from step to step with packed documents, experts and validation.
    needed = {ALLOCATOR: "expandable_segments:True"}
    if max(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size) > 1:
        # One queue to the device: a collective that is issued ahead of a matrix product also starts ahead of it, and
        # they overlap. Megatron-LM asks for it up to Hopper.
        needed["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.training.deterministic:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # otherwise torch refuses matrix products
        needed["NCCL_ALGO"] = "^NVLS"  # no sums in switches: Megatron-LM's deterministic mode asks for it
    return needed


def set_cuda_environment(config: RunConfig) -> None:
    """Set these variables, except those that the user has set. Call it before anything asks CUDA for its devices."""
    for name, value in cuda_environment(config).items():
        if name != ALLOCATOR or ALLOCATOR_TOO not in os.environ:
            os.environ.setdefault(name, value)


def quiet_imports(level: int = logging.INFO) -> None:
    """Silence torch's, megatron-core's and transformers' routine messages; our own are logged from `level` on.

    plt doctor reports what matters of them. A process that has imported torch calls it after that: torch sets its
    loggers' levels.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\..*")
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("megatron", "torch", "torch.utils.cpp_extension", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
