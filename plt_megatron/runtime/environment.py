"""Process setup before the GPU is used: environment variables that CUDA's libraries read, and quiet imports."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import tempfile
import warnings

from plt_megatron.config.rules.fp8 import AMAX_HISTORY_LENGTH
from plt_megatron.config.schema import RunConfig
from plt_megatron.errors import UserError

# Every version of torch reads the first name; since 2.9 it is an alias of the second.
ALLOCATOR, ALLOCATOR_TOO = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
# torch's first choice of attention on Hopper, cuDNN's, compiles a plan of 20 ms or more for each new length of queries
# or keys, and keeps them all; flash attention, its second, does not. Read at torch's first attention.
FLASH_FIRST = ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
# Algorithms of NCCL that Megatron-LM's deterministic mode accepts. Those that leave the choice to NCCL are not among
# them: without switches (`^NVLS`) it may still take a tree, whose topology varies.
_REPEATABLE = {"Ring", "CollnetDirect", "CollnetChain"}
# Variables set by a rank's launcher: with them a library might join the run's job and wait for its other ranks.
_OF_A_RANK = ("RANK", "LOCAL_", "WORLD_SIZE", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PMI", "OMPI_", "MV2_")


def environment_of_no_rank() -> dict[str, str]:
    """Return this process's environment, for a process that is not a rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_RANK)}


def cuda_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment variables that a run needs, by name."""
    # Less fragmentation: sizes change from step to step with packed documents, experts and validation.
    needed = {ALLOCATOR: "expandable_segments:True"}
    if max(config.parallel.tensor_model_parallel_size, config.parallel.context_parallel_size) > 1:
        # One queue to the device: a collective issued before a matrix product also starts before it, so that the two
        # overlap. Megatron-LM requires it up to Hopper.
        needed["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.data.reset_at_document_boundaries:
        needed |= [FLASH_FIRST]
    if config.training.deterministic:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # otherwise torch refuses matrix products
        needed["NCCL_ALGO"] = "Ring"  # the default of Megatron-LM's deterministic mode, too
    if config.training.fp8 is not None and config.training.fp8.attention:
        # With `tensorwise` scores and their gradients still have delayed scales, which loops share: see
        # `model.transformer_config` for linear layers.
        needed |= {"NVTE_DPA_FP8DS_AMAX_HISTLEN": str(AMAX_HISTORY_LENGTH), "NVTE_DPA_FP8DS_AMAX_ALGO": "max"}
    return needed


def set_cuda_environment(config: RunConfig) -> None:
    """Set the run's variables, except those the user has set. Call it before anything asks CUDA for its devices."""
    for name, value in cuda_environment(config).items():
        if name != ALLOCATOR or ALLOCATOR_TOO not in os.environ:
            os.environ.setdefault(name, value)
    if not os.access(os.path.expanduser("~"), os.W_OK):  # as in a container without one, where Triton's cache would be
        os.environ.setdefault("TRITON_CACHE_DIR", _private_folder("triton"))


def _private_folder(name: str) -> str:
    """Return a temporary folder that nobody else can write to; the same one at every call, unless another user has
    made a folder of its name."""
    path = os.path.join(tempfile.gettempdir(), f"{name}-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    found = os.lstat(path)
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return path if is_own else tempfile.mkdtemp(prefix=f"{name}-")


def check_environment(*, deterministic: bool = False) -> None:
    """Raise `UserError` if a variable excludes one of Transformer Engine's attentions, which megatron-core refuses, or
    lets NCCL reduce in another order each time in a `deterministic` run."""
    algorithms = os.environ.get("NCCL_ALGO", "Ring")
    if deterministic and not set(algorithms.replace(" ", "").split(",")) <= _REPEATABLE:
        raise UserError(
            f"training.deterministic: the environment sets NCCL_ALGO={algorithms}, with which sums may differ from run "
            "to run: unset it, or set it to Ring"
        )
    for name in ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"):
        if os.environ.get(name, "1") != "1":
            raise UserError(
                f"the environment sets {name}={os.environ[name]}, with which megatron-core refuses to run: unset it"
            )


def quiet_imports(level: int = logging.INFO) -> None:
    """Silence routine messages of torch, megatron-core and transformers; our own are logged from `level` on.

    plt doctor reports those that matter. A process that imports torch must call this afterwards, since torch sets its
    loggers' levels.
    """
    warnings.filterwarnings("ignore", module=r"(megatron|torch|transformers)\..*")
    logging.basicConfig(level=level, format="%(message)s")
    for name in ("megatron", "torch", "torch.utils.cpp_extension", "absl"):
        logging.getLogger(name).setLevel(logging.ERROR)
