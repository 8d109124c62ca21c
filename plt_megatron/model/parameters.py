"""The table of every parameter that a PLT can have, and of the buffers stored with them: names, shapes, splits, initial
values, and use.

Derived from this table: the Hugging Face mapping (`hf/conversion.py`), counts and FLOPs (`predict`), initial
weights (`model/build.py`), weight decay, what a one-loop checkpoint lacks (`train/checkpoint`), and in how
many parts DeepSpeed gets a gradient. This module does not import torch, since estimates read it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, Literal

from plt_megatron.config import derived
from plt_megatron.config.schema import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

LAYER, EXPERT = "{layer}", "{expert}"  # in a name: one parameter for each, counted from 0 over the whole model
_OURS, _THEIRS = f"decoder.layers.{LAYER}.", f"model.layers.{LAYER}."

# How a parameter of ours is built from Hugging Face's. qkv: rows by query group: its queries, its key, its value;
# gate_up: SwiGLU's gate rows, then its up rows.
Form = Literal["direct", "qkv", "gate_up"]
_WIDTHS = ("hidden", "query", "ffn", "expert_ffn", "shared_ffn")  # dimensions that muP assumes to grow in proportion
_THEIR_ROWS = {"qkv": ("query", "key_value", "key_value"), "gate_up": ("ffn", "ffn")}
# A constant; normal: with std `init_method_std`; output: normal, divided by sqrt(2 * num_layers), for layers that write
# into the residual stream (Megatron's scaled initialization); hidden_scale: the constant that the settings define;
# final_norm: 1, or muP's multiplier of the logits.
Init = float | Literal["normal", "output", "hidden_scale", "final_norm"]
Component = Literal[
    "embedding", "loop_input", "attention", "ffn", "norms", "gates", "router", "experts", "final_norm", "output_layer"
]

Kind = Literal["embedding", "head", "hidden", "gates", "norms"]  # fields of the schema's `RateFactors`


@dataclass(frozen=True)
class Sizes:
    """Sizes of the dimensions named in the table."""

    vocab: int
    hidden: int
    heads: int
    groups: int
    head_dim: int
    query: int
    key_value: int
    qkv: int
    query_norm: int
    key_norm: int
    ffn: int  # of a dense FFN
    gate_up: int
    experts: int
    expert_ffn: int
    expert_gate_up: int
    shared_ffn: int  # of a shared expert
    shared_gate_up: int
    one: int = 1

    @classmethod
    def of(cls, model: ModelConfig, vocab_size: int) -> Sizes:
        """Return a model's sizes. `vocab_size`: rows of the embedding, with or without padding."""
        heads, groups, head_dim = model.num_attention_heads, derived.num_query_groups(model), derived.head_dim(model)
        query, key_value = heads * head_dim, groups * head_dim
        ffn, expert_ffn = model.ffn_hidden_size, derived.expert_ffn_hidden_size(model)
        return cls(
            vocab=vocab_size,
            hidden=model.hidden_size,
            heads=heads,
            groups=groups,
            head_dim=head_dim,
            query=query,
            key_value=key_value,
            qkv=query + 2 * key_value,
            query_norm=query if model.norm_placement == "post" else head_dim,
            key_norm=key_value if model.norm_placement == "post" else head_dim,
            ffn=ffn,
            gate_up=2 * ffn,
            experts=derived.num_experts(model),
            expert_ffn=expert_ffn,
            expert_gate_up=2 * expert_ffn,
            shared_ffn=derived.shared_expert_size(model),
            shared_gate_up=2 * derived.shared_expert_size(model),
        )

    def shape(self, dims: str) -> tuple[int, ...]:
        """Return the sizes of dimensions given by name, such as `"qkv hidden"`."""
        return tuple(getattr(self, name) for name in dims.split())


@dataclass(frozen=True)
class Parameter:
    """A row of the table.

    Attributes:
        name: megatron-core's name in the whole model, with `LAYER` and `EXPERT`.
        dims: names of its dimensions, attributes of `Sizes`.
        component: the part of the model it belongs to, for counting and for optimizer groups.
        hf: Hugging Face's names, with `LAYER` and `EXPERT`: Llama's and PLT's gate, the same in all families we read.
        form: how it is built from the tensors of `hf`.
        split: how tensor-parallel ranks split it, gate and up rows separately; None: replicated.
        init: initial value.
        exists: whether a model that has such layers has it.
        ffn: kind of FFN of the layers that have it; None: all layers.
        gate_logit: whether negating it makes the gate multiply the other attention, as in LoopCoder-v2's files.
        in_core_attention: whether it is used in the core attention of loops >= 2, not in the layer around it.
        copy: name of its copy in a pipeline's last stage, which trains it too.
        feeds_linear: of a norm, whether a linear layer reads its output, and keeps it for its own gradients.
        mixes_tokens: which of K and V it mixes with the token before. Its gradient is summed over tensor-parallel
            ranks in each backward pass, not once per step.
        is_buffer: whether the training loop sets it instead of learning it; fp32 whatever the model's precision.
    """

    name: str
    dims: str
    component: Component
    hf: tuple[str, ...]
    form: Form = "direct"
    split: Literal["rows", "columns"] | None = None
    init: Init = "normal"
    exists: Callable[[ModelConfig], bool] = lambda model: True
    ffn: Literal["dense", "experts"] | None = None
    gate_logit: bool = False
    in_core_attention: bool = False
    copy: str | None = None
    feeds_linear: bool = False
    mixes_tokens: Literal["key", "value"] | None = None
    is_buffer: bool = False

    @property
    def hf_dims(self) -> list[str]:
        """Dimension names of each tensor of `hf`."""
        if self.form == "direct":
            return [self.dims]
        return [self.dims.replace(self.form, rows) for rows in _THEIR_ROWS[self.form]]

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix: these decay and, except for the embedding, are multiplied with tokens, unlike vectors
        (norms, biases)."""
        return " " in self.dims

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it maps hidden states to hidden states inside a layer; Muon orthogonalizes these matrices.

        A gate is not one: its rows are unrelated vectors, one per head.
        """
        return self.is_matrix and self.component in ("attention", "ffn", "experts", "router")

    @property
    def follows_width(self) -> bool:
        """Whether muP gives it a learning rate of its own: matrices that sum over a width, and the final norm, whose
        weight contains muP's multiplier of the logits."""
        if self.component == "final_norm":
            return True
        sums_over_width = self.dims.split()[-1] in _WIDTHS
        return self.is_matrix and sums_over_width and self.component not in ("embedding", "output_layer")

    @property
    def kind(self) -> Kind:
        """Optimizer group; selects lr_mult and wd_mult."""
        if self.is_hidden_matrix:
            return "hidden"
        kinds: dict[str, Kind] = {
            "embedding": "embedding",
            "output_layer": "head",
            "gates": "gates",
            "loop_input": "gates",
        }
        return kinds.get(self.component, "norms")

    @property
    def only_in_loops(self) -> bool:
        """Whether it exists only in models with several loops."""
        return self.component in ("gates", "loop_input")

    @property
    def per_layer(self) -> bool:
        return LAYER in self.name

    @property
    def in_attention(self) -> bool:
        """Whether it belongs to a layer's attention, not to its FFN."""
        return ".self_attention." in self.name

    def layers(self, model: ModelConfig) -> range:
        """Return the layers that have one, counted from 0: gates exist only in looped layers. Outside the layers:
        `range(1)`."""
        if not self.per_layer:
            return range(1)
        if self.ffn is not None:
            return derived.dense_layers(model) if self.ffn == "dense" else derived.expert_layers(model)
        return derived.looped_layers(model) if self.only_in_loops else range(model.num_layers)

    def in_all_layers(self, model: ModelConfig) -> bool:
        """Return whether each layer has one: checkpoints stack such parameters over the layers."""
        return self.per_layer and len(self.layers(model)) == model.num_layers

    def in_layer(self, layer: int) -> str:
        """Return its name in a layer, counted from 0."""
        return self.name.replace(LAYER, str(layer))

    @property
    def per_expert(self) -> bool:
        return EXPERT in self.name

    @property
    def is_replicated(self) -> bool:
        """Whether each tensor-parallel rank has all of it. An expert is only on some ranks, and those are data-parallel
        ranks of each other."""
        return self.split is None and not self.per_expert

    def constant(self, model: ModelConfig) -> float | None:
        """Return the initial value of all its elements, or None if they are drawn."""
        if self.init == "hidden_scale":
            return model.hidden_scale
        if self.init == "final_norm":
            return 1 / derived.mup_width_mult(model)
        return self.init if isinstance(self.init, float) else None

    def std(self, model: ModelConfig) -> float:
        """Return the standard deviation that its initial elements are drawn with."""
        std = derived.output_init_std(model) if self.init == "output" else model.init_method_std
        return std / math.sqrt(derived.mup_width_mult(model)) if self.follows_width else std

    def size(self, sizes: Sizes) -> int:
        """Return the number of elements of one instance."""
        return math.prod(sizes.shape(self.dims))

    def part_of_rank(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """Return the part of the whole tensor that one of `size` tensor-parallel ranks holds."""
        if self.split is None:
            return whole
        if self.form == "gate_up":
            return whole.unflatten(0, (2, -1)).chunk(size, dim=1)[rank].flatten(0, 1)
        return whole.chunk(size, dim=1 if self.split == "columns" else 0)[rank]

    def is_named(self, name: str) -> bool:
        """Return whether a name is this parameter's or its copy's: in a model or a stage, after a prefix (a wrapper's,
        an optimizer state's), as a checkpoint key, or Hugging Face's."""
        return self._pattern.fullmatch(name) is not None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        copy = () if self.copy is None else (self.copy,)
        names = "|".join(re.escape(name) for name in (self.name, *copy, *self.hf))
        names = names.replace(re.escape(f"{LAYER}."), r"(?:\d+\.)?")
        if self.per_expert:  # a module per expert, or a grouped GEMM's parameter that ends with the expert's number
            names = names.replace(re.escape(f"{EXPERT}."), r"(?:\w+\.)*").replace("weight", r"weight\d*")
        return re.compile(rf"(?:.*\.)?(?:{names})")


# ---------------------------------------------------------------- when a parameter exists


def _if(setting: str, *values: Any) -> Callable[[ModelConfig], bool]:
    """Return whether a model's setting has one of these values."""
    return lambda model: getattr(model, setting) in values


def _shared_expert(model: ModelConfig) -> bool:
    return derived.shared_expert_size(model) > 0


def _gate(kind: str) -> Callable[[ModelConfig], bool]:
    return lambda model: derived.has_gates(model) and model.gate_input == kind


def _hidden_scale(kind: str) -> Callable[[ModelConfig], bool]:
    return lambda model: derived.has_learned_hidden_scale(model) and model.learned_hidden_scale == kind


# ---------------------------------------------------------------- the table


def _parameter(name: str, dims: str, component: Component, *hf: str, **how: Any) -> Parameter:
    return Parameter(name, dims, component, hf, **how)


def _norm(name: str, hf: str, dims: str = "hidden", **how: Any) -> Parameter:
    return Parameter(name, dims, "norms", (hf,), init=1.0, **how)


def _in_layers(*parameters: Parameter) -> Iterator[Parameter]:
    """Yield the parameters with their names in the whole model."""
    for parameter in parameters:
        yield replace(parameter, name=_OURS + parameter.name, hf=tuple(_THEIRS + name for name in parameter.hf))


_QKV = "self_attention.linear_qkv."
_GATE, _HF_GATE = "self_attention.core_attention.plt_gate.", "self_attn.plt_gate."
_EXPERT, _SHARED, _HF_SHARED = f"mlp.experts.{EXPERT}.", "mlp.shared_experts.", "mlp.shared_expert."

_UNTIED, _TIED = (_if("share_embeddings_and_output_weights", is_tied) for is_tied in (False, True))
_COPIES = {None: _UNTIED, "output_layer.weight": _TIED}  # the embedding's copy
_PRE, _QK_NORM = _if("norm_placement", "pre", "pre_ffn_output"), _if("qk_layernorm", True)
_SCALES = {"model": "one", "channel": "hidden"}  # dimensions, by `model.learned_hidden_scale`
_OF_QKV = {"form": "qkv", "split": "rows"}
_OF_QUERY_GATE = {"init": 0.0, "split": "rows", "gate_logit": True, "in_core_attention": True, "exists": _gate("query")}
_OF_HIDDEN_GATE = {"init": 0.0, "gate_logit": True, "exists": _gate("hidden")}  # a rank computes all heads for its rows

# In the order in which exports store them.
# fmt: off
TABLE = (
    *(_parameter("embedding.word_embeddings.weight", "vocab hidden", "embedding", "model.embed_tokens.weight",
                 split="rows", copy=copy, exists=exists) for copy, exists in _COPIES.items()),
    *(_parameter("loop_input.hidden_scale", dims, "loop_input", "model.loop_input.hidden_scale",
                 init="hidden_scale", exists=_hidden_scale(kind)) for kind, dims in _SCALES.items()),
    *_in_layers(
        _norm(_QKV + "layer_norm_weight", "input_layernorm.weight", feeds_linear=True, exists=_PRE),
        _parameter(_QKV + "weight", "qkv hidden", "attention",
                   "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", **_OF_QKV),
        _parameter(_QKV + "bias", "qkv", "attention",
                   "self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias", **_OF_QKV,
                   init=0.0, exists=_if("qkv_bias", True)),
        _norm("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "query_norm", exists=_QK_NORM),
        _norm("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "key_norm", exists=_QK_NORM),
        *(_parameter(f"self_attention.key_shift.{kind}", "groups", "attention", f"self_attn.key_shift.{kind}",
                     init=0.0, mixes_tokens=kind, exists=_if("key_shift", "learned"))
          for kind in ("key", "value")),
        _parameter(_GATE + "weight", "heads head_dim", "gates", _HF_GATE + "weight", **_OF_QUERY_GATE),
        _parameter(_GATE + "bias", "heads", "gates", _HF_GATE + "bias", **_OF_QUERY_GATE),
        _parameter(_GATE + "weight", "heads hidden", "gates", _HF_GATE + "weight", **_OF_HIDDEN_GATE),
        _parameter(_GATE + "bias", "heads", "gates", _HF_GATE + "bias", **_OF_HIDDEN_GATE),
        _parameter(_GATE + "gate_norm.weight", "hidden", "gates", _HF_GATE + "gate_norm.weight",
                   init=1.0, exists=_gate("hidden")),
        _parameter("self_attention.linear_proj.weight", "hidden query", "attention", "self_attn.o_proj.weight",
                   split="columns", init="output"),
        _norm("self_attention.output_norm.weight", "post_attention_layernorm.weight",
              exists=_if("norm_placement", "post")),
        _norm("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm.weight",
              feeds_linear=True, ffn="dense", exists=_PRE),
        _norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight",
              feeds_linear=True, ffn="experts", exists=_PRE),
        _parameter("mlp.linear_fc1.weight", "gate_up hidden", "ffn", "mlp.gate_proj.weight", "mlp.up_proj.weight",
                   form="gate_up", split="rows", ffn="dense"),
        _parameter("mlp.linear_fc2.weight", "hidden ffn", "ffn", "mlp.down_proj.weight",
                   split="columns", init="output", ffn="dense"),
        _parameter("mlp.router.weight", "experts hidden", "router", "mlp.gate.weight", ffn="experts"),
        _parameter("mlp.router.expert_bias", "experts", "router", "mlp.gate.e_score_correction_bias",
                   init=0.0, is_buffer=True, ffn="experts", exists=derived.has_expert_bias),
        _parameter(_EXPERT + "linear_fc1.weight", "expert_gate_up hidden", "experts",
                   _EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight", form="gate_up", ffn="experts"),
        _parameter(_EXPERT + "linear_fc2.weight", "hidden expert_ffn", "experts", _EXPERT + "down_proj.weight",
                   init="output", ffn="experts"),
        _parameter(_SHARED + "linear_fc1.weight", "shared_gate_up hidden", "ffn",
                   _HF_SHARED + "gate_proj.weight", _HF_SHARED + "up_proj.weight",
                   form="gate_up", split="rows", ffn="experts", exists=_shared_expert),
        _parameter(_SHARED + "linear_fc2.weight", "hidden shared_ffn", "ffn", _HF_SHARED + "down_proj.weight",
                   split="columns", init="output", ffn="experts", exists=_shared_expert),
        _norm("mlp.output_norm.weight", "post_feedforward_layernorm.weight",
              exists=_if("norm_placement", "pre_ffn_output", "post")),
    ),
    Parameter("final_layernorm.weight", "hidden", "final_norm", ("model.norm.weight",), init="final_norm"),
    _parameter("output_layer.weight", "vocab hidden", "output_layer", "lm_head.weight", split="rows", exists=_UNTIED),
)
# fmt: on


# ---------------------------------------------------------------- lookups


def tensors_of(model: ModelConfig) -> list[Parameter]:
    """Return the parameters and buffers that a model has, in the order of the table."""
    return [tensor for tensor in TABLE if tensor.exists(model) and tensor.layers(model)]


def parameters_of(model: ModelConfig) -> list[Parameter]:
    """Return the parameters that a model has, in the order of the table."""
    return [tensor for tensor in tensors_of(model) if not tensor.is_buffer]


def find(model: ModelConfig, name: str) -> Parameter:
    """Return a model's parameter or buffer by a name that `Parameter.is_named` accepts. Raises `KeyError` if it has
    none of this name."""
    return _first(tensors_of(model), name)


@cache  # called for each parameter once per optimizer group
def hidden_matrix(name: str) -> Parameter | None:
    """Return the parameter by a name that `Parameter.is_named` accepts, in any model, or None if it is not a hidden
    matrix. Raises `KeyError` if no model has one."""
    parameter = _first(TABLE, name)
    return parameter if parameter.is_hidden_matrix else None


def only_in_loops(name: str) -> bool:
    """Return whether a name, ours or Hugging Face's, is that of a parameter that one-loop models lack."""
    return any(parameter.only_in_loops and parameter.is_named(name) for parameter in TABLE)


@cache
def is_buffer(name: str) -> bool:
    """Return whether a name, ours or Hugging Face's, is that of a buffer."""
    return any(tensor.is_buffer and tensor.is_named(name) for tensor in TABLE)


def layer_of(name: str) -> int | None:
    """Return a parameter's layer from its name in the whole model, or None if it is in no layer."""
    match = re.search(r"\blayers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def _first(parameters: Iterable[Parameter], name: str) -> Parameter:
    for parameter in parameters:
        if parameter.is_named(name):
            return parameter
    raise KeyError(f"{name} is not in the table of parameters (model/parameters.py)")
