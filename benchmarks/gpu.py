#!/usr/bin/env python3
"""GPU benchmark: correctness of the kernels, FP8 training, and speed of training and decoding.

    python benchmarks/gpu.py --output results/h100          # should take 8 minutes on an H100; h100.json and h100.md
    python benchmarks/gpu.py --output gpu --dry-run         # tiny sizes, on a CPU too: does the script run?
    python benchmarks/gpu.py --output gpu --only speed      # one part; others keep what the file has

Parts: `rates` (the card's copy and matrix rates), `correctness` (gradients of a small PLT-2 and of one of the preset
`recommended` on both backends, in bf16 and FP8, against float64 on the CPU), `training` (loss curves in bf16 and FP8 on
the same data), `speed` (tokens/s, MFU and memory of PLT-2 against megatron-core's own GPT of twice the depth: with all
switches of docs/throughput.md, without them, on the torch backend, and with GPT's layers as CUDA graphs, which PLT-2
cannot have), `decode` (benchmarks/decode.py at batch 1 to 64).
Exits with 1 when a bar is missed. Results are written after each part.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_modes import DRY, FORMS, FULL, Sizes, modes, run_config, speed_modes
from benchmarks.gpu_report import markdown, missed_bars, running_means
from benchmarks.gpu_steps import VOCAB_SIZE, gpt_step, plt_step

PARTS = ("rates", "correctness", "training", "speed", "decode")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="prefix of the JSON file and the Markdown table")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes and no bars")
    parser.add_argument("--float64-gradients", metavar="FILE", help=argparse.SUPPRESS)  # the CPU process's task
    return parser.parse_args(argv)


# ---------------------------------------------------------------- engines


def forget() -> None:
    """Free the last model's memory, and reset the FP8 scales that its modules share."""
    import torch
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if HAVE_TE:
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
    gc.collect()
    if not is_cpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def text(rows: int, length: int, seed: int) -> Any:
    """Return a microbatch of Python source, one token per byte, which a model can learn."""
    import torch

    files = sorted(Path(argparse.__file__).parent.glob("*.py"))[:60]
    corpus = torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in files)), dtype=torch.uint8)
    starts = torch.randint(0, len(corpus) - length - 1, (rows,), generator=torch.Generator().manual_seed(seed))
    return _microbatch(torch.stack([corpus[start : start + length + 1] for start in starts.tolist()]).long())


def random_tokens(rows: int, length: int, seed: int) -> Any:
    """Return a microbatch in which no token is frequent: torch adds a token's embedding gradients one by one in bf16 on
    a CPU, which is off by 7 % for the spaces of `text`."""
    import torch

    return _microbatch(torch.randint(VOCAB_SIZE, (rows, length + 1), generator=torch.Generator().manual_seed(seed)))


def _microbatch(tokens: Any) -> Any:
    """Return the microbatch of tokens [rows, length + 1], each of which is to predict the next."""
    import torch

    from plt_megatron.model.looped_gpt import MicroBatch

    tokens = tokens.to(torch.cuda.current_device())
    return MicroBatch(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous())


# ---------------------------------------------------------------- rates


def rates(sizes: Sizes, folder: Path) -> dict[str, float]:
    """Measure GB/s of a copy (bytes read and written) and TFLOP/s of square matrix products."""
    import torch

    device = torch.cuda.current_device()
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    found = {"copy GB/s": 2 * sizes.copy_bytes / timed(lambda: target.copy_(source), sizes.repetitions) / 1e9}
    a, b = (torch.randn(sizes.matrix, sizes.matrix, dtype=torch.bfloat16, device=device) for _ in range(2))
    flops = 2 * sizes.matrix**3
    found["bf16 matmul TFLOP/s"] = flops / timed(lambda: a @ b, sizes.repetitions) / 1e12
    if "te fp8" in modes(sizes) and not is_cpu():
        one = torch.ones((), device=device)
        left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        product = lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)  # noqa: E731
        found["fp8 matmul TFLOP/s"] = flops / timed(product, sizes.repetitions) / 1e12
    return found


def timed(step: Callable[[], Any], repetitions: int) -> float:
    """Return the median seconds of a step, after two warm-up calls."""
    import torch

    seconds = []
    for number in range(repetitions + 2):
        torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def is_cpu() -> bool:
    from plt_megatron.runtime.cpu_runtime import is_cpu_runtime

    return is_cpu_runtime()


# ---------------------------------------------------------------- correctness


def gradients(config: Any, double: bool = False) -> dict[str, Any]:
    """Return loss and gradients of one microbatch, as float64 on the CPU; weights are the same in every mode.

    `double`: compute in float64 too.
    """
    import torch

    from plt_megatron.model.build import build_stage
    from plt_megatron.model.pipeline import renew_weight_copies
    from plt_megatron.train.megatron_engine import wrap_ddp

    stage = build_stage(config, VOCAB_SIZE)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.copy_(parameter.bfloat16())  # exact in every precision
    if double:
        stage.double()
    else:
        wrapped = wrap_ddp(stage, overlap_grad_reduce=False)  # kept: only its hooks fill `main_grad`
        wrapped.zero_grad_buffer()  # fused accumulation adds gradients up there
    renew_weight_copies(stage)
    loss = stage(random_tokens(2, config.data.sequence_length, seed=7)).float().mean()
    loss.backward()
    kind = "grad" if double else "main_grad"
    found = {name: getattr(value, kind).double().cpu() for name, value in stage.named_parameters()}
    return {"loss": loss.detach().double().cpu(), **found}


def correctness(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return the errors of each mode's loss and gradients against float64, and of one backend against the other."""
    import torch

    path = folder / "float64.pt"
    command = [sys.executable, __file__, "--output", str(folder / "x"), "--float64-gradients", str(path)]
    subprocess.run([*command, *(["--dry-run"] if sizes is DRY else [])], check=True, env=without_gpu())
    exact = torch.load(path)
    found = {}
    for form, loops in FORMS.items():
        kept = {}
        for name, mode in modes(sizes).items():
            forget()
            kept[name] = gradients(run_config(sizes.small, sizes.small_length, {**mode, "loops": loops}))
            found[name + form] = largest_error(kept[name], exact[form])
        if "te bf16" in kept:
            found[f"te bf16 against torch bf16{form}"] = largest_error(kept["te bf16"], kept["torch bf16"])
    return found


def largest_error(ours: dict[str, Any], exact: dict[str, Any]) -> dict[str, Any]:
    assert ours.keys() == exact.keys(), "another model"
    errors = {name: float((ours[name] - value).abs().max() / value.abs().max()) for name, value in exact.items()}
    loss = errors.pop("loss")
    worst = max(errors, key=lambda name: (math.isnan(errors[name]), errors[name]))  # `max` passes over a NaN
    median = statistics.median(errors.values())
    return {"loss": loss, "worst gradient": errors[worst], "in": worst, "median gradient": median}


def without_gpu() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


# ---------------------------------------------------------------- training


def training(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Train the same run in each mode; return its losses."""
    from plt_megatron.train.megatron_engine import MegatronEngine

    curves = {}
    for name, mode in modes(sizes).items():
        forget()
        trained = MegatronEngine(run_config(sizes.small, sizes.small_length, mode, micro_batch_size=8), VOCAB_SIZE)
        curves[name] = [
            trained.train_step([text(8, sizes.small_length, seed=step)]).loss for step in range(sizes.steps)
        ]
        del trained
    last = sizes.steps // 4
    ends = {name: statistics.mean(losses[-last:]) for name, losses in curves.items()}
    return {"curves": curves, "running means": running_means(curves), "last quarter": ends}


# ---------------------------------------------------------------- speed


def speed(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Time forward and backward of PLT-2 and of GPT with twice the layers, in each mode."""
    import torch

    from plt_megatron.predict import cards
    from plt_megatron.predict.flops import training_flops_per_token

    found: dict[str, Any] = {}
    for name, mode in speed_modes(sizes).items():
        config = run_config(sizes.large, sizes.large_length, mode, micro_batch_size=1)
        batch = text(1, sizes.large_length, seed=0)
        seconds, memory = {}, {}
        for kind, build in {"PLT-2": plt_step, "GPT, twice the depth": gpt_step}.items():
            forget()
            step = build(config, batch)
            seconds[kind] = timed(step, sizes.repetitions)
            memory[kind] = 0 if is_cpu() else torch.cuda.max_memory_allocated()
            del step
        flops = training_flops_per_token(config.model, sizes.large_length, VOCAB_SIZE).total * sizes.large_length
        peak = cards.lookup(torch.cuda.get_device_name(), "bf16") if not is_cpu() else None
        found[name] = {
            "tokens/s": {kind: sizes.large_length / value for kind, value in seconds.items()},
            "memory MiB": {kind: value / 2**20 for kind, value in memory.items()},
            "MFU of the bf16 peak": flops / seconds["PLT-2"] / 1e12 / peak if peak else None,
            "ratio": seconds["GPT, twice the depth"] / seconds["PLT-2"],
        }
    with_graphs = [name for name in found if name.startswith("te") and "nothing fused" not in name]
    return found | {f"{name}, GPT with CUDA graphs": graphs(name, found[name], sizes, folder) for name in with_graphs}


def graphs(name: str, plt2: dict[str, Any], sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Compare PLT-2 as timed before with GPT whose layers are CUDA graphs; `failed` says why if GPT did not run."""
    path = folder / "graphs.json"
    command = [sys.executable, str(Path(__file__).with_name("gpu_graphs.py")), "--mode", name, "--output", str(path)]
    command += ["--dry-run"] if sizes is DRY else []
    forget()
    process = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if process.returncode != 0:
        lines = process.stderr.strip().splitlines()
        return {"failed": lines[-1] if lines else f"exit status {process.returncode}"}
    kind, figures = "GPT, twice the depth", json.loads(path.read_text())
    row = {unit: plt2[unit] | {kind: figures[unit]} for unit in ("tokens/s", "memory MiB")}
    return {**plt2, **row, "ratio": plt2["tokens/s"]["PLT-2"] / figures["tokens/s"]}


# ---------------------------------------------------------------- decoding


def decode(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Return milliseconds per token of the paper's ablation, by batch size (1 to 64) and row."""
    command = [sys.executable, str(Path(__file__).with_name("decode.py")), "--output", str(folder / "decode.json")]
    if sizes is DRY:
        command += ["--small"]
    else:
        command += ["--graph", "--batch", "1", "4", "16", "64", "--decode", "64"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((folder / "decode.json").read_text())["rows"]
    return {batch: {name: timing["ms"] for name, timing in timings.items()} for batch, timings in rows.items()}


# ---------------------------------------------------------------- everything


def versions() -> dict[str, str]:
    """Return the versions of the software that the figures depend on."""
    import torch

    found = {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    for package in ("torch", "megatron-core", "transformer-engine"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def run_parts(sizes: Sizes, only: list[str], output: Path, command: str) -> dict[str, Any]:
    """Run the parts, writing the results after each."""
    import torch

    known = Path(f"{output}.json")
    results: dict[str, Any] = json.loads(known.read_text()) if known.exists() else {"seconds": 0.0}
    results["machine"] = "CPU" if is_cpu() else torch.cuda.get_device_name()
    results |= {"command": command, "bars": sizes is not DRY, "versions": versions()}
    output.parent.mkdir(parents=True, exist_ok=True)
    for part in only:
        started = time.perf_counter()
        results[part] = globals()[part](sizes, output.parent)
        results["seconds"] += time.perf_counter() - started
        known.write_text(json.dumps(results, indent=1) + "\n")
        Path(f"{output}.md").write_text(markdown(results))
        print(f"{part}: {time.perf_counter() - started:.0f} s", flush=True)
    return results


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    import torch

    warnings.filterwarnings("ignore")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    if enter_cpu_runtime() and not (arguments.dry_run or arguments.float64_gradients):
        print("error: no GPU here; --dry-run shows whether the script runs", file=sys.stderr)
        return 2
    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

    init_process_groups(ParallelConfig())
    sizes = DRY if arguments.dry_run else FULL
    if arguments.float64_gradients:
        exact = {
            form: gradients(
                run_config(sizes.small, sizes.small_length, {"backend": "torch", "loops": loops}), double=True
            )
            for form, loops in FORMS.items()
        }
        torch.save(exact, arguments.float64_gradients)
        return 0
    command = "python benchmarks/gpu.py " + " ".join(sys.argv[1:] if argv is None else argv)
    results = run_parts(sizes, list(arguments.only), Path(arguments.output), command)
    destroy_process_groups()
    print(markdown(results))
    missed = missed_bars(results)
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
