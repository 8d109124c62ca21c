"""Output of plt estimate, as tables or JSON."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence

from plt_megatron.config import derived
from plt_megatron.config.layout import layout_of
from plt_megatron.config.loader import load_config
from plt_megatron.config.loop_schedule import LoopSchedule
from plt_megatron.config.schedules import BatchSchedule
from plt_megatron.config.schema import CheckpointConfig, RunConfig
from plt_megatron.errors import UserError
from plt_megatron.predict.cards import GIB, find_gpu_spec
from plt_megatron.predict.decode_cost import DecodeCost, decode_cost
from plt_megatron.predict.flops import flops_of_loops
from plt_megatron.predict.layout import layout_overrides, problems_on
from plt_megatron.predict.parameters import count_parameters
from plt_megatron.predict.run_estimate import USABLE_SHARE, RunEstimate, estimate_run, known_vocab_size
from plt_megatron.predict.search import Candidate, SearchResult, model_flops_share, search
from plt_megatron.run_folder.text import format_bytes, format_duration, format_memory, format_table, plural

UNITS = {"GiB": GIB, "MiB": 1 << 20}


def print_estimate(options: Namespace, tokenizer_size: Callable[[str], int]) -> int:
    """Print the estimate and return the command's exit status.

    `options` are those of `commands/estimate.py`. `tokenizer_size` returns the vocabulary size of a tokenizer file, for
    configurations that do not set it. Raises `UserError` on a configuration that validation refuses (without checking
    files on this machine).
    """
    world_size = None if options.nodes is None else options.nodes * options.gpus_per_node
    layout = layout_overrides(options.layout) if options.layout else []
    config = load_config(options.config, layout + options.overrides)
    vocab_size = known_vocab_size(config, tokenizer_size)
    if options.search:
        return _answer_search(options, config, vocab_size, world_size or layout_of(config).world_size)
    problems = problems_on(config, world_size, find_gpu_spec(options.gpu).capability)
    if problems:
        raise UserError("\n".join(problems))
    cards = {"gpu": options.gpu, "gpus_per_node": options.gpus_per_node}
    estimate = estimate_run(config, world_size=world_size, vocab_size=vocab_size, **cards)
    decoding = decode_cost(
        config.model,
        vocab_size=vocab_size,
        context_length=options.context or config.data.sequence_length,
        batch_size=options.batch,
        gpu=options.gpu,
    )
    if options.json:
        print(json.dumps(dataclasses.asdict(estimate) | {"decode": dataclasses.asdict(decoding)}, indent=2))
    else:
        print("\n".join(_report(options, config, vocab_size, estimate, decoding)))
    return 0


# One run.


def _report(
    options: Namespace, config: RunConfig, vocab_size: int, estimate: RunEstimate, decoding: DecodeCost
) -> Iterator[str]:
    yield _section("Model", _model_rows(config, vocab_size, estimate))
    yield _section("Training FLOPs per token", _flops_rows(config, vocab_size, estimate))
    yield _section(f"Run: {estimate.layout}, {estimate.world_size} x {estimate.gpu}", _run_rows(config, estimate))
    unit = "GiB" if estimate.peak_memory_bytes >= GIB else "MiB"
    yield _section(f"Memory of the worst rank of each stage, {unit}", *_memory_rows(estimate, unit))
    yield _verdict(estimate)
    yield ""
    sent = [[name, format_bytes(amount)] for name, amount in estimate.communication.items()]
    yield _section("Sent per step and rank", sent or [["nothing", ""]])
    yield _section("Time of a step", _time_rows(config, estimate))
    yield _section("Decoding", _decode_rows(options, config, decoding))


def _model_rows(config: RunConfig, vocab_size: int, estimate: RunEstimate) -> list[list[str]]:
    counted = count_parameters(config.model, vocab_size, estimate.layout.tensor)
    rows = [["parameters", f"{estimate.parameters_total:,}", "total"]]
    rows.append(["", f"{estimate.parameters_active:,}", "active per token"])
    rows += [["", f"{count:,}", name.replace("_", " ")] for name, count in dataclasses.asdict(counted).items() if count]
    return rows


def _flops_rows(config: RunConfig, vocab_size: int, estimate: RunEstimate) -> list[list[str]]:
    rows = [["total", f"{estimate.flops_per_token:.4g}", "100 %"]]
    parts = dataclasses.asdict(estimate.flops)
    rows += [[name.replace("_", " "), *_share(part, estimate.flops_per_token)] for name, part in parts.items() if part]
    padded = derived.padded_vocab_size(config.model, vocab_size, estimate.layout.tensor)
    loops = flops_of_loops(config, padded)
    return rows + [
        [f"loop {loop}", *_share(part, estimate.flops_per_token)] for loop, part in enumerate(loops, start=1)
    ]


def _share(part: float, whole: float) -> tuple[str, str]:
    return f"{part:.4g}", f"{100 * part / whole:.1f} %"


def _run_rows(config: RunConfig, estimate: RunEstimate) -> list[list[str]]:
    steps = derived.train_iters(config)
    layout = estimate.layout
    shares = {plural(loops, "loop"): f"{share:.1%}" for loops, share in LoopSchedule(config).mean_shares().items()}
    schedule = [[loops, share, "of steps"] for loops, share in shares.items() if config.training.loop_schedule]
    return [
        ["tokens", f"{estimate.tokens:,}", f"{steps:,} steps of {BatchSchedule(config).step_in_words}"],
        *schedule,
        ["training FLOPs", f"{estimate.total_flops:.4g}"],
        [
            "microbatches",
            f"{layout.microbatches}",
            f"of {plural(layout.micro_batch_size, 'sequence')}, per step and DP rank",
        ],
        ["recomputation", layout.recompute, f"backend {layout.backend}"],
        ["pipeline bubble", f"{100 * estimate.bubble_fraction:.1f} %", "of the working time"],
        ["estimated time", format_duration(estimate.total_seconds), f"{_count(estimate.gpu_hours)} device hours"],
    ] + (_checkpoint_rows(estimate, config.checkpoint) if config.checkpoint.enabled else [])


def _checkpoint_rows(estimate: RunEstimate, checkpoint: CheckpointConfig) -> list[list[str]]:
    older = f", and one every {plural(checkpoint.keep_every, 'step')}" if checkpoint.keep_every else ""
    return [
        ["checkpoint", format_bytes(estimate.checkpoint_bytes), f"{checkpoint.keep_last} kept{older}"],
        ["saving one", format_bytes(estimate.saving_bytes), "of host memory per process"],
    ]


def _memory_rows(estimate: RunEstimate, unit: str) -> tuple[list[list[str]], list[str]]:
    """Return the rows and their header."""
    size = UNITS[unit]
    names = [name for name in estimate.memory[0].components if any(stage.components[name] for stage in estimate.memory)]
    chosen = estimate.memory
    if len(chosen) > 4:  # first, last and the worst in between
        between = max(chosen[1:-1], key=lambda stage: stage.total_bytes)
        chosen = [chosen[0], between, chosen[-1]]
    rows = [[name, *(f"{stage.components[name] / size:,.2f}" for stage in chosen)] for name in names]
    rows.append(["at the peak", *(f"{stage.total_bytes / size:,.2f}" for stage in chosen)])
    return rows, ["", *(f"stage {stage.stage}" for stage in chosen)]


def _verdict(estimate: RunEstimate) -> str:
    worst = max(estimate.memory, key=lambda stage: stage.total_bytes)
    device = estimate.device_memory_bytes / GIB
    word = "fits" if estimate.fits else "DOES NOT FIT"
    return (
        f"peak in stage {worst.stage}, at {worst.phase}; {word}: {worst.total_bytes / GIB:.2f} of "
        f"{USABLE_SHARE * device:.1f} GiB usable on a {estimate.gpu} of {device:.1f} GiB"
    )


def _time_rows(config: RunConfig, estimate: RunEstimate) -> list[list[str]]:
    total = estimate.step_seconds
    rows = [["total", f"{total:.3g} s", "100 %"]]
    for name, seconds in dataclasses.asdict(estimate.times).items():
        if seconds:
            rows.append([name.replace("_", " "), f"{seconds:.3g} s", f"{100 * seconds / total:.1f} %"])
    tokens, mfu = estimate.tokens / estimate.total_seconds, model_flops_share(estimate, config)
    rows.append(["tokens/s", f"{tokens:,.0f}", f"MFU {100 * mfu:.0f} %"])
    return rows


def _decode_rows(options: Namespace, config: RunConfig, decoding: DecodeCost) -> list[list[str]]:
    context = options.context or config.data.sequence_length
    rows = [
        ["decode step", f"{decoding.milliseconds:.3g} ms", f"bound by {decoding.bound}"],
        ["", format_bytes(decoding.bytes), f"read for {plural(options.batch, 'sequence')} of {context:,} tokens"],
        ["", f"{decoding.flops / 1e9:.3g} GFLOP", ""],
        ["KV cache", format_bytes(decoding.kv_cache_bytes), "per sequence"],
        ["other state", format_bytes(decoding.state_bytes), "per sequence: windows and carried states"],
    ]
    if config.model.loop_count > 1:
        first = decoding.loops_stop_being_free_at
        when = f"from batch {first}" if first else "at no batch size"
        why = "over 5 % more than one loop" if first else "5 % more than one loop at most"
        rows.append(["extra loops cost time", when, why])
    return rows


# A search.


def _answer_search(options: Namespace, config: RunConfig, vocab_size: int, world_size: int) -> int:
    cards = {"gpu": options.gpu, "gpus_per_node": options.gpus_per_node}
    found = search(config, world_size=world_size, vocab_size=vocab_size, **cards)
    if found.nearest is None:
        raise UserError("\n".join(_no_layout(config, world_size, found)))
    if options.json:
        chosen = found.fitting[: options.top]
        rows = [{"overrides": each.overrides, **dataclasses.asdict(each.estimate)} for each in chosen]
        print(json.dumps(rows, indent=2))
    else:
        print("\n".join(_search_report(options, config, world_size, found, found.nearest)))
    return 0 if found.fitting else 1


def _no_layout(config: RunConfig, world_size: int, found: SearchResult) -> Iterator[str]:
    if found.tried:
        yield f"none of {found.tried} layouts of {world_size} ranks is valid for this configuration"
        yield from (f"frequent reason: {problem}" for problem in found.problems)
        return
    yield (
        f"{world_size} ranks cannot be arranged: no tensor x pipeline size (of {config.model.num_attention_heads} "
        f"heads and {config.model.num_layers} layers) leaves a data parallel size that divides "
        f"training.global_batch_size {config.training.global_batch_size}; use another number of nodes"
    )


def _search_report(
    options: Namespace, config: RunConfig, world_size: int, found: SearchResult, nearest: Candidate
) -> Iterator[str]:
    memory = nearest.estimate.device_memory_bytes
    usable = USABLE_SHARE * memory / GIB
    yield (
        f"{found.tried} layouts of {world_size} x {options.gpu}: {found.accepted} valid, {len(found.fitting)} fit "
        f"into {usable:.1f} GiB (of {memory / GIB:.1f})"
    )
    yield ""
    if not found.fitting:
        yield from _nearest(nearest, usable)
        return
    header = ["layout", "micro batch", "recompute", "GiB", "s/step", "MFU", "overhead over the model's FLOPs"]
    yield format_table([_candidate_row(config, each) for each in found.fitting[: options.top]], header=header)
    yield ""
    yield f"best: {found.fitting[0].command_line}"


def _candidate_row(config: RunConfig, candidate: Candidate) -> list[str]:
    estimate, layout = candidate.estimate, candidate.estimate.layout
    spent = ", ".join(f"{100 * share:.0f} % {name}" for name, share in candidate.overheads[:3] if share >= 0.005)
    return [
        str(layout),
        str(layout.micro_batch_size),
        layout.recompute,
        f"{estimate.peak_memory_bytes / GIB:.1f}",
        f"{estimate.step_seconds:.3g}",
        f"{100 * model_flops_share(estimate, config):.0f} %",
        spent,
    ]


def _nearest(nearest: Candidate, usable: float) -> Iterator[str]:
    estimate = nearest.estimate
    worst = max(estimate.memory, key=lambda stage: stage.total_bytes)
    yield f"none fits; nearest: {nearest.command_line}"
    yield f"it needs {worst.total_bytes / GIB:.1f} GiB in stage {worst.stage}, {usable:.1f} are usable; largest parts:"
    largest = sorted(worst.components.items(), key=lambda item: -item[1])[:3]
    yield format_table([[name, format_memory(size)] for name, size in largest])
    yield "use more devices, to shard optimizer state and allow more stages, or shorter sequences, to save activations"


# Text.


def _count(number: float) -> str:
    return f"{number:,.0f}" if number >= 99.5 else f"{number:.2g}"


def _section(title: str, rows: list[list[str]], header: Sequence[str] = ()) -> str:
    return f"{title}\n{'-' * len(title)}\n{format_table(rows, header=header)}\n"
