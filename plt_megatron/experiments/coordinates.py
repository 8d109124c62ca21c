"""The coordinate check: do activations, updates and logits keep their size as a model gets wider, deeper or loops more?

Tiny models of a configuration's kind take a few optimizer steps on one batch of random tokens, at its learning rate.
The check compares, after the last step, the root mean square of the last loop's output, of the logits, and of the
change in both since the start. A parameterisation that keeps them the same at every size can be expected to keep its
best learning rate (arXiv 2203.03466, appendix D.1; 2505.01618 for depth).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plt_megatron.config.rules import model as model_rules
from plt_megatron.config.schema import DataConfig, ModelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.experiments.figures import Curve, Panel, draw, save
from plt_megatron.hf.verification import single_process
from plt_megatron.model.build import build_stage
from plt_megatron.model.looped_gpt import MicroBatch
from plt_megatron.run_folder.text import format_table
from plt_megatron.train.optimizers import groups

FLAT = 1.5  # largest over smallest, at most
SIZES = {"width": (32, 64, 128), "depth": (2, 4, 8, 16), "loops": (1, 2, 3, 4)}
BASE = {"width": 64, "depth": 4, "loops": 2}  # where they are not varied
STEPS, SEED = 5, 1234
HEAD_DIM, VOCAB_SIZE, ROWS, TOKENS = 16, 128, 2, 32


@dataclass(frozen=True)
class Result:
    """The measurements of one axis: size -> quantity -> root mean square over all elements, after the last step."""

    axis: str
    measured: dict[int, dict[str, float]]

    def spread(self) -> dict[str, float]:
        """Return the ratio of largest to smallest of each quantity; infinite if one is not finite, or 0."""
        every = {name: [one[name] for one in self.measured.values()] for name in next(iter(self.measured.values()))}
        return {
            name: max(values) / min(values) if all(map(math.isfinite, values)) and min(values) > 0 else math.inf
            for name, values in every.items()
        }

    @property
    def is_flat(self) -> bool:
        return max(self.spread().values()) <= FLAT


def check_coordinates(config: RunConfig, axes: Mapping[str, Sequence[int]] = SIZES, steps: int = STEPS) -> list[Result]:
    """Measure along axes, on the CPU, in fp32, on the torch backend.

    Args:
        axes: sizes to compare by axis; the other axes are at `BASE`.
        steps: steps of AdamW at the configuration's learning rate, without warm-up.

    Raises `UserError` if the check does not support this kind of configuration.
    """
    if config.model.moe is not None:
        raise UserError("the coordinate check is of dense models; set model.moe=null")
    if config.model.loop_span is not None:
        raise UserError("the coordinate check needs models whose layers all loop; set model.loop_span=null")
    if config.optimizer.name != "adam":
        raise UserError(f"the coordinate check needs Adam, not {config.optimizer.name}; set optimizer.name=adam")
    for problem in model_rules.find_problems(config):
        raise UserError(problem)
    with single_process():
        return [
            Result(axis, {size: _measure(config, {**BASE, axis: size}, steps) for size in sizes})
            for axis, sizes in axes.items()
        ]


def table(results: Sequence[Result]) -> str:
    """Format all measurements, and the spread of each quantity along each axis, as a table."""
    rows = []
    for result in results:
        for size, coordinates in result.measured.items():
            rows.append([f"{result.axis} {size}", *(f"{value:.4g}" for value in coordinates.values())])
        rows.append(["  largest / smallest", *(f"{value:.2f}" for value in result.spread().values())])
    return format_table(rows, header=["", *results[0].spread()])


def verdict(result: Result) -> str:
    """Describe a result in one line."""
    name, worst = max(result.spread().items(), key=lambda item: item[1])
    if result.is_flat:
        return f"{result.axis}: flat, within {worst:.2f}x"
    return f"{result.axis}: not flat: {name} differs by {worst:.1f}x (at most {FLAT}x)"


def plot(results: Sequence[Result], path: Path) -> None:
    panels = []
    for place, result in enumerate(results):
        curves = [
            Curve(
                list(result.measured),
                [coordinates[name] for coordinates in result.measured.values()],
                index,
                marker="o",
                label="" if place else name,
            )
            for index, name in enumerate(result.spread())
        ]
        y = "" if place else "root mean square after the last step"
        ticks = {float(size): str(size) for size in result.measured}
        title = "flat" if result.is_flat else "not flat"
        panels.append(Panel(curves, result.axis, y, title, log_x=True, log_y=True, ticks=ticks))
    save(draw(panels, 4.2, 3.4, len(results)), path)


def _measure(config: RunConfig, size: dict[str, int], steps: int) -> dict[str, float]:
    stage = _build(config.model, size)
    batch = torch.randint(0, VOCAB_SIZE, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(SEED))
    adam = _adam(dataclasses.replace(config, model=stage.plt), stage)
    hidden, logits = _forward(stage, batch)
    for _ in range(steps):
        stage(MicroBatch(batch[:, :-1].contiguous(), labels=batch[:, 1:].contiguous())).mean().backward()
        adam.step()
        adam.zero_grad()
    after_hidden, after_logits = _forward(stage, batch)
    found = {
        "hidden": after_hidden,  # the last loop's output, before the final norm
        "logits": after_logits,
        "hidden update": after_hidden - hidden,
        "logits update": after_logits - logits,
    }
    return {name: float(tensor.square().mean().sqrt()) for name, tensor in found.items()}


def _adam(config: RunConfig, stage: Any) -> torch.optim.AdamW:
    """Build AdamW with training's rates for each kind of parameter, without weight decay."""
    settings = config.optimizer
    kinds = [
        {
            "params": [parameter for name, parameter in stage.named_parameters() if group.has(name)],
            "lr": group.rate * settings.lr,
            "eps": group.eps * settings.adam_eps,
        }
        for group in groups(config)
    ]
    return torch.optim.AdamW(kinds, betas=(settings.adam_beta1, settings.adam_beta2), weight_decay=0.0)


def _build(model: ModelConfig, size: dict[str, int]) -> Any:
    """Build the model at another size: heads of 16 channels, and an FFN in the same proportion to the width."""
    heads = size["width"] // HEAD_DIM
    resized = dataclasses.replace(
        model,
        hidden_size=size["width"],
        num_layers=size["depth"],
        loop_count=size["loops"],
        ffn_hidden_size=max(1, model.ffn_hidden_size * size["width"] // model.hidden_size),
        num_attention_heads=heads,
        num_query_groups=max(2, heads // 2),  # shifted keys need two
        kv_channels=HEAD_DIM,
        window_size=TOKENS // 2,
        vocab_size=VOCAB_SIZE,
        moe=None,
        fused_gated_window=False,
        backend="torch",
    )
    data, training = DataConfig(sequence_length=TOKENS), TrainingConfig(precision="fp32", seed=SEED)
    return build_stage(RunConfig(model=resized, data=data, training=training), VOCAB_SIZE)


@torch.no_grad()
def _forward(stage: Any, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Return (the last loop's output, logits)."""
    seen: list[Tensor] = []
    norm = stage.get_submodule("final_layernorm")
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits = stage(MicroBatch(batch[:, :-1].contiguous()))[..., :VOCAB_SIZE]
    hook.remove()
    return seen[-1], logits
