"""Upgrade configurations of earlier versions to the current names of their settings.

`upgrade` works on the nodes of a YAML document, which know their lines. `loader` uses it for files written by
programs, and `plt config upgrade` for users' files; elsewhere an old name is refused, and the error gives the new one.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from plt_megatron.config import yaml_nodes
from plt_megatron.config.presets import LOOP_PRESETS, PARAMETERISATION
from plt_megatron.config.rules.deepspeed import ADDABLE, DECIDED_BY, REFUSED
from plt_megatron.config.yaml_nodes import is_null

Settings = dict[str, yaml.Node]  # by dotted keys

_TEXT, _LIST, _MAPPING = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map"))

_WITH_PREFIX = (
    *("router_topk", "router_score_function", "router_load_balancing_type", "router_bias_update_rate"),
    *("ffn_hidden_size", "shared_expert_intermediate_size", "expert_capacity_factor", "aux_loss_coeff", "z_loss_coeff"),
)
_MOE = {"num_moe_experts": "num_experts", "first_k_dense_replace": "first_k_dense_replace"}
_MOE |= {f"moe_{name}": name for name in _WITH_PREFIX}
_PRE_SOFTMAX = ("model.moe_router_pre_softmax", "model.moe.router_pre_softmax")
_YARN = ("original_max_position_embeddings", "beta_fast", "beta_slow", "correction_range_round_to_int")
_FIM_TOKENS = ("prefix", "middle", "suffix")
_ENDS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")
# Old dotted key -> new one, with the same value.
_SAME_VALUE = {
    **{f"model.{old}": f"model.moe.{new}" for old, new in _MOE.items()},
    "model.rope_scaling_factor": "model.rope_scaling.factor",
    **{f"model.yarn_{name}": f"model.rope_scaling.yarn.{name}" for name in _YARN},
    "parallel.local_cp_comm_type": "parallel.window_cp_comm_type",
    "training.fp8_recipe": "training.fp8.recipe",
    "training.fp8_attention": "training.fp8.attention",
    **{f"training.{name}": f"training.fp8.{name}" for name in _ENDS},
    "training.on_spike": "training.spikes.action",
    "training.spike_threshold": "training.spikes.threshold",
    "training.spike_window": "training.spikes.window",
    "checkpoint.export_interval": "checkpoint.exports.interval",
    "checkpoint.export_upload_to": "checkpoint.exports.upload_to",
    "checkpoint.upload_to": "checkpoint.uploads.to",
    "checkpoint.upload_keep_last": "checkpoint.uploads.keep_last",
    "data.fim_rate": "data.fim.rate",
    "data.fim_spm_rate": "data.fim.spm_rate",
    "logging.profile_step_start": "logging.profile.step_start",
    "logging.profile_step_end": "logging.profile.step_end",
    "logging.profile_ranks": "logging.profile.ranks",
    "logging.straggler_interval": "logging.straggler.interval",
    "logging.straggler_threshold": "logging.straggler.threshold",
    "zero.stage": "deepspeed.zero_stage",
    "zero.offload_optimizer": "deepspeed.offload_optimizer",
    "zero.offload_param": "deepspeed.offload_param",
}
# Old dotted key -> new setting in words, with another value.
_OTHER_VALUE = {
    **dict.fromkeys(_PRE_SOFTMAX, "model.moe.router_score_function (softmax of the chosen experts, or pre_softmax)"),
    "model.ffn_output_norm": "model.norm_placement=pre_ffn_output (false: pre)",
    "model.hidden_norm": "model.loop_norm=rms (false: none)",
    "model.norm_between_loops": "model.loop_norm=final (false: none)",
    "model.hidden_scale_ratio": "model.hidden_scale (ratio x model.embedding_scale x model.init_method_std)",
    "model.moe_router_enable_expert_bias": "model.moe.router_bias_update_rate (null: no bias)",
    "model.rope_scaling_type": "model.rope_scaling.yarn, a section (null: Llama 3.1's)",
    "training.first_last_layers_bf16": "training.fp8.num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16",
    **{f"data.fim_{name}_token": "data.fim.tokens, of prefix, middle and suffix" for name in _FIM_TOKENS},
    "engine": "the section deepspeed, which chooses that engine (null: megatron-core's)",
    "zero": "the section deepspeed",
}
# Section -> the old setting that switched it off, and its value then, the default.
_OFF = {
    "model.moe": ("model.num_moe_experts", "null"),
    "model.rope_scaling": ("model.rope_scaling_factor", "null"),
    "training.fp8": ("training.fp8", "none"),
    "training.spikes": ("training.on_spike", "ignore"),
    "checkpoint.exports": ("checkpoint.export_interval", "0"),
    "checkpoint.uploads": ("checkpoint.upload_to", "null"),
    "logging.profile": ("logging.profile_step_end", "0"),
    "logging.straggler": ("logging.straggler_interval", "0"),
}
SWITCHES = {section: switch for section, (switch, _) in _OFF.items()}
SWITCHES |= {"deepspeed": "engine", "data.fim": "data.fim_rate", "evaluation": "evaluation.tasks"}
# Removed settings -> what holds for all runs instead.
GONE = {
    "data.index_timeout_minutes": "an hour for every run: leave it out, and build an index that takes longer ahead of "
    "time (plt preprocess --build-index)",
    "model.init_counts_loops": "false for every run: initial output projections count layers once; leave it out",
}
UPGRADE = "plt config upgrade FILE rewrites a file"
_DEEPSPEEDS_OWN = {key.partition(".")[0] for key in (*ADDABLE, *DECIDED_BY, *REFUSED)}


def new_name(key: str) -> str | None:
    """Return what a setting of an earlier version is now, in words; None if it has not moved."""
    section, _, rest = key.partition(".")
    if section == "deepspeed" and rest.partition(".")[0] in _DEEPSPEEDS_OWN:
        return f"deepspeed.config.{rest}"
    return _SAME_VALUE.get(key) or _OTHER_VALUE.get(key) or GONE.get(key)


def new_section(key: str, value: str) -> str | None:
    """Return what an old setting that became a section is now; None if `value` is not one of its old values."""
    if key != "training.fp8" or value not in ("none", "hybrid", "e4m3"):
        return None
    return "training.fp8=null" if value == "none" else f"training.fp8.format={value}"


def upgrade(document: yaml.MappingNode) -> yaml.MappingNode:
    """Return the document with the new names of its settings, or the document itself if none has moved."""
    settings = flat(document)
    if settings is None:
        return document  # the loader refuses it
    moved = _without(settings, [*GONE])
    for step in _STEPS:
        moved = step(moved)
    sections = {key[: match.start()] for key in moved for match in re.finditer(r"\.", key)}
    if moved == settings or sections & moved.keys():  # a section beside its old settings: the loader reports it
        return document
    return _nested(document, _pin_preset(moved))


def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a configuration, as checkpoints store them, under their new names."""
    document = typing.cast(yaml.MappingNode, _Quoting(sort_keys=False).represent_data(values))
    new = upgrade(document)
    return dict(values) if new is document else typing.cast(dict[str, Any], yaml_nodes.plain(new))


class _Quoting(yaml.representer.SafeRepresenter):
    """Makes nodes of plain values, in which every string is quoted and hence stays one."""


_Quoting.add_representer(str, lambda self, text: self.represent_scalar(_TEXT, text, style="'"))


# ---------------------------------------------------------------- settings that moved


def _switch_off(settings: Settings) -> Settings:
    for section, (switch, off) in _OFF.items():
        given = settings.get(switch)
        if given is not None and (is_null(given) if off == "null" else given.value == off):
            old = [key for key in settings if (new_name(key) or "").startswith(f"{section}.")]
            settings = _switched_off(settings, [switch, *old], section)
    return settings


def _upgrade_moe(settings: Settings) -> Settings:
    switch, rate = "model.moe_router_enable_expert_bias", "model.moe_router_bias_update_rate"
    return _switched(settings, switch, [rate], "1e-3", "null", "model.num_moe_experts")  # the former default


def _switched(settings: Settings, switch: str, keys: list[str], on: str, off: str, section: str) -> Settings:
    """Replace a switch of settings by their value `off` or, if it is on, `on` for those that are not given. It was off
    where it is missing beside the switch of its section."""
    if any(_SAME_VALUE[key] in settings for key in keys):
        return settings  # the loader refuses them
    if switch not in settings:
        given = [key for key in keys if key in settings and section in settings]
        return settings | {key: _scalar(off, settings[key]) for key in given}
    node = settings[switch]
    found = {key: settings.get(key, _scalar(on, node)) if _is_true(node) else _scalar(off, node) for key in keys}
    return _without(settings, [switch]) | found


def _upgrade_choices(settings: Settings) -> Settings:
    """Rename switches that are values of another setting now."""
    for old in _PRE_SOFTMAX:
        settings = _chosen(settings, old, "model.moe.router_score_function", "softmax", "pre_softmax")
    return _chosen(settings, "model.ffn_output_norm", "model.norm_placement", "pre", "pre_ffn_output")


def _chosen(settings: Settings, switch: str, key: str, off: str, on: str) -> Settings:
    """Replace a switch by the value `on` or `off` of the setting `key`, which keeps any value other than `off`."""
    if switch not in settings or _is(settings, key, on):
        return settings
    value = _scalar(on if _is_true(settings[switch]) else off, settings[switch])
    if key not in settings:
        return _renamed(settings, switch, key) | {key: value}
    settings = _without(settings, [switch])
    return settings | {key: value} if _is(settings, key, off) and value.value == on else settings


def _upgrade_loop_norm(settings: Settings) -> Settings:
    """Rename the two norms between loops, of which a model had one at most. One that is off says nothing of the other,
    which a preset beside it may have turned on."""
    kinds = {"model.hidden_norm": ("rms", "recommended"), "model.norm_between_loops": ("final", "loopcoder")}
    given = [key for key in kinds if key in settings]
    on = [key for key in given if _is_true(settings[key])]
    if len(on) > 1 or "model.loop_norm" in settings:
        return settings  # the loader refuses them
    preset = settings.get("model.loop_preset")
    for key in on or given:
        value, own_preset = kinds[key]
        others = [name for _, name in kinds.values() if name != own_preset]
        if not on and len(given) == 1 and preset is not None and preset.value in others:
            return _without(settings, given)
        new = {"model.loop_norm": _scalar(value if on else "none", settings[key])}
        return _renamed(_without(settings, [name for name in given if name != key]), key, *new) | new
    return settings


def _upgrade_hidden_scale(settings: Settings) -> Settings:
    """Resolve the ratio of h to E in the input of later loops; E has an RMS of `init_method_std` at first."""
    key, scale = "model.hidden_scale_ratio", "model.hidden_scale"
    if key not in settings:
        return settings
    ratio = settings[key]
    # The scales of `recommended` were the paper's, too.
    preset = LOOP_PRESETS["loopcoder" if _is(settings, "model.loop_preset", "loopcoder") else "paper"]
    value = preset["hidden_scale"]  # null alone undid the ratio of a preset
    if is_null(ratio) and scale in settings:
        return _without(settings, [key])
    if not is_null(ratio):
        factors = (key, 1.0), ("model.embedding_scale", preset["embedding_scale"]), ("model.init_method_std", 0.02)
        given, embedding, std = (_number(settings, name, default) for name, default in factors)
        value = given * abs(embedding) * std
    return _without(settings, [key]) | {scale: _scalar(yaml_nodes.text_of(value), ratio)}


def _pin_preset(settings: Settings) -> Settings:
    """Give beside `recommended` what it left to the paper's defaults when settings had their old names. In a file that
    includes others, which could set that, give what it set instead of it."""
    preset = settings.get("model.loop_preset")
    if preset is None or preset.value != "recommended":
        return settings
    included = "include" in settings
    pinned = {
        key: _scalar(yaml_nodes.text_of(value), preset)
        for name, value in LOOP_PRESETS["recommended" if included else "paper"].items()
        if (name in PARAMETERISATION) == included and (key := f"model.{name}") not in settings
    }
    return _without(settings | pinned, ["model.loop_preset"] if included else [])


def _number(settings: Settings, key: str, default: float) -> float:
    value = yaml_nodes.scalar(float, settings[key]) if key in settings else default
    return value if isinstance(value, float) else default


def _upgrade_rope_scaling(settings: Settings) -> Settings:
    kind = "model.rope_scaling_type"
    if kind in settings and settings[kind].value != "yarn":
        settings = _without(settings, [f"model.yarn_{name}" for name in _YARN])
    return _without(settings, [kind])


def _upgrade_fp8(settings: Settings) -> Settings:
    key, ends = "training.fp8", [f"training.{name}" for name in _ENDS]
    settings = _switched(settings, "training.first_last_layers_bf16", ends, "1", "0", key)
    return _renamed(settings, key, "training.fp8.format") if _is(settings, key, "hybrid", "e4m3") else settings


def _upgrade_deepspeed(settings: Settings) -> Settings:
    raw = [name for name in settings if name.startswith("deepspeed.") and new_name(name) is not None]
    if _is(settings, "engine", "megatron"):
        zero = [name for name in settings if name.partition(".")[0] in ("zero", "deepspeed")]
        return _switched_off(settings, ["engine", *zero], "deepspeed")
    new = {name: f"deepspeed.config.{name.removeprefix('deepspeed.')}" for name in raw}
    settings = _rename({new.get(name, name): node for name, node in settings.items()})
    if any(name.startswith("deepspeed.") for name in settings):
        return _without(settings, ["engine", "deepspeed", "zero"])
    if "engine" not in settings:
        return settings
    engine = settings["engine"]
    section = yaml.MappingNode(_MAPPING, [], engine.start_mark, engine.end_mark, flow_style=True)
    return _renamed(_without(settings, ["zero"]), "engine", "deepspeed") | {"deepspeed": section}


def _upgrade_fim(settings: Settings) -> Settings:
    tokens, old = [f"data.fim_{name}_token" for name in _FIM_TOKENS], ["data.fim_rate", "data.fim_spm_rate"]
    named = {key: settings[key] for key in tokens if key in settings and not is_null(settings[key])}
    spm_rate = settings.get("data.fim_spm_rate")
    if _is(settings, "data.fim_rate", "0", "0.0") and not named and (spm_rate is None or spm_rate.value == "0.5"):
        return _switched_off(settings, [*old, *tokens], "data.fim")
    if len(named) == len(tokens):
        nodes = list(named.values())
        first = nodes[0]
        settings["data.fim.tokens"] = yaml.SequenceNode(_LIST, nodes, first.start_mark, first.end_mark, flow_style=True)
        settings = _without(settings, tokens)
    elif not named:
        settings = _without(settings, tokens)
    return settings


def _upgrade_evaluation(settings: Settings) -> Settings:
    tasks = settings.get("evaluation.tasks")
    if isinstance(tasks, yaml.SequenceNode) and not tasks.value:
        return _switched_off(settings, [key for key in settings if key.startswith("evaluation.")], "evaluation")
    return settings


def _rename(settings: Settings) -> Settings:
    new = {key: _SAME_VALUE.get(key, key) for key in settings}
    return {key if new[key] in settings else new[key]: node for key, node in settings.items()}


# Values and what depends on other old names first, then the names, then what is one with another setting.
_STEPS: tuple[Callable[[Settings], Settings], ...] = (
    _switch_off,
    _upgrade_moe,
    _upgrade_rope_scaling,
    _upgrade_fp8,
    _upgrade_fim,
    _upgrade_evaluation,
    _upgrade_deepspeed,
    _rename,
    _upgrade_choices,
    _upgrade_loop_norm,
    _upgrade_hidden_scale,
)


def _switched_off(settings: Settings, old: list[str], section: str) -> Settings:
    """Replace the old settings of a section with null for it, in the place of the first one."""
    first = next(key for key in settings if key in old)
    kept = _without(settings, [key for key in old if key != first])
    return _renamed(kept, first, section) | {section: _scalar("null", settings[first])}


def _renamed(settings: Settings, key: str, new: str) -> Settings:
    """Give a setting another key, in its place."""
    return {new if name == key else name: node for name, node in settings.items()}


def _without(settings: Settings, keys: list[str]) -> Settings:
    return {key: node for key, node in settings.items() if key not in keys}


def _is(settings: Settings, key: str, *texts: str) -> bool:
    return key in settings and settings[key].value in texts


def _is_true(node: yaml.Node) -> bool:
    return yaml_nodes.scalar(bool, node) is True


def _scalar(text: str, like: yaml.Node) -> yaml.ScalarNode:
    return yaml.ScalarNode(_TEXT, text, like.start_mark, like.end_mark)


# ---------------------------------------------------------------- documents by dotted keys


def flat(document: yaml.MappingNode, prefix: str = "") -> Settings | None:
    """Return a document's values by dotted key, lists as they are; None if a key is repeated or not a plain name."""
    settings: Settings = {}
    for key, value in document.value:
        if not isinstance(key, yaml.ScalarNode) or "." in key.value or prefix + key.value in settings:
            return None
        inner = flat(value, f"{prefix}{key.value}.") if isinstance(value, yaml.MappingNode) and value.value else {}
        if inner is None:
            return None
        settings |= inner or {prefix + key.value: value}
    return settings


def _nested(document: yaml.MappingNode, settings: Settings) -> yaml.MappingNode:
    """Return settings as a document: each section where its first setting is, keys on the lines of their values or, if
    they have not moved, on their own."""
    root = yaml.MappingNode(_MAPPING, [], document.start_mark, document.end_mark, flow_style=document.flow_style)
    for key, value in settings.items():
        *sections, last = key.split(".")
        place, old = root, _entry(document, sections[0] if sections else last)
        for depth, name in enumerate(sections, start=1):
            entry = _entry(place, name)
            if entry is None:
                style = old is not None and isinstance(old[1], yaml.MappingNode) and old[1].flow_style
                section = yaml.MappingNode(_MAPPING, [], value.start_mark, value.end_mark, flow_style=style)
                entry = (_scalar(name, value) if old is None else old[0], section)
                place.value.append(entry)
            place = typing.cast(yaml.MappingNode, entry[1])
            old = None if old is None else _entry(old[1], [*sections, last][depth])
        place.value.append((_scalar(last, value) if old is None else old[0], value))
    return root


def _entry(section: yaml.Node, name: str) -> tuple[yaml.ScalarNode, yaml.Node] | None:
    """Return the key and value nodes of a name in a section; None if it is missing."""
    entries = section.value if isinstance(section, yaml.MappingNode) else []
    return next((entry for entry in entries if entry[0].value == name), None)
