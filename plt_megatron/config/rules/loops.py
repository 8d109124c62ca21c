"""Rules for later loops' input, the layers that loop (`model.loop_span`) and their order (`model.loop_order`)."""

from __future__ import annotations

from collections.abc import Iterator

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig, RunConfig


def find_problems(config: RunConfig) -> Iterator[str]:
    """Yield conflicts between settings that are each in range, one line each."""
    model = config.model
    yield from _check_input(model)
    yield from _check_order(config)
    span = model.loop_span
    if span is None:
        return
    if len(span) != 2 or not span[0] < span[1] <= model.num_layers:
        yield (
            f"model.loop_span {span}: give the first layer that loops and the first after it that does not, counted "
            f"from 0, as in {_example(model.num_layers)} of model.num_layers {model.num_layers}; null: all layers"
        )
        return
    yield from _check_loops(config)
    yield from _check_layout(config)


def _check_input(model: ModelConfig) -> Iterator[str]:
    """Check the input of loops >= 2. A one-loop model ignores it; for loops by layer see `_check_order`."""
    if model.loop_count == 1 or model.loop_order == "layer":
        return
    scaled = {
        "loop_norm rms": model.loop_norm == "rms",
        f"learned_hidden_scale {model.learned_hidden_scale}": model.learned_hidden_scale != "none",
    }
    first = next((name for name, given in scaled.items() if given), None)
    if first is not None and not derived.adds_embeddings(model):
        yield (
            f"model.{first} applies to E + h, but without model.cross_loop_parallel a loop reads h itself; "
            "set model.input_injection=true"
        )


def _check_order(config: RunConfig) -> Iterator[str]:
    """Check loops by layer for settings that need the whole stack to finish a loop before the next begins."""
    model, stages = config.model, config.parallel.pipeline_model_parallel_size
    if model.loop_order == "stack" or model.loop_count == 1:
        return
    reads_more = {
        "model.input_injection=false": model.input_injection,
        "model.loop_norm=none": model.loop_norm != "none",
        "model.learned_hidden_scale=none": model.learned_hidden_scale != "none",
    }
    off = " ".join(setting for setting, on in reads_more.items() if on)
    missing = "a loop would need the whole stack's output for the token before, but a layer has only its own"
    in_the_way = {  # settings with the values that fit -> whether they have others, and why those do not
        "model.cross_loop_parallel=false": (model.cross_loop_parallel, missing),
        off: (bool(off), "a layer's next loop reads its own output as it is"),
        "training.loop_loss_weights=[]": (
            bool(config.training.loop_loss_weights),
            "only the last loop ends at the head",
        ),
        "parallel.pipeline_model_parallel_size=1": (stages > 1, "loops are virtual stages of the whole stack"),
    }
    for settings, (given, why) in in_the_way.items():
        if given:
            names = ", ".join(setting.partition("=")[0] for setting in settings.split())
            yield f"{names} with model.loop_order layer: {why}; set {settings}, or model.loop_order=stack"


def _example(layers: int) -> list[int]:
    return [layers // 4, layers - layers // 4]


def _check_loops(config: RunConfig) -> Iterator[str]:
    """Check settings that take the embeddings as the loops' input, or the last layer as a loop's end."""
    model, layers = config.model, derived.looped_layers(config.model)
    prelude, coda = layers.start > 0, layers.stop < model.num_layers
    if (prelude or coda) and model.residual_scaling == "loops_sqrt_layers":
        yield (
            f"model.residual_scaling loops_sqrt_layers is for layers that all loop, not for model.loop_span "
            f"{model.loop_span}; set model.residual_scaling=layers"
        )
    if coda and config.training.loop_loss_weights:
        yield (
            f"training.loop_loss_weights with model.loop_span {model.loop_span}: an earlier loop's output reaches no "
            f"head without the coda; leave them out, or set model.loop_span={[layers.start, model.num_layers]}"
        )


def _check_layout(config: RunConfig) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    stages = parallel.pipeline_model_parallel_size
    if stages > 1:
        tensor = stages * parallel.tensor_model_parallel_size
        divided = (model.num_attention_heads, derived.num_query_groups(model), *derived.split_ffns(model).values())
        nearest = f" and parallel.tensor_model_parallel_size={tensor}" if not any(n % tensor for n in divided) else ""
        yield (
            f"parallel.pipeline_model_parallel_size {stages} with model.loop_span {model.loop_span}: "
            "stages would run different numbers of layers per loop, which the schedule does not support; set "
            f"parallel.pipeline_model_parallel_size=1{nearest}"
        )
