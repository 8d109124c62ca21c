"""Rules for FP8: which kernels each generation of cards has, and what a run therefore computes in FP8.

The rules are Transformer Engine's own (its recipe checks and its attention selector, 2.20), checked before a run starts
instead of in its first step. Linear layers run in FP8; a layer's global attention may, where there is a kernel for it,
and its window attention stays in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.rules import find_obstacle_problems
from plt_megatron.config.rules.parallel import uneven_settings
from plt_megatron.config.schema import Fp8Config, RunConfig

ADA, HOPPER, BLACKWELL, CONSUMER_BLACKWELL = (8, 9), (9, 0), (10, 0), (12, 0)
HOPPER_ATTENTION_HEAD_DIM = 128
AMAX_HISTORY_LENGTH = 1024  # calls of a layer
# Matmul operands need (channels, tokens) in multiples of these.
_ALIGNMENT = {"delayed": (16, 8), "tensorwise": (16, 8), "blockwise": (16, 8), "mxfp8": (32, 32)}
Capability = tuple[int, int]


def choose(config: RunConfig, capability: Capability) -> Fp8Config | None:
    """Return `training.fp8` as it is on a card of this compute capability, its recipe never `auto`; None: no FP8.

    `auto` is mxfp8 on Blackwell, where it is native; elsewhere tensorwise, whose scales come from
    the very tensor that is rounded, or delayed, which Hopper's attention kernel needs, with FP8 attention.
    """
    fp8 = config.training.fp8
    return None if fp8 is None else replace(fp8, recipe=_recipe(fp8, capability))


def in_words(choice: Fp8Config) -> str:
    """Say what a run computes in FP8."""
    rest = "global attention in FP8, window in BF16" if choice.attention else "attention in BF16"
    start, end = choice.num_layers_at_start_in_bf16, choice.num_layers_at_end_in_bf16
    ends = f", the first {start} and last {end} layers in BF16" if start or end else ""
    return f"linear layers in FP8 ({choice.format}, recipe {choice.recipe}), {rest}{ends}"


def _recipe(fp8: Fp8Config, capability: Capability) -> Literal["delayed", "tensorwise", "blockwise", "mxfp8"]:
    if fp8.recipe != "auto":
        return fp8.recipe
    if BLACKWELL <= capability < CONSUMER_BLACKWELL:
        return "mxfp8"
    return "delayed" if fp8.attention else "tensorwise"


def find_problems(config: RunConfig, capability: Capability | None = None) -> Iterator[str]:
    """Yield the conflicts of FP8 settings, one line each.

    `capability`: the card's compute capability, if known; None: yield only what no card can do.
    """
    fp8 = config.training.fp8
    if fp8 is None:
        return
    recipe = _recipe(fp8, HOPPER if capability is None else capability)
    yield from find_obstacle_problems("training.fp8", _obstacles(config), ", or set training.fp8=null")
    if capability is not None:
        yield from _check_card(fp8, capability)
    yield from _check_sizes(config, recipe)
    yield from _check_ends(config, fp8)
    if recipe == "delayed":
        other = "tensorwise, and training.fp8.attention=false" if fp8.attention else "tensorwise"
        remedy = f"; set training.fp8.recipe={other}"
        yield from find_obstacle_problems("training.fp8.recipe delayed", _obstacles_of_delayed(config, fp8), remedy)
    if fp8.attention:
        obstacles = _obstacles_of_attention(config, fp8, capability)
        yield from find_obstacle_problems("training.fp8.attention", obstacles, " set training.fp8.attention=false")


def _obstacles(config: RunConfig) -> dict[str, bool]:
    precision, uneven = config.training.precision, uneven_settings(config.parallel)
    return {
        "needs Transformer Engine: set model.backend=te": config.model.backend == "torch",
        f"with training.precision {precision}: FP8 kernels read and write bf16; set training.precision=bf16": (
            precision != "bf16"
        ),
        f"is not verified with parallel.{', '.join(uneven)}: leave that out": bool(uneven),
        "does not run with training.loop_schedule yet: leave that out": bool(config.training.loop_schedule),
    }


def _obstacles_of_delayed(config: RunConfig, fp8: Fp8Config) -> dict[str, bool]:
    """Return what delayed scaling cannot be used with.

    Transformer Engine queues a module's scales first in, first out for recomputation, but a looped module is recomputed
    last loop first. An expert's scale would come from steps in which it may have seen other tokens, or none, and ranks
    with different experts would put their largest values into one history.
    """
    granularity, loops = config.parallel.recompute_granularity, config.model.loop_count
    recomputed = "granularity full" if granularity == "full" else "modules mlp"
    linears = granularity == "full" or (granularity == "selective" and "mlp" in config.parallel.recompute_modules)
    return {
        f"with parallel.recompute_{recomputed} and model.loop_count {loops}: a loop would be recomputed with another "
        "loop's scales (parallel.recompute_granularity=selective of core_attn alone is possible)": linears
        and loops > 1,
        "with model.moe: experts on several ranks would share their scales": config.model.moe is not None,
        **{f"with {key}: scales are reduced for the whole stack at once": True for key in _layers_in_bf16(fp8)},
    }


def _obstacles_of_attention(config: RunConfig, fp8: Fp8Config, capability: Capability | None) -> dict[str, bool]:
    """Return what FP8 attention in training cannot be used with; the window's never uses FP8.

    megatron-core recomputes attention outside of FP8, so the one that is differentiated would not be the one that ran.
    """
    parallel, head = config.parallel, derived.head_dim(config.model)
    recompute = parallel.recompute_granularity == "selective" and "core_attn" in parallel.recompute_modules
    recipe = None if capability is None and fp8.recipe == "auto" else _recipe(fp8, capability or HOPPER)
    loops = parallel.recompute_granularity == "full" and config.model.loop_count > 1
    found = {
        "with parallel.recompute_granularity selective: attention would be recomputed in BF16; set "
        "parallel.recompute_granularity=none, or": recompute,
        # Its scores and their gradients have delayed scales all the same.
        "with training.fp8.recipe tensorwise, parallel.recompute_granularity full and loops: a loop would be "
        "recomputed with another loop's scales; use mxfp8, or": loops and recipe == "tensorwise",
        "with training.fp8.recipe blockwise: no card has a kernel; use delayed, or": recipe == "blockwise",
        "with data.reset_at_document_boundaries: no kernel for packed documents;": (
            config.data.reset_at_document_boundaries
        ),
        "with parallel.cp_comm_type all_gather: use p2p or a2a, or": (
            parallel.context_parallel_size > 1 and parallel.cp_comm_type == "all_gather"
        ),
    }
    if capability is None:
        return found
    card, is_hopper = card_name(capability), HOPPER <= capability < BLACKWELL
    return found | {
        f"in training has no kernel on {card};": not HOPPER <= capability < CONSUMER_BLACKWELL,
        f"with training.fp8.recipe {recipe} needs Blackwell; on {card} use delayed, or": (
            is_hopper and recipe in ("tensorwise", "mxfp8")
        ),
        f"on {card} needs a head dimension of {HOPPER_ATTENTION_HEAD_DIM}, but model.kv_channels is {head};": (
            is_hopper and head != HOPPER_ATTENTION_HEAD_DIM
        ),
    }


def _layers_in_bf16(fp8: Fp8Config) -> dict[str, int]:
    """Return the numbers of layers at both ends that stay in BF16, by setting, where there are any."""
    names = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
    return {f"training.fp8.{name}": getattr(fp8, name) for name in names if getattr(fp8, name)}


def _check_ends(config: RunConfig, fp8: Fp8Config) -> Iterator[str]:
    layers, ends = layout_of(config).fewest_stage_layers(config.model.num_layers), _layers_in_bf16(fp8)
    for key, count in ends.items():
        if count > layers:
            yield f"{key} {count} is more than the {layers} layers of a pipeline stage"
    if sum(ends.values()) >= config.model.num_layers:
        named = " + ".join(f"{key} {count}" for key, count in ends.items())
        yield f"{named}: none of {config.model.num_layers} layers is left in FP8; set training.fp8=null"


def _check_card(fp8: Fp8Config, capability: Capability) -> Iterator[str]:
    card, recipe = card_name(capability), _recipe(fp8, capability)
    needs = {
        "mxfp8": ("Blackwell (sm100)", BLACKWELL <= capability < CONSUMER_BLACKWELL),
        "blockwise": ("Hopper or newer", capability >= HOPPER),
    }
    cards, is_one = needs.get(recipe, ("", True))
    if capability < ADA:
        yield f"training.fp8: {card} has no FP8 units (Ada, Hopper and Blackwell have)"
    elif not is_one:
        yield f"training.fp8.recipe {recipe} needs {cards}, {card} has no kernel; use tensorwise or delayed"


def _check_sizes(config: RunConfig, recipe: str) -> Iterator[str]:
    model, parallel, (align, align_tokens) = config.model, config.parallel, _ALIGNMENT[recipe]
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    head = derived.head_dim(model)
    tokens = config.training.micro_batch_size * config.data.sequence_length // cp
    if parallel.sequence_parallel:
        tokens //= tp
    sizes = {
        "model.hidden_size": model.hidden_size,
        **{f"model.{name} / tensor {tp}": size // tp for name, size in derived.split_ffns(model).items()},
        **({"channels of an expert": derived.expert_ffn_hidden_size(model)} if derived.expert_layers(model) else {}),
        f"query channels / tensor {tp}": model.num_attention_heads * head // tp,
        f"query, key and value channels / tensor {tp}": (
            (model.num_attention_heads + 2 * derived.num_query_groups(model)) * head // tp
        ),
    }
    found = [(name, size, align) for name, size in sizes.items()]
    for name, size, multiple in [*found, ("tokens of a microbatch on one rank", tokens, align_tokens)]:
        if size % multiple:
            yield f"training.fp8.recipe {recipe}: {name} is {size}, must be a multiple of {multiple}"


def card_name(capability: Capability) -> str:
    """Return the card's name, as in sm90."""
    return f"sm{capability[0]}{capability[1]}"
