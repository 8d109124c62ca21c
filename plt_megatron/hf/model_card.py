"""README.md of an export: what the model is, what it was trained on, how to use it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plt_megatron.config import derived
from plt_megatron.config.rules.optimizer import OPTIMIZERS
from plt_megatron.config.schema import ModelConfig
from plt_megatron.errors import UserError
from plt_megatron.hf import switches
from plt_megatron.hf.conversion import ParamMapping
from plt_megatron.hf.sources import ModelSource, front_matter
from plt_megatron.run_folder.checkpoints import EMA, run_of, trained_tokens
from plt_megatron.run_folder.folder import RunFolder
from plt_megatron.run_folder.text import pipe_facts, plural

_WITH_TOKENIZER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"""
_OF_IDS = """\
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
print(model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=50)[0])"""
_USE = """\
## Use

```python
{example}
```

`configuration_plt.py` and `modeling_plt.py` are the model's code; they need torch and transformers 5.4 or later.
Assisted generation needs transformers 5.15 or later.
"""
_PARALLEL_LOOPS = """\
{layers} run {loops} times with the same weights. `generate` decodes all loops of a token in one pass;
`loop_mode="serial"` runs them one after another, and `loop_count=1` (when loading, or in a call) runs fewer.
"""
_SERIAL_LOOPS = """\
{layers} run {loops} times with the same weights. Without cross-loop parallelism a token's loops wait for each other:
`generate` runs them one after another. `loop_count=1` (when loading, or in a call) runs fewer.
"""
_LOOPCODER = """\
## Use

The weights' names and config.json's keys are LoopCoder-v2's (`IQuestPLTCoderForCausalLM`), for programs that serve it.
"""


def model_card(source: ModelSource, name: str, mappings: list[ParamMapping], style: str) -> str:
    """Return the text of the card of a folder of this name, with tensors of these mappings."""
    tags = ["plt", "parallel-loop-transformer"] if source.model.loop_count > 1 else ["plt"]
    front = ["---", "library_name: transformers", "pipeline_tag: text-generation", *front_matter(source.lineage)]
    front += ["tags:", *(f"- {tag}" for tag in tags)]
    sections = ["\n".join([*front, "---"]), f"# {name}", _introduction(source)]
    sections.append("## Model\n\n" + pipe_facts(_model_facts(source, mappings)))
    if source.progress:
        sections.append("## Training\n\n" + pipe_facts(_training_facts(source)))
        if losses := _validation_losses(source):
            sections.append("## Validation\n\n" + pipe_facts(losses))
    if style == "loopcoder":
        sections.append(_LOOPCODER.strip())
    else:
        example = _OF_IDS if source.tokenizer is None else _WITH_TOKENIZER
        sections.append(_USE.format(example=example.format(name=name)).strip())
        if source.model.loop_count > 1:
            sections.append(_loops(source.model).strip())
    return "\n\n".join(sections) + "\n"


def _introduction(source: ModelSource) -> str:
    model = source.model
    made = "trained" if source.progress.get("step", 0) > 0 else "converted"
    if model.loop_count == 1:
        return f"A decoder-only transformer, {made} with plt_megatron."
    plt = "Parallel Loop Transformer (PLT, arXiv 2510.24824)"
    kind, loops = plt, f"{model.loop_count} loops"
    if derived.windows_earlier_loops(model):
        kind = f"variant of the {plt}" if model.cross_loop_parallel else f"looped transformer, a variant of the {plt},"
        loops += ", whose last loop alone attends to the whole context"
    elif not (model.cross_loop_parallel and derived.shares_values(model) and model.gated_window):
        kind = f"looped transformer, an ablation of the {plt},"
    return f"A {kind} of {loops}, {made} with plt_megatron."


def _loops(model: ModelConfig) -> str:
    text = _PARALLEL_LOOPS if model.cross_loop_parallel else _SERIAL_LOOPS
    looped = len(derived.looped_layers(model))
    layers = "The layers" if looped == model.num_layers else f"The {looped} layers that loop"
    text = text.format(layers=layers, loops=model.loop_count)
    if derived.windows_earlier_loops(model):
        text += "With fewer loops an earlier loop attends to everything, unlike in training.\n"
    return text


def _model_facts(source: ModelSource, mappings: list[ParamMapping]) -> Iterator[tuple[str, Any]]:
    model = source.model
    yield "parameters", f"{sum(math.prod(mapping.shape) for mapping in mappings if not mapping.parameter.is_buffer):,}"
    yield "layers", model.num_layers
    yield "hidden size", model.hidden_size
    if model.moe is None:
        yield "FFN size", model.ffn_hidden_size
    else:
        if dense := len(derived.dense_layers(model)):
            yield "dense layers", f"the first {dense}, of FFN size {model.ffn_hidden_size}"
        size = derived.expert_ffn_hidden_size(model)
        yield "experts", f"{model.moe.router_topk} of {model.moe.num_experts}, of {size}"
        bias = ", balanced by a bias on each" if derived.has_expert_bias(model) else ""
        yield "router", f"{model.moe.router_score_function} scores{bias}"
    heads, groups = model.num_attention_heads, derived.num_query_groups(model)
    yield "attention heads", f"{heads} query, {groups} key/value, of {derived.head_dim(model)} channels"
    yield from _rows(switches.OF_LAYERS, model)
    yield "vocabulary", f"{source.vocab_size:,}"
    yield "embeddings", "tied" if model.share_embeddings_and_output_weights else "untied"
    yield "context", f"{source.max_position_embeddings:,} tokens"
    yield "loops", model.loop_count
    if model.loop_count > 1:
        yield from _rows(switches.OF_LOOPS, model)


def _rows(described: Sequence[switches.Switch], model: ModelConfig) -> Iterator[tuple[str, str]]:
    for switch in described:
        if (said := switch.said(model)) is not None:
            yield switch.title, said


def _training_facts(source: ModelSource) -> Iterator[tuple[str, Any]]:
    progress = source.progress
    config = progress["config"]
    training, optimizer = config["training"], config["optimizer"]
    if "imported_from" in progress:
        yield "weights from", progress["imported_from"]
    if progress["step"] == 0:
        return
    yield "run", config["name"]
    if config["checkpoint"]["load"]:
        yield "started from", Path(config["checkpoint"]["load"]).name
    if source.ema:
        decay = config["training"]["ema_decay"]
        yield "weights", f"a moving average over {progress[EMA]['updates']:,} updates, decay {decay:g}"
    if "averaged_from" in progress:
        yield "weights", _averaged(progress)
    yield "steps", f"{progress['step']:,}"
    yield "tokens", f"{trained_tokens(progress):,}"
    yield "data", _data(config["data"])
    # Older checkpoints have no schedules.
    batches, lengths = training.get("batch_schedule", []), config["data"].get("length_schedule", [])
    yield "sequence length", f"{config['data']['sequence_length']:,}{_at_first(lengths, 'sequence_length')}"
    yield "global batch", f"{training['global_batch_size']:,} sequences{_at_first(batches, 'global_batch_size')}"
    if "averaged_from" not in progress:  # an average's is that of its weights
        yield "precision", training["precision"]
    rate = f"peak {optimizer['lr']:g}, {optimizer['lr_decay_style']} to {optimizer['min_lr']:g}"
    title = OPTIMIZERS[optimizer.get("name", "adam")].title  # before optimizers had names
    yield "optimizer", f"{title}, learning rate {rate}, weight decay {optimizer['weight_decay']:g}"
    if progress["layout"]:  # an average has none
        yield "layout", ", ".join(f"{name.removesuffix('_size')} {size}" for name, size in progress["layout"].items())
    versions = dict(progress["versions"])
    if "megatron-core" in versions:  # in checkpoints from before 2026-11-26 it ends with our commit
        versions["megatron-core"] = versions["megatron-core"].partition("+")[0]
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _at_first(stages: Sequence[Mapping[str, Any]], key: str) -> str:
    return f", {stages[0][key]:,} at first" if stages else ""


def _averaged(progress: Mapping[str, Any]) -> str:
    parts = progress["averaged_from"]
    equal = len({share for _, share in parts}) == 1
    names = ", ".join(name if equal else f"{share:.3g} {name}" for name, share in parts)
    kind = "the moving averages of " if progress.get("of_moving_averages") else ""
    return f"the average of {kind}{names}" if len(parts) > 1 else f"{kind}{names}"


def _data(data: Mapping[str, Any]) -> str:
    stages = data.get("stages", [])  # older checkpoints have none
    mixes = [f"{_mix(stage['sources'])} up to {stage['until']:,} tokens" for stage in stages]
    return ", then ".join([*mixes, _mix(data["sources"] or data["train_sources"])])


def _mix(sources: Sequence[Mapping[str, Any]]) -> str:
    named = (f"{item['name'] or Path(item['path']).name} (weight {item['weight']:g})" for item in sources)
    return ", ".join(named) or "-"


def _validation_losses(source: ModelSource) -> list[tuple[str, str]]:
    """Return the losses measured at the checkpoint's step, from the run's metrics if they are beside it."""
    try:
        records = RunFolder(run_of(source.path)).metrics().validation
    except UserError:
        return []
    field, step = "ema_loss" if source.ema else "loss", source.progress["step"]
    losses = {record["loop_count"]: record[field] for record in records if record["step"] == step and field in record}
    return [(f"loss with {plural(count, 'loop')}", f"{loss:.4f}") for count, loss in losses.items()]
