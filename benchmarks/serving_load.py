#!/usr/bin/env python3
"""Mixed load by `vllm bench serve` on servers with one loop, naive loops and PLT-2.

    python benchmarks/serving_load.py              # models of 252M parameters in bf16; `make demo` makes the tokenizer
    python benchmarks/serving_load.py --small      # does it run?

All servers run at once and take turns, so that other load on the machine affects each. Prompts are random, and their
lengths and those of answers vary; at most `--concurrency` requests run at once, and a new prompt is computed beside the
others' decode steps. A row "PLT-2@96" gives its server 96 tokens per step (`--max-num-batched-tokens`) instead of 512.
Figures are medians over turns: throughput in generated tokens/s, inter-token latency and time to first token in ms.

Exits with 1 when a bar is missed: of a row with @, the p99 of inter-token latency is at most 1.3 times vanilla's; of
PLT-2 (with @ or without), the time to first token at most 2.1 times vanilla's, since its loops compute twice as much.
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

from serving import MODEL, PLUGIN, ROWS, SMALL  # noqa: E402

FIGURES = {"output_throughput": "tokens/s", "median_itl_ms": "ITL p50", "p99_itl_ms": "ITL p99"}
FIGURES |= {"median_ttft_ms": "TTFT p50", "p99_ttft_ms": "TTFT p99"}
STEP = 512  # tokens
P99_TO_VANILLA, TTFT_TO_VANILLA = 1.3, 2.1
# `vllm bench serve`, since the CPU build lacks the `vllm` command.
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
    parser.add_argument("--rows", nargs="+", type=known_row, default=["vanilla", "naive loops", "PLT-2"])
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


def known_row(text: str) -> str:
    """Check a row's name, with or without @ and the tokens per step, and return it."""
    name, at, tokens = text.partition("@")
    if name not in ROWS or (at and not tokens.isdigit()):
        raise argparse.ArgumentTypeError(f"{text}: none of {', '.join(ROWS)}, with @TOKENS or without")
    return text


def write_model(folder: Path, row: str, args: argparse.Namespace) -> None:
    """Write a configuration, for random weights, and a real tokenizer."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(args.tokenizer / name, folder)
    vocabulary = json.loads((args.tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    changes = ROWS[row.partition("@")[0]]
    config = {**MODEL, **(SMALL if args.small else {}), **changes, "vocab_size": len(vocabulary)}
    (folder / "config.json").write_text(json.dumps(config))


def options(row: str, concurrency: int) -> list[str]:
    """Return a server's options, except for the model."""
    name, _, tokens = row.partition("@")
    tokens = tokens or str(STEP)
    chosen = ["--load-format", "dummy", "--enforce-eager", "--no-enable-prefix-caching", "--generation-config", "vllm"]
    chosen += ["--max-num-seqs", str(concurrency), "--max-model-len", "2048", "--max-num-batched-tokens", tokens]
    chosen += ["--additional-config", json.dumps(PLUGIN.get(name, {}))]
    # What must be free, not what is used: other rows' servers run too.
    return [*chosen, "--kv-cache-memory-bytes", str(1 << 29), "--gpu-memory-utilization", "0.1"]


def load(folder: Path, port: int, turn: int, args: argparse.Namespace) -> dict[str, float]:
    """Run one turn of `vllm bench serve`; return its figures by name."""
    result = folder / f"turn{turn}.json"
    command = [sys.executable, "-c", BENCH, "--model", str(folder), "--port", str(port), "--dataset-name", "random"]
    command += ["--served-model-name", "plt"]
    command += ["--random-input-len", str(args.prompt), "--random-output-len", str(args.answer)]
    command += ["--random-range-ratio", "0.5", "--num-prompts", str(args.requests), "--seed", str(turn)]
    command += ["--max-concurrency", str(args.concurrency), "--ignore-eos", "--temperature", "0", "--disable-tqdm"]
    command += ["--save-detailed", "--save-result", "--result-dir", str(folder), "--result-filename", result.name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: vllm bench serve failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    figures = json.loads(result.read_text())
    if figures["completed"] != args.requests:
        errors = "\n".join(filter(None, figures["errors"]))
        sys.exit(f"error: {folder}: {figures['completed']} of {args.requests} requests were answered:\n{errors}")
    return {name: figures[key] for key, name in FIGURES.items()}


def missed_bars(medians: dict[str, dict[str, float]]) -> list[str]:
    """Return one line for each missed bar; none if vanilla was not measured."""
    lines = []
    for name, figures in medians.items() if "vanilla" in medians else ():
        bars = {"ITL p99": P99_TO_VANILLA} if "@" in name else {}
        bars |= {"TTFT p50": TTFT_TO_VANILLA} if name.startswith("PLT-2") else {}
        for figure, bar in bars.items():
            ratio = figures[figure] / medians["vanilla"][figure]
            if ratio > bar:
                lines.append(f"{name}: {figure} is {ratio:.2f}x vanilla's, bar {bar}x")
    return lines


def main() -> int:
    args = parse_arguments()
    turns: dict[str, list[dict[str, float]]] = {row: [] for row in args.rows}
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as servers:
        folders = {row: Path(temporary) / str(number) for number, row in enumerate(args.rows)}
        for row, folder in folders.items():
            write_model(folder, row, args)
        ports = {}
        for row, folder in folders.items():
            started = serve(folder, folder, *options(row, args.concurrency), VLLM_CPU_OMP_THREADS_BIND="nobind")
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
    if args.small:
        return 0
    missed = missed_bars(medians)
    print("\n".join(missed) or "all bars are held")
    return int(bool(missed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServerError as error:
        sys.exit(f"error: {error}")
