"""Switches of the model: settings that an export's config.json has a key for.

A switch is described here, by its key in `configuration_plt.py`, and by what it does in `modeling_plt.py`; exports,
imports and the model card follow. It has one default, in `ModelConfig` and `PLTConfig`, which is what an older export
without the key and a plain Llama have, and LoopCoder-v2 but for what its import states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig


@dataclass(frozen=True)
class Switch:
    """A setting that has a key.

    Attributes:
        setting: its name in `ModelConfig`.
        stored_as: its keys in config.json; its own name unless given.
        write, read: convert its value to the keys' values, in a tuple, and the keys' values to its own.
        title, said: its row on the model card; `said` returns None where the card has none.
        in_loopcoder: whether LoopCoder-v2's config.json has it, or its models do not depend on it.
    """

    setting: str
    stored_as: tuple[str, ...] = ()
    write: Callable[[Any], tuple[Any, ...]] = lambda value: (value,)
    read: Callable[..., Any] = lambda value: value
    title: str = ""
    said: Callable[[ModelConfig], str | None] = lambda model: None
    in_loopcoder: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        """Its keys in config.json."""
        return self.stored_as or (self.setting,)


def _shifted(model: ModelConfig) -> str | None:
    forms = {"heads": "half of the key/value heads", "channels": "half of each key's channels"}
    return {**forms, "learned": "learned shares"}.get(model.key_shift)


def _span(model: ModelConfig) -> str | None:
    if model.loop_span is None:
        return None
    first, last = model.loop_span
    return f"{first} to {last - 1} (counted from 0); those before and after them run once"


def _sharing(model: ModelConfig) -> str:
    return "no" if not model.share_kv else "yes" if model.share_values else "keys only"


def _window(model: ModelConfig) -> str:
    gate = f"{model.gate_activation} gate reads the {model.gate_input}, multiplies the {model.gate_side} part"
    return f"{model.window_size} keys, {gate}" if model.gated_window else "no"


def _full_attention(model: ModelConfig) -> str | None:
    windowed = derived.windows_earlier_loops(model)
    return f"in the last loop only; {model.window_size} keys in the others" if windowed else None


OF_LAYERS = (
    Switch("qk_layernorm", stored_as=("qk_norm",)),
    Switch("qkv_bias"),
    Switch(
        "norm_placement",
        stored_as=("norm_placement", "ffn_output_norm"),
        write=lambda placement: ("post" if placement == "post" else "pre", placement == "pre_ffn_output"),
        read=lambda placement, on_ffn_output: "pre_ffn_output" if on_ffn_output else placement,
    ),
    Switch("key_shift", title="keys of the previous token", said=_shifted),
)
OF_LOOPS = (
    Switch("loop_count", in_loopcoder=True),
    Switch("loop_span", title="layers that loop", said=_span),
    Switch(
        "loop_order",
        title="order of loops",
        said=lambda model: "by stack" if model.loop_order == "stack" else "by layer: 1, 1, 2, 2",
    ),
    Switch(
        "cross_loop_parallel",
        title="cross-loop parallelism",
        said=lambda model: "yes" if model.cross_loop_parallel else "no",
    ),
    Switch("share_kv", title="first-loop key/value sharing", said=_sharing),
    Switch("share_values"),
    Switch("gated_window", title="gated sliding window", said=_window),
    Switch("full_attention", title="attention to the whole context", said=_full_attention),
    Switch("window_size", in_loopcoder=True),
    Switch("gate_input", in_loopcoder=True),
    Switch("gate_side", in_loopcoder=True),
    Switch("gate_activation"),
    Switch(
        "loop_norm",
        stored_as=("norm_between_loops", "hidden_norm"),
        write=lambda norm: (norm == "final", norm == "rms"),
        read=lambda final, rms: "final" if final else "rms" if rms else "none",
        in_loopcoder=True,  # but for rms
    ),
    Switch("input_injection", in_loopcoder=True),
    Switch("embedding_scale", in_loopcoder=True),
    Switch("hidden_scale", in_loopcoder=True),
    Switch("learned_hidden_scale"),
)
SWITCHES = (*OF_LAYERS, *OF_LOOPS)


def stated(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of an export of `model`. A switch without effect, which may have a value that is refused where
    it has one, is at its default."""
    keys: dict[str, Any] = {}
    for switch in SWITCHES:
        keys |= zip(switch.keys, switch.write(getattr(model, switch.setting)), strict=True)
    keys["share_values"] = model.share_values or not model.share_kv
    keys["gated_window"] = model.gated_window and model.share_kv
    keys["full_attention"] = "every_loop" if model.share_kv else model.full_attention
    if not derived.adds_embeddings(model):
        keys |= {"embedding_scale": 1.0, "hidden_scale": 1.0, "hidden_norm": False, "learned_hidden_scale": "none"}
    return keys


def read(config: Any) -> dict[str, Any]:
    """Return the settings of `ModelConfig` that a `PLTConfig` has keys for."""
    return {switch.setting: switch.read(*(getattr(config, key) for key in switch.keys)) for switch in SWITCHES}


@dataclass(frozen=True)
class ImportOption:
    """An option of `plt import`, named like a switch, that gives a model another value of it.

    Attributes:
        argument: its keyword arguments for argparse.
        problem: says what is wrong with a value, given the files' model and the same with its new loops.
        beside: other settings that it takes.
    """

    argument: dict[str, Any]
    problem: Callable[[Any, ModelConfig, ModelConfig], str | None]
    beside: dict[str, Any] = field(default_factory=dict)


def new_loops_problem(source: ModelConfig, target: ModelConfig, have: str, says: str) -> str | None:
    """Return why an option about new loops does not fit: the files' model has several (`have`), or `target` none."""
    if source.loop_count > 1:
        return f"is for one-loop models; this model's {source.loop_count} loops have {have}"
    return None if target.loop_count > 1 else f"{says}: also give --loop-count 2 or more"


def _span_problem(span: list[int], source: ModelConfig, target: ModelConfig) -> str | None:
    if problem := new_loops_problem(source, target, "their layers", "says which layers loop"):
        return problem
    first, last = span
    if not 0 <= first < last <= source.num_layers:
        return f"{first} {last}: give 0 <= FIRST < LAST <= {source.num_layers}, the model's layers"
    return None


def _key_shift_problem(form: str, source: ModelConfig, target: ModelConfig) -> str | None:
    there = source.key_shift
    return None if there == "none" else f"is for models without it; this one has key_shift {there}: leave it out"


def _full_attention_problem(form: str, source: ModelConfig, target: ModelConfig) -> str | None:
    return new_loops_problem(source, target, "their attention", "is about later loops")


IMPORT_OPTIONS = {
    "loop_span": ImportOption(
        {
            "nargs": 2,
            "type": int,
            "metavar": ("FIRST", "LAST"),
            "help": "layers of a one-loop model to loop: FIRST (counted from 0) up to, but not including, LAST; "
            "the others run once (default: all loop)",
        },
        _span_problem,
    ),
    "key_shift": ImportOption(
        {
            "action": "store_const",
            "const": "learned",
            "help": "let each layer learn to take a share of its keys and values from the previous token "
            "(model.key_shift: learned); it starts at zero, so the initial logits do not change",
        },
        _key_shift_problem,
    ),
    "full_attention": ImportOption(
        {
            "choices": ["last_loop"],
            "help": "give each loop its own keys and values, and only the last the full context "
            "(model.full_attention); otherwise later loops share the first loop's and add gated windows",
        },
        _full_attention_problem,
        {"share_kv": False, "share_values": True, "gated_window": False},
    ),
}
