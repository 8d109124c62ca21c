#!/usr/bin/env python3
"""Time of megatron-core's GPT with a CUDA graph per layer, the one switch that PLT-2 cannot have in training.

benchmarks/gpu.py runs it in a separate process, since a failed capture may leave CUDA unusable in its process.

    python benchmarks/gpu_graphs.py --mode "te bf16" --output FILE [--dry-run]

Writes tokens/s and MiB as JSON. Without a GPU (--dry-run) nothing can be captured, and the same steps run eagerly.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_modes import DRY, FULL, modes, run_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", required=True, help="one of benchmarks/gpu_modes.py")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore")
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    enter_cpu_runtime()
    from plt_megatron.config.schema import ParallelConfig
    from plt_megatron.runtime.process_groups import destroy_process_groups, init_process_groups

    init_process_groups(ParallelConfig())
    figures = measure(arguments.mode, dry=arguments.dry_run)
    arguments.output.write_text(json.dumps(figures) + "\n")
    destroy_process_groups()
    return 0


def measure(mode: str, *, dry: bool) -> dict[str, float]:
    """Return tokens/s and peak memory in MiB of a forward and backward pass at benchmarks/gpu.py's sizes."""
    import torch

    from benchmarks.gpu import is_cpu, text, timed
    from benchmarks.gpu_steps import gpt_step

    sizes = DRY if dry else FULL
    config = run_config(sizes.large, sizes.large_length, {**modes(sizes)[mode], "fusions": {}}, micro_batch_size=1)
    step = gpt_step(config, text(1, sizes.large_length, seed=0), graphs=not is_cpu())
    seconds = timed(step, sizes.repetitions)
    memory = 0 if is_cpu() else torch.cuda.max_memory_allocated()
    return {"tokens/s": sizes.large_length / seconds, "memory MiB": memory / 2**20}


if __name__ == "__main__":
    sys.exit(main())
