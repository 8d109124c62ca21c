"""Hold a quantity equal across the values that a sweep compares, by changing their configurations.

    tokens            nothing is changed: the values must not set them
    training_flops    tokens, so that tokens x training FLOPs per token is the reference's
    effective_depth   layers, so that layers x loops is the reference's
    parameters        FFN width, so that the total is the reference's
    decode_latency    layers and FFN width, so that a decoded token takes as long as the reference's

A configuration that misses its target by more than the sweep's tolerance is refused.
"""

from __future__ import annotations

import bisect
import csv
import dataclasses
import io
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plt_megatron.config import derived
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import ModelConfig, RunConfig
from plt_megatron.config.yaml_nodes import read_text
from plt_megatron.errors import UserError
from plt_megatron.experiments.files import LOOP_SWITCHES, DecodeSettings, Hold
from plt_megatron.predict.decode_cost import decode_milliseconds
from plt_megatron.predict.flops import run_flops_per_token
from plt_megatron.predict.parameters import ParameterCount, count_parameters

# How far a width may be changed to meet a target: beyond it, the model would be of another kind.
_WIDTH_RANGE = (0.5, 2.0)
_WIDTH_STEP = 8  # columns, times the tensor-parallel size: suits matrix units


@dataclass(frozen=True)
class MatchedConfig:
    """A configuration matched to a target. `deviation`: (own - target) / target; `change`: what changed, in words."""

    config: RunConfig
    deviation: float
    change: str = ""


def flops_per_token(config: RunConfig, vocab: int) -> float:
    """Return the training FLOPs per token, averaged over the run."""
    padded = derived.padded_vocab_size(config.model, vocab, config.parallel.tensor_model_parallel_size)
    return run_flops_per_token(config, padded).total


def parameters(config: RunConfig, vocab: int) -> ParameterCount:
    return count_parameters(config.model, vocab, config.parallel.tensor_model_parallel_size)


def match_budget(
    config: RunConfig,
    reference: RunConfig,
    what: Hold,
    vocabs: tuple[int, int],
    decode: DecodeSettings,
    tolerance: float,
) -> MatchedConfig:
    """Change `config` so that `what` equals the reference's. `reference` itself is returned unchanged.

    Args:
        vocabs: vocabulary sizes of `config` and of `reference`.

    Raises `UserError` (a reason without the run's name) if the target cannot be met within `tolerance`.
    """
    if config == reference:
        return MatchedConfig(config, 0.0)
    if what in ("effective_depth", "decode_latency") and (config.model.loop_span or reference.model.loop_span):
        raise UserError(
            f"{what} is held by changing layers, and model.loop_span would then cover another part of them; leave it "
            "out, or hold training_flops or parameters"
        )
    held = {
        "tokens": lambda: MatchedConfig(config, derived.run_tokens(config) / derived.run_tokens(reference) - 1),
        "training_flops": lambda: _match_flops(config, reference, vocabs),
        "effective_depth": lambda: _match_depth(config, reference),
        "parameters": lambda: _match_parameters(config, reference, vocabs),
        "decode_latency": lambda: _match_latency(config, reference, vocabs, decode),
    }[what]()
    if abs(held.deviation) > tolerance:
        change = f" with {held.change}" if held.change else ""
        raise UserError(
            f"{what} cannot be held within {tolerance:.1%}: the nearest{change} is {held.deviation:+.1%} off; "
            "raise tolerance, or change the base run"
        )
    return held


def _match_flops(config: RunConfig, reference: RunConfig, vocabs: tuple[int, int]) -> MatchedConfig:
    vocab, of_reference = vocabs
    target = derived.run_tokens(reference) * flops_per_token(reference, of_reference)

    def flops(steps: int) -> float:
        held = _of_steps(config, steps)
        return derived.run_tokens(held) * flops_per_token(held, vocab)

    # FLOPs per token may vary with the number of steps: row lengths and loops can follow the tokens seen.
    above = 1
    while flops(above) <= target:
        above *= 2
    fitting = max(1, bisect.bisect_right(range(above), target, lo=1, key=flops) - 1)
    steps = min(fitting, fitting + 1, key=lambda steps: abs(flops(steps) - target))
    held = _of_steps(config, steps)
    return MatchedConfig(held, flops(steps) / target - 1, f"tokens {derived.run_tokens(held):,}")


def _of_steps(config: RunConfig, steps: int) -> RunConfig:
    """Return the run with another number of steps; a decay that it gives in steps keeps its share of them."""
    training = dataclasses.replace(config.training, train_iters=steps, train_tokens=None)
    if config.training.train_tokens is not None and config.training.batch_schedule:
        # Steps differ in tokens: the learning rate's clock, which counts what the length counts, stays the reference's.
        training = dataclasses.replace(config.training, train_tokens=BatchSchedule(config).tokens(steps))
    held, optimizer = dataclasses.replace(config, training=training), config.optimizer
    share = derived.lr_iters(held) / derived.lr_iters(config)
    given = {name: getattr(optimizer, name) for name in ("lr_decay_iters", "lr_wsd_decay_iters")}
    decays = {name: max(1, round(share * value)) for name, value in given.items() if value is not None}
    return dataclasses.replace(held, optimizer=dataclasses.replace(optimizer, **decays))


def _match_depth(config: RunConfig, reference: RunConfig) -> MatchedConfig:
    target = reference.model.num_layers * reference.model.loop_count
    loops, pipeline = config.model.loop_count, config.parallel.pipeline_model_parallel_size
    if target % (loops * pipeline):
        raise UserError(
            f"effective_depth cannot be held: {target} layers (layers x loops of the reference) do not divide by "
            f"{loops} loops{f' x {pipeline} pipeline stages' if pipeline > 1 else ''}; choose a base whose layers do"
        )
    return _nearest_shape(config, [(target // loops, config.model.ffn_hidden_size, 1.0)], 1.0)


def _match_parameters(config: RunConfig, reference: RunConfig, vocabs: tuple[int, int]) -> MatchedConfig:
    layers, (vocab, of_reference) = config.model.num_layers, vocabs
    shapes = [(layers, w, parameters(_with_shape(config, layers, w), vocab).total) for w in _widths(config, 1)]
    return _nearest_shape(config, shapes, parameters(reference, of_reference).total)


def _match_latency(
    config: RunConfig, reference: RunConfig, vocabs: tuple[int, int], decode: DecodeSettings
) -> MatchedConfig:
    if decode.table is not None:
        return _match_measured_latency(config, reference, Path(decode.table))

    def milliseconds(model: ModelConfig, vocab: int = vocabs[0]) -> float:
        return decode_milliseconds(model, vocab, decode.context_length, decode.batch_size, decode.gpu)

    stages = config.parallel.pipeline_model_parallel_size
    shapes = [
        (layers, width, milliseconds(_with_shape(config, layers, width).model))
        for layers in range(stages, 2 * config.model.num_layers + 1, stages)
        for width in _widths(config, _WIDTH_STEP)
    ]
    return _nearest_shape(config, shapes, milliseconds(reference.model, vocabs[1]), exact=1e-3)


def _widths(config: RunConfig, step: int) -> Iterable[int]:
    """Return FFN widths within `_WIDTH_RANGE` of the run's own, in steps that keep them divisible."""
    own = config.model.ffn_hidden_size
    step *= config.parallel.tensor_model_parallel_size
    low, high = (round(own * factor) for factor in _WIDTH_RANGE)
    return sorted({own, *range(-(-low // step) * step, high + 1, step)})


def _nearest_shape(
    config: RunConfig, shapes: Iterable[tuple[int, int, float]], target: float, exact: float = 0.0
) -> MatchedConfig:
    """Choose the shape (layers, FFN width, value) whose value is nearest to `target`; within `exact` counts as equal.

    Ties go to the smallest change of layers, then of width: gates alone do not justify another shape.
    """
    model = config.model

    def rank(shape: tuple[int, int, float]) -> tuple[float, int, int]:
        layers, width, value = shape
        far = max(abs(value / target - 1), exact)
        return far, abs(layers - model.num_layers), abs(width - model.ffn_hidden_size)

    layers, width, value = min(shapes, key=rank)
    changes = [f"layers {layers}"] if layers != model.num_layers else []
    changes += [f"FFN width {width}"] if width != model.ffn_hidden_size else []
    return MatchedConfig(_with_shape(config, layers, width), value / target - 1, ", ".join(changes))


def _with_shape(config: RunConfig, layers: int, width: int) -> RunConfig:
    model = dataclasses.replace(config.model, num_layers=layers, ffn_hidden_size=width)
    return dataclasses.replace(config, model=model)


# ---------------------------------------------------------------- measured latency

_SHAPE = ("num_layers", "ffn_hidden_size")
_SWITCHES = tuple(key.rpartition(".")[2] for key in LOOP_SWITCHES)
# Further settings that change times, and those of `moe`.
_TIMED = ("hidden_size", "num_attention_heads", "vocab_size", "qk_layernorm", "norm_placement")
_EXPERTS = ("num_experts", "router_topk", "ffn_hidden_size", "shared_expert_intermediate_size", "first_k_dense_replace")


def table_problems(configs: Collection[RunConfig], table: str) -> Iterator[str]:
    """Yield each setting that changes times, has no column in a table, and differs between a sweep's rows."""
    models = [config.model for config in configs]
    looped = [model for model in models if model.loop_count > 1]
    found: dict[str, set[object]] = {
        **{name: {getattr(model, name) for model in models} for name in _TIMED},
        "num_query_groups": {derived.num_query_groups(model) for model in models},
        "kv_channels": {derived.head_dim(model) for model in models},
        "moe": {tuple(getattr(model.moe, name, None) for name in _EXPERTS) for model in models},
        "window_size": {model.window_size for model in looped},
        "keys or values that loops share": {derived.shares_values(model) for model in looped if model.share_kv},
    }
    for what in (name for name, values in found.items() if len(values) > 1):
        yield f"{table} cannot tell models of other {what} apart: leave out decode.table"


def _match_measured_latency(config: RunConfig, reference: RunConfig, table: Path) -> MatchedConfig:
    """Choose the table's shape that decodes nearest to the reference's time, with the run's own loop switches."""
    rows = list(_read_table(table))
    target = next((ms for key, ms in rows if key == _table_key(reference.model)), None)
    if target is None:
        raise UserError(f"{table} has no row for the reference ({_describe_key(_table_key(reference.model))})")
    own = _table_key(config.model)
    candidates = [(key, ms) for key, ms in rows if key[len(_SHAPE) :] == own[len(_SHAPE) :]]
    if not candidates:
        raise UserError(f"{table} has no row for {_describe_key(own)}, nor for these switches with another shape")
    return _nearest_shape(config, [(int(key[0]), int(key[1]), ms) for key, ms in candidates], target)


def _table_key(model: ModelConfig) -> tuple[str, ...]:
    return _key({name: str(getattr(model, name)).lower() for name in (*_SHAPE, *_SWITCHES)})


def _key(values: dict[str, str]) -> tuple[str, ...]:
    """Return shape and switches; one loop, where the other switches have no effect, has their defaults."""
    if values["loop_count"] == "1":
        values |= {name: str(getattr(ModelConfig(), name)).lower() for name in _SWITCHES if name != "loop_count"}
    return tuple(values.values())


def _describe_key(key: tuple[str, ...]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip((*_SHAPE, *_SWITCHES), key, strict=True))


def _read_table(path: Path) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield (shape and switches, milliseconds) of each row of a CSV."""
    columns = (*_SHAPE, *_SWITCHES, "milliseconds")
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    missing = [name for name in columns if name not in (reader.fieldnames or [])]
    if missing:
        raise UserError(f"{path} lacks the column(s) {', '.join(missing)}")
    for number, row in enumerate(reader, start=2):
        values = {name: (row[name] or "").strip().lower() for name in columns}
        text = values.pop("milliseconds")
        try:
            milliseconds, smallest = float(text), min(int(values[name]) for name in _SHAPE)
        except ValueError:
            milliseconds = smallest = 0
        if not (0 < milliseconds < math.inf and smallest > 0):
            raise UserError(
                f"{path}:{number}: expected whole {', '.join(_SHAPE)} and a number of milliseconds, all above 0"
            )
        yield _key(values), milliseconds
