"""Random configurations, drawn from the schema: what changes in `tiny.yaml`, as dotted settings and their values.

Every field of the schema is drawn from its type: its choices, its range, lists of either. `SCALED` has values for those
whose range says nothing of what a tiny model can have, and `NOT_DRAWN` those that are left alone, and why. A setting's
value depends on the seed, the case and its own name, so a new setting does not change what is drawn for the others.

What is refused is mended: a setting that the first problem names is taken back, or drawn if it was not.
"""

from __future__ import annotations

import functools
import random
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from plt_megatron.config import yaml_nodes
from plt_megatron.config.fields import Range, field_types, plain_type, section_of
from plt_megatron.config.layout import DIMENSIONS
from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import RunConfig
from plt_megatron.config.validation import find_problems
from plt_megatron.errors import UserError
from tests.fuzz.sections import optional_sections, sections_of, value_of

TINY = Path(__file__).with_name("tiny.yaml")
Settings = dict[str, Any]  # dotted key -> value; lists of sections as lists of mappings
Problems = Callable[[RunConfig], Iterable[str]]  # what a kind of case cannot do, as `find_problems` says it

SIZES = {f"parallel.{setting}" for _, setting in DIMENSIONS.values()}
_ELSEWHERE = "other machines and services: tests of their own"
_GPU = "needs a GPU"
_LAYOUT = "drawn together, by `_draw_layout`"
# A setting, or a section with all of its settings -> why it is not drawn.
NOT_DRAWN: dict[str, str] = {
    "name": "says where the run lies",
    "output_dir": "says where the run lies",
    **dict.fromkeys(sorted(SIZES), _LAYOUT),
    "model.backend": "Transformer Engine's stand-in has a kind of its own",
    "model.fused_gated_window": _GPU,
    "parallel.distributed_timeout_minutes": "a slow machine is not a finding",
    "parallel.distributed_timeout_seconds_after_init": "a slow machine is not a finding",
    "data.tokenizer": "a file",
    "training.train_iters": "each kind of case has its own length",
    "training.threads_per_process": "cores are shared",
    "checkpoint.exports.upload_to": _ELSEWHERE,
    "checkpoint.uploads": _ELSEWHERE,
    "checkpoint.load": "another run",
    "checkpoint.weights_only": "another run",
    "evaluation": "processes of a minute each",
    "logging.wandb_project": _ELSEWHERE,
    "logging.peak_tflops": "measured where it is not given, which takes seconds",
    "logging.straggler": _GPU,
    "deepspeed": "DeepSpeed needs a pool of its own (tests/distributed/test_deepspeed.py)",
}

_FACTORS = (0.0, 0.25, 0.5, 2.0, 4.0)
# A setting, or the last part of its name -> what a tiny model can have of it.
SCALED: dict[str, Sequence[Any]] = {
    "model.num_layers": (1, 3, 4, 4, 5),
    "model.hidden_size": (8, 24, 32, 40),
    "model.ffn_hidden_size": (8, 16, 20, 40),
    "model.num_attention_heads": (1, 2, 6, 8),
    "model.num_query_groups": (1, 4, None),
    "model.kv_channels": (2, 4, 6, 8, 12),
    "model.vocab_size": (400, 513),  # the tokenizer has 380
    "model.make_vocab_size_divisible_by": (1, 7, 128),
    "model.rotary_base": (10.0, 100.0, 5e5),
    "model.rope_scaling.factor": (1.0, 4.0, 8.0),
    "model.rope_scaling.yarn.original_max_position_embeddings": (4, 8, 16),
    "model.rope_scaling.yarn.beta_fast": (2.0, 8.0),
    "model.rope_scaling.yarn.beta_slow": (0.25, 0.5),
    "model.layernorm_epsilon": (1e-6, 1e-3, 0.1),
    "model.init_method_std": (0.05, 0.1, 0.25),
    "model.loop_count": (1, 3, 4, 5),
    "model.loop_span": ([0, 2], [1, 3], [1, 4], [2, 3], [0, 1], [1, 2]),
    "model.window_size": (1, 2, 5, 8, 100),
    "model.embedding_scale": (-1.0, 0.0, 0.5, 1.5),
    "model.hidden_scale": (-0.5, 0.0, 0.3, 1.5),
    "model.residual_scale": (0.5, 2.0),
    "model.mup_base_hidden_size": (4, 8, 32),
    "model.moe.num_experts": (2, 4, 6, 8),
    "model.moe.first_k_dense_replace": (1, 2, 3),
    "model.moe.router_topk": (1, 3, 4),
    "model.moe.ffn_hidden_size": (8, 12, 20, 32),
    "model.moe.shared_expert_intermediate_size": (8, 12, 20, 32),
    "model.moe.aux_loss_coeff": (0.0, 0.05, 0.5),
    "model.moe.z_loss_coeff": (1e-3, 0.05),
    "model.moe.router_bias_update_rate": (1e-3, 1e-2, 0.1),
    "model.moe.expert_capacity_factor": (0.5, 1.0, 2.0),
    "parallel.num_layers_in_first_pipeline_stage": (1, 2, 3),
    "parallel.num_layers_in_last_pipeline_stage": (1, 2, 3),
    "parallel.recompute_num_layers": (2, 3),
    "data.sequence_length": (8, 12, 24, 32, 48),
    "data.sources": (
        [{"path": "build/fuzz/masked/text", "fim_rate": 0.0}],
        [{"path": "build/fuzz/one/text", "weight": 1e-6, "fim_rate": 1.0, "max_epochs": 9.0},
         {"path": "build/fuzz/two/text", "weight": 1e6, "name": "heavy"},
         {"path": "build/fuzz/masked/text", "fim_rate": 0.0}],
    ),
    "data.train_sources": (
        [{"path": "build/fuzz/two/text"}],
        [{"path": "build/fuzz/two/text", "fim_rate": 0.9}, {"path": "build/fuzz/one/text", "weight": 1e-3}],
    ),
    "data.validation_sources": (
        [{"path": "build/fuzz/one/text"}],
        [{"path": "build/fuzz/masked/text"}, {"path": "build/fuzz/one/text", "weight": 100.0}],
    ),
    "data.test_sources": ([{"path": "build/fuzz/one/text"}],),
    "data.index_cache": ("build/fuzz/index",),
    "data.fim.tokens": (["<fim_suffix>", "<fim_middle>", "<fim_prefix>"],),
    "data.length_schedule": (
        [{"until": 256, "sequence_length": 8}],
        [{"until": 150, "sequence_length": 4}],
        [{"until": 128, "sequence_length": 4}, {"until": 300, "sequence_length": 8}],
    ),
    "data.stages": (
        [{"until": 200, "sources": [{"path": "build/fuzz/two/text"}]}],
        [{"until": 128, "sources": [{"path": "build/fuzz/one/text"}]},
         {"until": 350, "sources": [{"path": "build/fuzz/two/text", "weight": 2.0},
                                   {"path": "build/fuzz/masked/text"}]}],
    ),
    "data.split": ("50,50,0", "1,1,1", "0.5,1e-2,0"),
    "data.order_samples": (32, 50, 333),
    "training.micro_batch_size": (1, 3, 4),
    "training.global_batch_size": (2, 4, 6, 12, 16),
    "training.train_tokens": (512, 800, 1024),
    "training.batch_schedule": (
        [{"until": 150, "global_batch_size": 4}],
        [{"until": 256, "global_batch_size": 4, "increment": 2}],
        [{"until": 64, "global_batch_size": 4}, {"until": 320, "global_batch_size": 12}],
    ),
    "training.loop_schedule": (
        [{"until": 0.5, "loop_count": 1}, {"loop_count": 2}],
        [{"until": 0.5, "loop_count": 2}, {"loop_count": 3}],
        [{"until": 0.25, "loop_count": 2}, {"loop_count": 1}],
        [{"loop_shares": [0.5, 0.5]}],
        [{"until": 0.5, "loop_count": 1}, {"loop_shares": [0.2, 0.3, 0.5], "ramp": 0.5}],
        [{"loop_shares": [0.4, 0.0, 0.6]}],
    ),
    "training.loop_loss_weights": ([0.3], [0.5, 0.25], [0.0, 0.4], [0.1, 0.2, 0.3]),
    "training.z_loss_coeff": (1e-3, 0.05),
    "training.trainable": (
        ["layers.0"],
        ["linear_proj.weight", "final_layernorm"],
        ["embedding"],
        ["linear_qkv", "*norm*"],
    ),
    "training.seed": (1, 7, 2**31 - 1),
    "training.spikes.window": (2, 4, 8),
    "training.spikes.threshold": (3.0, 50.0),
    "training.max_skipped_steps": (0, 1, 3),
    "optimizer.lr": (3e-4, 3e-3, 1e-2),
    "optimizer.min_lr": (0.0, 1e-3),
    "optimizer.lr_warmup_iters": (1, 2, 3),
    "optimizer.lr_decay_iters": (2, 3, 6),
    "optimizer.lr_wsd_decay_iters": (1, 2, 3),
    "optimizer.weight_decay": (0.0, 0.5),
    "optimizer.lr_mult": _FACTORS,
    "optimizer.wd_mult": _FACTORS,
    "optimizer.adam_beta1": (0.0, 0.5),
    "optimizer.adam_beta2": (0.5, 0.99),
    "optimizer.adam_eps": (1e-5, 1e-3),
    "optimizer.clip_grad": (0.0, 0.1, 5.0),
    "validation.interval": (1, 2, 3),
    "validation.iters": (0, 2),
    "validation.loop_counts": ([1], [1, 2], [3], [2, 4]),
    "checkpoint.save_interval": (1, 2, 3),
    "checkpoint.keep_last": (1, 3),
    "checkpoint.keep_every": (2, 3, 4),
    "logging.log_interval": (2, 3),
    "logging.profile.step_start": (1, 2),
    "logging.profile.step_end": (2, 3),
    "logging.profile.ranks": ([], [0], [1], [0, 1]),
}  # fmt: skip

# A setting -> what it needs beside it, which is hardly ever drawn by chance.
TOGETHER: dict[str, Settings] = {"model.full_attention": {"model.share_kv": False, "model.gated_window": False}}


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every setting; a list is one, whatever it holds."""
    for name, hint in field_types(cls).items():
        section = section_of(hint)
        if section is None:
            yield prefix + name, hint
        else:
            yield from leaves(section, f"{prefix}{name}.")


def reason_not_drawn(key: str) -> str | None:
    """Look it up for the setting, or for the section that it lies in; None: it is drawn."""
    parts = key.split(".")
    return next(filter(None, (NOT_DRAWN.get(".".join(parts[:end])) for end in range(1, len(parts) + 1))), None)


def values(key: str, hint: Any, default: Any) -> list[Any]:
    """List the values, other than `default`, that are drawn for a setting."""
    scaled = SCALED.get(key) or SCALED.get(key.rpartition(".")[0])
    found = list(scaled) if scaled is not None else _values_of_type(hint, default)
    if plain_type(hint)[2] and scaled is None:
        found.append(None)
    return [value for value in found if value != default]


def _values_of_type(hint: Any, default: Any) -> list[Any]:
    plain, metadata, _ = plain_type(hint)
    if plain is bool:
        return [False, True]
    if typing.get_origin(plain) is Literal:
        return list(typing.get_args(plain))
    if plain in (int, float):
        return _numbers(plain, [part for part in metadata if isinstance(part, Range)], default)
    if typing.get_origin(plain) is list:
        (item,) = typing.get_args(plain)
        section = section_of(item)
        single = _values_of_type(item, None) if section is None else [_section(section, pick) for pick in range(3)]
        return [[], *([value] for value in single), single, single[::-1]]
    return []  # text: only SCALED knows any


def _numbers(kind: type, ranges: list[Range], default: Any) -> list[Any]:
    """The ends of a small range, and what is near the default."""
    near = [0, 1, 2, 3] if not default else [0, 1, default / 2, 2 * default]
    near += [end for limits in ranges for end in (limits.low, limits.high) if abs(end) <= 100]
    if kind is float:
        near += [0.3, 0.9]
    numbers = {kind(number) for number in near}
    return sorted(number for number in numbers if not any(limits.problem(number) for limits in ranges))


def _section(cls: type, pick: int) -> dict[str, Any]:
    """A section of a list: of each field one of the values that its type has."""
    chosen = {}
    for name, hint in field_types(cls).items():
        found = _values_of_type(hint, None)
        if found:
            chosen[name] = found[pick % len(found)]
    return chosen


# ---------------------------------------------------------------- configurations


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as arguments of `plt train`."""
    return [f"{key}={_text(value)}" for key, value in settings.items()]


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_text, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_text(part)}" for name, part in value.items()) + "}"
    return yaml_nodes.text_of(value)


def is_drawn(settings: Mapping[str, Any]) -> bool:
    """Tell whether a tiny model can have them, in a layout of as many ranks as are drawn."""
    every = dict(leaves())
    return all(
        key in SIZES or value in values(key, every[key], None) or value == value_of(tiny(), key)
        for key, value in settings.items()
    )


def load(settings: Mapping[str, Any]) -> RunConfig:
    """`tiny.yaml` with these settings."""
    return load_config(TINY, overrides(settings))


@functools.cache
def tiny() -> RunConfig:
    """Without any."""
    return load({})


def refusals(settings: Mapping[str, Any], kind: Problems) -> list[str]:
    """Why settings are not tried: they cannot be read, or see `problems`."""
    try:
        return problems(load(settings), kind)
    except UserError as error:
        return str(error).splitlines()


def problems(config: RunConfig, kind: Problems) -> list[str]:
    """Why a configuration is not tried: it is refused, or not what the kind of case can compare."""
    return find_problems(config, check_files=False) or list(kind(config))


def draw(
    title: str,
    number: int,
    fixed: Mapping[str, Any],
    kind: Problems,
    *,
    sections: Sequence[str] = ("model", "parallel", "data", "training", "optimizer"),
    layout: bool = True,
    mend: bool = True,
) -> Settings:
    """The settings of case `number` of the seed and kind in the `title`, besides `fixed` ones.

    Args:
        sections: of the schema, whose settings are drawn.
        layout: whether several processes are.
        mend: until nothing is refused; else as they come.
    """
    every = {key: hint for key, hint in leaves() if key.partition(".")[0] in sections and key not in fixed}
    rng = random.Random(f"{title} {number}")
    share = rng.choice((0.05, 0.15, 0.3, 0.5))
    settings: Settings = {}
    if layout:
        settings |= _draw_layout(rng)
    on = {section for section in optional_sections() if random.Random(f"{title} {number} {section}").random() < share}
    on |= {section for key in (*settings, *fixed) for section in sections_of(key)}
    for key, hint in every.items():
        own = random.Random(f"{title} {number} {key}")
        if reason_not_drawn(key) is None and own.random() < share and on.issuperset(sections_of(key)):
            settings |= _one(own, key, hint)
    for section in sorted(on):
        settings |= _turned_on(rng, section, {**settings, **fixed}, every)
    for key in TOGETHER.keys() & settings.keys() if mend else ():
        settings |= TOGETHER[key]
    settings = {**settings, **fixed}
    return _mended(settings, fixed, kind, every, rng) if mend else settings


def _one(rng: random.Random, key: str, hint: Any) -> Settings:
    found = values(key, hint, value_of(tiny(), key))
    return {key: rng.choice(found)} if found else {}


def _turned_on(rng: random.Random, section: str, settings: Settings, every: Mapping[str, Any]) -> Settings:
    """Draw what a section needs to be on, besides `settings`; nothing if one that it lies in is off."""
    key = optional_sections()[section]
    if key in settings or key not in every or reason_not_drawn(key) is not None:
        return {}
    if any(optional_sections()[outer] not in settings for outer in sections_of(section)):
        return {}
    return {key: rng.choice([*values(key, every[key], None)])}


_LAYOUTS = {name: f"parallel.{setting}" for name, (_, setting) in DIMENSIONS.items()}
MOST_RANKS = 8


def _draw_layout(rng: random.Random) -> Settings:
    """One dimension, two or three, of two ranks, seldom of more: at most eight."""
    while True:
        chosen = sorted({*rng.sample((*_LAYOUTS, "TP", "PP", "CP"), rng.choice((1, 2, 2, 3)))})
        sizes = {_LAYOUTS[name]: rng.choice((2,) * 8 + (3, 4)) for name in chosen}
        ranks = _product(size for key, size in sizes.items() if key != _LAYOUTS["EP"])
        if _LAYOUTS["EP"] in sizes:
            sizes["model.moe.num_experts"] = rng.choice((4, 8))
            if ranks % sizes[_LAYOUTS["EP"]] or _LAYOUTS["DP"] not in sizes:
                sizes[_LAYOUTS["DP"]] = sizes[_LAYOUTS["EP"]]
                ranks = _product(size for key, size in sizes.items() if key in SIZES and key != _LAYOUTS["EP"])
        if _LAYOUTS["TP"] in sizes and rng.random() < 0.6:
            sizes["parallel.sequence_parallel"] = True
        if ranks <= MOST_RANKS:
            return {_LAYOUTS["DP"]: 1, **sizes}


def _product(sizes: Iterable[int]) -> int:
    return functools.reduce(lambda one, other: one * other, sizes, 1)


def wild(words: str, number: int) -> Settings:
    """Settings as they come, ends of ranges and what is beyond among them: most are refused."""
    rng = random.Random(f"{words} wild {number}")
    settings = _draw_layout(rng)
    drawn = [(key, hint) for key, hint in leaves() if reason_not_drawn(key) is None]
    for key, hint in rng.sample(drawn, rng.choice((1, 2, 4, 8))):
        default = value_of(tiny(), key)
        for section in sections_of(key):
            settings |= _turned_on(rng, section, settings, dict(leaves()))
        settings[key] = rng.choice(
            [*values(key, hint, default), *_ends(hint), *_values_of_type(hint, default), default]
        )
    return settings


def _ends(hint: Any) -> list[Any]:
    """The ends of a number's range, and their neighbors outside."""
    plain, metadata, _ = plain_type(hint)
    ends = [end for part in metadata if isinstance(part, Range) for end in (part.low, part.high) if abs(end) < 1e300]
    return [plain(number) for end in ends for number in (end - 1, end, end + 1)] if plain in (int, float) else []


_KEY = re.compile(r"\b(?:[a-z_]+\.)+[a-z_0-9]+")


def _mended(
    settings: Settings, fixed: Mapping[str, Any], kind: Problems, every: Mapping[str, Any], rng: random.Random
) -> Settings:
    """Without what is refused. Takes back a setting that the first problem names, or draws one: that of a layout last,
    since another configuration of the same layout says more than one of another."""
    for turn in range(400):
        found = refusals(settings, kind)
        if not found:
            return settings
        named = [key for key in _named(found[0], settings) if key not in fixed]
        drawn = [key for key in named if key in settings]
        missing = [key for key in _named(found[0], every) if key not in settings and reason_not_drawn(key) is None]
        if missing and turn < 60 and rng.random() < 0.3:
            key = rng.choice(missing)
            for section in sections_of(key):
                settings |= _turned_on(rng, section, settings, every)
            settings |= _one(rng, key, every[key])
            continue
        first = [key for key in drawn if key not in SIZES] if rng.random() < 0.9 else []
        _take_back(settings, rng.choice(first or drawn or [key for key in settings if key not in fixed]), fixed)
    raise AssertionError(f"nothing mends {settings}: {found}")


def _take_back(settings: Settings, key: str, fixed: Mapping[str, Any]) -> None:
    """Remove a setting, and with one that turns a section on all of that section's."""
    off = {section for section, needed in optional_sections().items() if needed == key}
    for other in [other for other in settings if other == key or off.intersection(sections_of(other))]:
        if other not in fixed:
            del settings[other]


def _named(problem: str, known: Iterable[str]) -> list[str]:
    """The settings that a problem names: in full, or by the last part of their name."""
    known = list(known)
    dotted = [key.rstrip(".") for key in _KEY.findall(problem)]
    full = [key for key in known if any(key == name or name.startswith(f"{key}.") for name in dotted)]
    short = set(words(problem))
    return full + [key for key in known if key not in full and key.rpartition(".")[2] in short]


def words(problem: str) -> list[str]:
    """Words of a problem that may be names of settings."""
    return re.findall(r"[a-z_0-9]{2,}", problem)
