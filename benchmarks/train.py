#!/usr/bin/env python3
"""Training speed: the cost of looping, and the looped part's share of this machine's matrix rate.

    python benchmarks/train.py                  # fp32 and bf16, with the bars; exit status 1 if one is missed
    python benchmarks/train.py --quick          # a tiny model, no bars: does the benchmark run?

One process on all cores compares PLT-2 with N layers to megatron-core's own GPTModel with 2N layers of the same width,
sequence length, and attention and norm modules, so that the ratio measures the loop's overhead alone. A step is forward
and backward, with gradients accumulated in DistributedDataParallel's buffers as in training; the optimizer is left out,
since PLT-2 has half the weights to update and would look better for it. PLT-2 with shifted keys (`model.key_shift:
heads`) is timed against PLT-2. Repetitions are interleaved, ratios are taken between neighbors in time, and figures are
medians. "Model FLOP/s" is as in plt_megatron/predict/flops.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import statistics
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MIN_SPEED_RATIO = 0.97
MAX_SHIFT_COST = 1.01  # a step with shifted keys / one without
MIN_MATMUL_SHARE = {"fp32": 0.72, "bf16": 0.50}
MIN_PARAMETERS = 50_000_000


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--precision", choices=("fp32", "bf16", "both"), default="both")
    parser.add_argument("--num-layers", type=int, default=4, help="layers of PLT-2; the baseline has twice as many")
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--profile", action="store_true", help="print where the time goes, operator by operator")
    parser.add_argument("--json", metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a tiny model and no bars")
    return parser.parse_args()


ARGUMENTS = parse_arguments() if __name__ == "__main__" else None

import torch  # noqa: E402

from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime, keep_freed_memory  # noqa: E402

warnings.filterwarnings("ignore")
logging.getLogger("megatron").setLevel(logging.ERROR)
enter_cpu_runtime(force=True)
keep_freed_memory()  # as plt train

from benchmarks.deeper_gpt import deeper_gpt  # noqa: E402
from plt_megatron.config.schema import ModelConfig, ParallelConfig  # noqa: E402
from plt_megatron.model.build import initialize  # noqa: E402
from plt_megatron.model.looped_gpt import LoopedGPT, MicroBatch  # noqa: E402
from plt_megatron.model.transformer_config import DTYPES, transformer_config  # noqa: E402
from plt_megatron.predict.flops import training_flops_per_token  # noqa: E402
from plt_megatron.predict.parameters import count_parameters  # noqa: E402
from plt_megatron.run_folder.text import format_table  # noqa: E402
from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups  # noqa: E402
from plt_megatron.train.callbacks.performance import measure_matmul_tflops  # noqa: E402
from plt_megatron.train.megatron_engine import wrap_ddp  # noqa: E402

VOCAB_SIZE = 8192


class Contest:
    """PLT-2 and its baseline in one precision, and the steps of both."""

    def __init__(self, arguments: argparse.Namespace, precision: str) -> None:
        self.precision = precision
        self.tokens = arguments.micro_batch_size * arguments.sequence_length
        self.length = arguments.sequence_length
        self.model = ModelConfig(
            num_layers=arguments.num_layers,
            hidden_size=arguments.hidden_size,
            ffn_hidden_size=arguments.hidden_size * 11 // 4,
            num_attention_heads=max(1, arguments.hidden_size // 128),
            kv_channels=128,
            vocab_size=VOCAB_SIZE,
            loop_count=2,
        )
        generator = torch.Generator().manual_seed(0)
        shape = (arguments.micro_batch_size, arguments.sequence_length + 1)
        text = torch.randint(0, VOCAB_SIZE, shape, generator=generator)
        self.batch = MicroBatch(text[:, :-1].contiguous(), labels=text[:, 1:].contiguous())
        self.stage = self._stage(self.model)
        self.plt = wrap_ddp(self.stage, overlap_grad_reduce=False)
        shifted = self._stage(dataclasses.replace(self.model, key_shift="heads"))
        self.shifted = wrap_ddp(shifted, overlap_grad_reduce=False)
        gpt = deeper_gpt(self.model, self._config, VOCAB_SIZE, self.length).to(DTYPES[self.precision])
        self.gpt = wrap_ddp(gpt, overlap_grad_reduce=False)

    def _config(self, model: ModelConfig):
        return transformer_config(model, ParallelConfig(), precision=self.precision)

    def _stage(self, model: ModelConfig) -> LoopedGPT:
        stage = LoopedGPT(self._config(model), VOCAB_SIZE, self.length)
        initialize(stage, seed=1)
        return stage.to(DTYPES[self.precision])

    def step_plt(self) -> None:
        """Run forward and backward of PLT-2."""
        self.plt.zero_grad_buffer()
        self.plt(self.batch).float().mean().backward()

    def step_shifted(self) -> None:
        """Run forward and backward of PLT-2 with shifted keys."""
        self.shifted.zero_grad_buffer()
        self.shifted(self.batch).float().mean().backward()

    def step_gpt(self) -> None:
        """Run forward and backward of the baseline."""
        self.gpt.zero_grad_buffer()
        self.gpt(self.batch.tokens, None, None, labels=self.batch.labels).float().mean().backward()

    def step_loops(self) -> None:
        """Run forward and backward of the looped part alone, from the embeddings to the last loop's hidden states."""
        self.plt.zero_grad_buffer()
        context, hidden = self.batch.context(3), None  # more loops than run: no head follows
        embeddings = self.stage.embed(self.batch, context)
        for loop in (1, 2):
            hidden = self.stage.run_loop(self.batch, context.at_loop(loop), hidden, embeddings)
        hidden.backward(torch.ones_like(hidden))


def timed(step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def saved_activation_bytes(step) -> int:
    """Return the bytes that autograd keeps between forward and backward, counting each storage once."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(storages.values())


def measure(contest: Contest, repetitions: int) -> dict[str, float]:
    """Return medians: each step's seconds, the matrix rate in TFLOP/s, the speed ratio, the looped part's share, and
    the ratio of a step with shifted keys to one without."""
    steps = {
        "shifted": contest.step_shifted,
        "plt": contest.step_plt,
        "gpt": contest.step_gpt,
        "loops": contest.step_loops,
    }
    dtype = DTYPES[contest.precision]
    for step in steps.values():
        step()
    samples: dict[str, list[float]] = {name: [] for name in (*steps, "matmul", "ratio", "share", "shift")}
    flops = training_flops_per_token(contest.model, contest.length, VOCAB_SIZE).looped * contest.tokens / 1e12
    for _ in range(repetitions):
        rates = [measure_matmul_tflops(dtype, size=2048, repetitions=3)]
        for name, step in steps.items():
            samples[name].append(timed(step))
        rates.append(measure_matmul_tflops(dtype, size=2048, repetitions=3))
        samples["matmul"].append(statistics.mean(rates))
        # Ratios of neighbors in time, since other load on the machine affects both.
        samples["ratio"].append(samples["gpt"][-1] / samples["plt"][-1])
        samples["shift"].append(samples["shifted"][-1] / samples["plt"][-1])
        samples["share"].append(flops / samples["loops"][-1] / samples["matmul"][-1])
    return {name: statistics.median(values) for name, values in samples.items()}


def report(contest: Contest, seconds: dict[str, float], bars: bool) -> list[str]:
    """Print the figures; return a line for each missed bar."""
    parameters = count_parameters(contest.model, vocab_size=VOCAB_SIZE)
    one = dataclasses.replace(contest.model, loop_count=1)
    with_two = saved_activation_bytes(contest.step_plt)
    contest.stage.plt.loop_count, kept = 1, contest.stage.plt.loop_count
    with_one = saved_activation_bytes(contest.step_plt)
    contest.stage.plt.loop_count = kept
    flops = training_flops_per_token(contest.model, contest.length, VOCAB_SIZE)
    first = training_flops_per_token(one, contest.length, VOCAB_SIZE)
    share, bar = seconds["share"], MIN_MATMUL_SHARE[contest.precision]
    local = flops.local_attention + flops.gate
    lines = {
        "PLT-2 parameters": f"{parameters.total:,}",
        "PLT-2 / 2N-layer GPT, tokens/s": f"{seconds['ratio']:.3f} (bar {MIN_SPEED_RATIO})",
        "PLT-2, tokens/s": f"{contest.tokens / seconds['plt']:,.0f}",
        "2N-layer GPT, tokens/s": f"{contest.tokens / seconds['gpt']:,.0f}",
        "PLT-2 with shifted keys / PLT-2, time of a step": f"{seconds['shift']:.3f} (bar {MAX_SHIFT_COST})",
        "matrix rate": f"{1e3 * seconds['matmul']:.0f} GFLOP/s",
        "looped part, model FLOP/s": f"{100 * share:.1f} % of it (bar {100 * bar:.0f} %)",
        "local attention and gate": f"{100 * local / flops.looped:.1f} % of looped FLOPs",
        "saved activations": f"{with_one / 2**20:.0f} MiB for one loop, {with_two / 2**20:.0f} MiB for two "
        f"(x{with_two / with_one:.2f}; FLOPs x{flops.total / first.total:.2f})",
    }
    print(f"\n{contest.precision}: {contest.model.num_layers} layers x 2 loops, hidden {contest.model.hidden_size}, "
          f"sequence {contest.length}, {torch.get_num_threads()} threads")  # fmt: skip
    print(format_table(list(lines.items()), indent=2))
    missed = []
    if bars and parameters.total < MIN_PARAMETERS:
        missed.append(f"{contest.precision}: {parameters.total:,} parameters, the bars want {MIN_PARAMETERS:,}")
    if bars and seconds["ratio"] < MIN_SPEED_RATIO:
        missed.append(f"{contest.precision}: {seconds['ratio']:.3f} x the baseline's tokens/s, bar {MIN_SPEED_RATIO}")
    if bars and seconds["shift"] > MAX_SHIFT_COST:
        missed.append(f"{contest.precision}: {seconds['shift']:.3f} x a step for shifted keys, bar {MAX_SHIFT_COST}")
    if bars and share < bar:
        missed.append(f"{contest.precision}: looped part at {100 * share:.1f} % of the matrix rate")
    return missed


def where_time_goes(contest: Contest, rows: int) -> str:
    """Return a table of a PLT-2 step's operators by their self time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        contest.step_plt()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"    {event.self_cpu_time_total / total:6.1%}  {event.count:5d} x {event.key}" for event in events[:rows]]
    return "  where a PLT-2 step's time goes:\n" + "\n".join(lines)


def main(arguments: argparse.Namespace) -> int:
    if arguments.quick:
        arguments.num_layers, arguments.hidden_size, arguments.sequence_length = 1, 128, 128
        arguments.repetitions = min(arguments.repetitions, 2)
    init_process_groups(ParallelConfig())
    precisions = ("fp32", "bf16") if arguments.precision == "both" else (arguments.precision,)
    missed, figures = [], {}
    for precision in precisions:
        contest = Contest(arguments, precision)
        seconds = measure(contest, arguments.repetitions)
        missed += report(contest, seconds, bars=not arguments.quick)
        print(where_time_goes(contest, 25 if arguments.profile else 8))
        figures[precision] = seconds
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(figures, indent=1) + "\n")
    destroy_process_groups()
    for bar in missed:
        print(f"missed: {bar}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    assert ARGUMENTS is not None
    sys.exit(main(ARGUMENTS))
