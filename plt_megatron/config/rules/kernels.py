"""Rules for the library versions that a run on Transformer Engine needs; for its card see `fp8`.

The rules are those of Transformer Engine's own selectors (2.20), checked before a run starts. Where no fused attention
is left it silently falls back to one that holds all scores, which is refused: here where it can be foreseen, else by
`runtime.kernels`, which asks the selectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from plt_megatron.config.rules import fp8 as fp8_rules
from plt_megatron.config.rules.fp8 import HOPPER, Capability, card_name
from plt_megatron.config.schema import Fp8Config, RunConfig

Version = tuple[int, ...]
BLOCKWISE_CUDA = (12, 9)
DETERMINISTIC_FP8_CUDNN = (9, 19)
DETERMINISTIC_FLASH_ATTN = (2, 4, 1)
# cuDNN's deterministic backward over packed documents takes about 128 bytes of workspace for each of
# documents x heads x longest^2 on Hopper.
DETERMINISTIC_PACKED_LIMIT = 1 << 30


@dataclass(frozen=True)
class Versions:
    """Versions of a machine's libraries; None: not installed."""

    cuda: Version | None  # that torch is built for
    cudnn: Version | None  # that Transformer Engine uses
    flash_attn: Version | None  # the package flash-attn

    def __str__(self) -> str:
        return f"cuDNN {_text(self.cudnn)} and flash-attn {_text(self.flash_attn)}"


def find_problems(config: RunConfig, capability: Capability, versions: Versions) -> Iterator[str]:
    """Yield settings without a kernel on a card of this compute capability with these versions, one line each."""
    choice = fp8_rules.choose(config, capability)
    if choice is not None and choice.recipe == "blockwise" and _older(versions.cuda, BLOCKWISE_CUDA):
        yield (
            f"training.fp8.recipe blockwise needs a torch built for CUDA {_text(BLOCKWISE_CUDA)} or newer, this one is "
            f"for {_text(versions.cuda)}; use tensorwise or delayed"
        )
    if config.training.deterministic:
        yield from _check_deterministic(config, capability, versions, choice)


def _check_deterministic(
    config: RunConfig, capability: Capability, versions: Versions, choice: Fp8Config | None
) -> Iterator[str]:
    card, other = card_name(capability), "or set training.deterministic=false or model.backend=torch"
    if choice is not None and choice.attention and _older(versions.cudnn, DETERMINISTIC_FP8_CUDNN):
        yield (
            f"training.deterministic with training.fp8.attention needs cuDNN {_text(DETERMINISTIC_FP8_CUDNN)} or newer,"
            f" this is {_text(versions.cudnn)}: update it, or set training.fp8.attention=false"
        )
    if not _older(versions.flash_attn, DETERMINISTIC_FLASH_ATTN):
        return
    install = f"install flash-attn {_text(DETERMINISTIC_FLASH_ATTN)} or newer, {other}"
    if capability < HOPPER:
        yield f"training.deterministic: cuDNN's attention is not deterministic on {card}; {install}"
    elif capability[0] == HOPPER[0] and config.data.reset_at_document_boundaries:
        size = _largest_packed_size(config)
        if size >= DETERMINISTIC_PACKED_LIMIT:
            yield (
                "training.deterministic with data.reset_at_document_boundaries: on sm90 cuDNN's deterministic "
                f"attention is limited to documents x heads x longest^2 of {DETERMINISTIC_PACKED_LIMIT:.1e}, a "
                f"microbatch may have {size:.1e}; {install}"
            )


def _largest_packed_size(config: RunConfig) -> int:
    """Return documents x heads x longest^2 of the worst microbatch: one long document, the rest one token each."""
    longest, rows = config.data.sequence_length, config.training.micro_batch_size
    tokens = rows * longest
    longest = min(longest, max(1, 2 * tokens // 3))
    parallel = config.parallel
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size  # both split heads of packed rows
    heads = config.model.num_attention_heads // sharing
    return (tokens - longest + 1) * heads * longest**2


def _older(version: Version | None, wanted: Version) -> bool:
    return version is None or version < wanted


def _text(version: Version | None) -> str:
    return "none" if version is None else ".".join(map(str, version))
