#!/usr/bin/env python3
"""The mixed load of `vllm bench serve` on servers with one loop, naive loops and PLT-2.

    python benchmarks/serving_load.py              # models of 252M parameters in bf16; `make demo` makes the tokenizer
    python benchmarks/serving_load.py --small      # does it run?

All servers are up at once and take turns, so that a busy moment of the machine hits each. Prompts are random and
uneven, answers too; at most `--concurrency` requests run at once, and a new prompt is computed beside the others'
decode steps.
Figures are medians over turns: throughput in generated tokens/s, and the inter-token latency's p50 and p99 in ms.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "serving")]


from server import ServerError, serve  # noqa: E402

from serving import MODEL, ROWS, SMALL  # noqa: E402

FIGURES = {"output_throughput": "tokens/s", "median_itl_ms": "ITL p50", "p99_itl_ms": "ITL p99"}
# The `vllm` command, which the CPU build comes without.
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".demo" / "hf", help="a folder with tokenizer.json")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["vanilla", "naive loops", "PLT-2"])
    parser.add_argument("--requests", type=int, default=16, help="in a turn")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=96, help="mean tokens of a prompt; between half and 1.5 times it")
    parser.add_argument("--answer", type=int, default=96, help="mean tokens of an answer, likewise")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file too")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    if not (args.tokenizer / "tokenizer.json").is_file():
        parser.error(f"{args.tokenizer} has no tokenizer.json: run `make demo` first, or give --tokenizer")
    if args.small:
        args.requests, args.turns, args.prompt, args.answer = 3, 2, 16, 8
    return args


def write_model(folder: Path, row: str, args: argparse.Namespace) -> None:
    """A configuration for random weights, with a real tokenizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.tokenizer / name, folder)
    vocabulary = json.loads((args.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    config = {**MODEL, **(SMALL if args.small else {}), **ROWS[row], "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config))


def options(concurrency: int) -> list[str]:
    """A server's, beside its model."""
    chosen = ["--load-format", "dummy", "--enforce-eager", "--no-enable-prefix-caching", "--generation-config", "vllm"]
    chosen += ["--max-num-seqs", str(concurrency), "--max-model-len", "1024", "--max-num-batched-tokens", "512"]
    return [*chosen, "--kv-cache-memory-bytes", str(1 << 29)]


def load(folder: Path, port: int, turn: int, args: argparse.Namespace) -> dict[str, float]:
    """One turn of `vllm bench serve`."""
    result = folder / f"turn{turn}.json"
    command = [sys.executable, "-c", BENCH, "--model", str(folder), "--port", str(port), "--dataset-name", "random"]
    command += ["--served-model-name", "plt"]
    command += ["--random-input-len", str(args.prompt), "--random-output-len", str(args.answer)]
    command += ["--random-range-ratio", "0.5", "--num-prompts", str(args.requests), "--seed", str(turn)]
    command += ["--max-concurrency", str(args.concurrency), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--save-result", "--result-dir", str(folder), "--result-filename", result.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    figures = json.loads(result.read_text())
    if figures["completed"] != args.requests:
        sys.exit(f"error: {figures['completed']} of {args.requests} requests were answered")
    return {name: figures[key] for key, name in FIGURES.items()}


def main() -> int:
    args = parse_arguments()
    turns: dict[str, list[dict[str, float]]] = {row: [] for row in args.rows}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as servers:
        folders = {row: Path(temporary) / str(number) for number, row in enumerate(args.rows)}
        for row, folder in folders.items():
            write_model(folder, row, args)
        ports = {}
        for row, folder in folders.items():
            started = serve(folder, folder, *options(args.concurrency), VLLM_CPU_OMP_THREADS_BIND="nobind")
            ports[row] = servers.enter_context(started).port
        for turn in range(args.turns + 1):
            for row, port in ports.items():
                figures = load(folders[row], port, turn, args)
                if turn:  # the first one warms up
                    turns[row].append(figures)
    medians = {
        row: {name: statistics.median(figures[name] for figures in found) for name in FIGURES.values()}
        for row, found in turns.items()
    }
    for row, figures in medians.items():
        print(f"{row:<12} " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
    if args.output:
        found = {"concurrency": args.concurrency, "median": medians, "turns": turns}
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"error: {error}")
