#!/usr/bin/env python3
"""Check that the pipeline bubble with loops as virtual stages is (P - 1) / (L M) of the work.

    python benchmarks/bubble.py                     # 4 stages, 8 microbatches, 1 to 4 loops; exit status 1 if it is not
    python benchmarks/bubble.py --plot bubble.png   # the measured timelines as well

megatron-core's own schedule runs the training system's chunks in four real processes. Only the layers are replaced: a
chunk's forward pass sleeps for a fixed time and its backward pass for twice as long, so that stages are equal and two
cores suffice for four of them. A run of L loops has L chunks of the same work. The bubble is the time that stages spend
outside their chunks, between the step's first start and last end, as a share of the time inside them; it is measured
from each chunk's time stamps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plt_megatron.errors import run_command

TOLERANCE = 0.10  # of the bubble


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--loops", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument(
        "--milliseconds", type=float, default=200.0, help="of a chunk's forward pass; gloo takes 2 to 3 beside it"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the timelines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if "RANK" in os.environ:
        measure(arguments)
        return 0
    from plt_megatron.runtime.local_processes import run_processes

    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"BUBBLE_FOLDER": folder, "OMP_NUM_THREADS": "1"}
        status = run_processes([sys.executable, *sys.argv], arguments.stages, env=env)
        if status:
            return status
        timelines = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(arguments.stages)]
    return report(arguments, {loops: [line[str(loops)] for line in timelines] for loops in arguments.loops})


# ---------------------------------------------------------------- process of a stage


def measure(arguments: argparse.Namespace) -> None:
    """Run one step for each loop count; write this stage's (kind, loop, start, end) of each chunk, in seconds."""
    import logging
    import warnings

    import torch
    import torch.distributed as dist

    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    enter_cpu_runtime(force=True)
    from megatron.core import parallel_state

    from plt_megatron.config.schema import ModelConfig, ParallelConfig
    from plt_megatron.model.transformer_config import transformer_config
    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

    parallel = ParallelConfig(pipeline_model_parallel_size=arguments.stages)
    init_process_groups(parallel)
    model = ModelConfig(num_layers=arguments.stages, hidden_size=8, num_attention_heads=1, vocab_size=16)
    config = transformer_config(model, parallel, precision="fp32")
    config.calculate_per_token_loss = False
    stage = sleeping_stage(
        arguments.milliseconds / 1e3,
        parallel_state.is_pipeline_first_stage(),
        parallel_state.is_pipeline_last_stage(),
    )
    timelines = {}
    for loops in arguments.loops:
        one_step(stage, config, loops, arguments.microbatches)  # warm-up: opens the connections
        stage.events.clear()
        dist.barrier()
        one_step(stage, config, loops, arguments.microbatches)
        timelines[loops] = list(stage.events)
    path = Path(os.environ["BUBBLE_FOLDER"]) / f"{dist.get_rank()}.json"
    path.write_text(json.dumps(timelines))
    torch.distributed.barrier()
    destroy_process_groups()


def one_step(stage: Any, config: Any, loops: int, microbatches: int) -> None:
    """Run one training step with megatron-core's schedule, as the engine does."""
    import torch
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from plt_megatron.model.looped_gpt import MicroBatch
    from plt_megatron.model.pipeline import MicroBatches, build_chunks
    from plt_megatron.model.transformer_config import schedule_config

    config = schedule_config(config, loops)
    chunks = build_chunks(stage, config, loops)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    shared = MicroBatches([MicroBatch(tokens=tokens, labels=tokens) for _ in range(microbatches)])
    virtual = loops if loops > 1 else None

    def forward_step(batches: MicroBatches, chunk: Any) -> tuple[Any, Callable]:
        output, _ = chunk(batches)
        return output, lambda output: (output.sum(), {})

    get_forward_backward_func(pp_size=config.pipeline_model_parallel_size, vp_size=virtual)(
        forward_step_func=forward_step,
        data_iterator=[shared] * len(chunks) if virtual else shared,
        model=chunks if virtual else chunks[0],
        num_microbatches=microbatches,
        seq_length=4,
        micro_batch_size=1,
        forward_only=False,
    )


def sleeping_stage(seconds: float, first: bool, last: bool) -> Any:
    """Return a stage for `LoopChunk` whose loops sleep, `seconds` forward and twice that backward.

    Its `events` are (kind, loop, start, end).
    """
    import torch

    events: list[tuple[str, int, float, float]] = []

    def sleep(kind: str, loop: int, duration: float) -> None:
        started = time.monotonic()
        time.sleep(duration)
        events.append((kind, loop, started, time.monotonic()))

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden_states: Any, weight: Any, loop: int) -> Any:
            ctx.loop = loop
            sleep("forward", loop, seconds)
            return hidden_states + weight

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            sleep("backward", ctx.loop, 2 * seconds)
            return gradient, gradient.sum(), None

    class Stage(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.pre_process, self.post_process, self.events = first, last, events

        def run_loop(self, batch: Any, context: Any, input_tensor: Any) -> Any:
            if self.pre_process and context.loop == 1:
                input_tensor = torch.zeros(4, 1, 8, requires_grad=True)
            return Sleep.apply(input_tensor, self.weight, context.loop)

    return Stage()


# ---------------------------------------------------------------- results


def report(arguments: argparse.Namespace, timelines: dict[int, list[list]]) -> int:
    """Print measured and predicted bubbles; return 1 if one is further off than the tolerance, else 0."""
    rows, missed = {}, False
    print(f"{arguments.stages} stages, {arguments.microbatches} microbatches\nloops  (P-1)/(LM)  measured  off by")
    for loops, stages in timelines.items():
        measured, predicted = bubble(stages), (arguments.stages - 1) / (loops * arguments.microbatches)
        rows[loops] = {"measured": measured, "predicted": predicted}
        off = measured / predicted - 1
        missed |= abs(off) > TOLERANCE
        print(f"{loops:5}  {predicted:10.2%}  {measured:8.2%}  {off:+6.1%}{'  MISSED' if abs(off) > TOLERANCE else ''}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        draw(arguments, timelines, rows)
    return int(missed)


def bubble(stages: list[list]) -> float:
    """Return the idle time of all stages divided by their work.

    The step lasts from the earliest start to the latest end of any stage; processes of one machine share the monotonic
    clock.
    """
    begun = min(event[2] for events in stages for event in events)
    ended = max(event[3] for events in stages for event in events)
    work = [sum(event[3] - event[2] for event in events) for events in stages]
    return sum(ended - begun - seconds for seconds in work) / sum(work)


def draw(arguments: argparse.Namespace, timelines: dict[int, list[list]], rows: dict[int, dict[str, float]]) -> None:
    """Draw a timeline for each loop count, in units of a stage's work."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.7 * len(timelines) + 0.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (loops, stages) in enumerate(timelines.items()):
        axes = figure.add_subplot(len(timelines), 1, index + 1)
        begun = min(event[2] for events in stages for event in events)
        work = sum(event[3] - event[2] for event in stages[0])
        for rank, events in enumerate(stages):
            for kind, loop, start, end in events:
                shade = 0.9 - 0.55 * (loop or 1) / max(timelines)
                color = (shade * 0.75, shade * 0.9, 1.0) if kind == "forward" else (1.0, shade * 0.95, shade * 0.7)
                axes.barh(rank, (end - start) / work, left=(start - begun) / work, height=0.85, color=color, lw=0)
        axes.set_xlim(0, 1 + 1.05 * rows[min(rows)]["measured"])
        axes.set_yticks(range(arguments.stages), [f"stage {rank + 1}" for rank in range(arguments.stages)], fontsize=8)
        axes.invert_yaxis()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(left=False, labelsize=8)
        row = rows[loops]
        title = f"{loops} loop(s): bubble {row['measured']:.1%} of the work, (P-1)/(LM) = {row['predicted']:.1%}"
        axes.set_title(title, fontsize=9, loc="left")
    figure.axes[-1].set_xlabel("time, in units of a stage's work; blue: forward, orange: backward, darker: later loops")
    arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.plot)


if __name__ == "__main__":
    sys.exit(run_command(main))
