#!/usr/bin/env python3
"""Time of a prompt step in vLLM by number of tokens, for one loop and PLT-2, and a bound on a wavefront's gain.

    python benchmarks/serving_prompts.py              # a 276M model in bf16
    python benchmarks/serving_prompts.py --small      # does it run?

Loop l of token t needs loop l-1 of token t-1, so PLT-2 takes a chunk of C prompt tokens in two passes of C rows. In a
wavefront over chunks, loop 2 of a chunk would run beside loop 1 of the next, in one pass of 2 C rows. A plain model's
step of 2 C tokens is such a pass, so its time is a lower bound for a wavefront's step.

All engines run in this process and take turns. Figures are medians over turns, ratios are taken within a turn. Exits
with 1 when a bar is missed: PLT-2 computes a prompt in at most 2.1 times a plain
model's time, and half of it in 1.3 times.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from plt_megatron.experiments.turns import in_turn
from serving import add_options, add_request, keep_engines_here, make_engine, make_prompt, ratio

ENGINES = ("vanilla", "PLT-2")
TO_VANILLA = 2.1  # for the same prompt: two loops compute twice as much
HALF_TO_VANILLA = 1.3  # for half as many tokens per step: the time that decode steps beside a prompt wait


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512], help="of a step's prompt")
    add_options(parser, turns=9)
    args = parser.parse_args()
    if args.small:
        args.tokens, args.turns = [8, 16], 2
    return args


def milliseconds(engine, count: int, seed: int) -> float:
    """Return the milliseconds of the step that computes a prompt of `count` tokens and its first token."""
    add_request(engine, f"{count}-{seed}", make_prompt(seed, count), tokens=1)
    begun = time.perf_counter()
    while engine.has_unfinished_requests():
        engine.step()
    return 1e3 * (time.perf_counter() - begun)


def measure(engines: dict, args: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Return the milliseconds of each turn, by engine and number of tokens."""
    times: dict[str, dict[int, list[float]]] = {name: {count: [] for count in args.tokens} for name in engines}
    for turn in range(args.turns + 1):
        for count in args.tokens:
            for name in in_turn(engines, turn):
                taken = milliseconds(engines[name], count, turn)
                if turn:  # the first one warms up
                    times[name][count].append(taken)
    return times


def summarize(times: dict[str, dict[int, list[float]]]) -> list[dict[str, float]]:
    """Return a row for each number of tokens; `to_wavefront` is None if no plain step of twice as many was timed."""
    plain, plt = (times[name] for name in ENGINES)
    rows = []
    for count, taken in plt.items():
        row = {"tokens": count, "vanilla_ms": statistics.median(plain[count]), "plt2_ms": statistics.median(taken)}
        row["to_vanilla"] = ratio(taken, plain[count])
        row["to_wavefront"] = ratio(taken, plain[2 * count]) if 2 * count in plain else None
        rows.append(row)
    return rows


def missed_bars(rows: list[dict[str, float]]) -> list[str]:
    lines = []
    for row in rows:
        if row["to_vanilla"] > TO_VANILLA:
            lines.append(f"{row['tokens']} tokens: PLT-2 takes {row['to_vanilla']:.2f}x vanilla, bar {TO_VANILLA}x")
        half = row["to_wavefront"]
        if half is not None and half > HALF_TO_VANILLA:
            lines.append(
                f"{row['tokens']} tokens: PLT-2 takes {half:.2f}x vanilla with twice as many, bar {HALF_TO_VANILLA}x"
            )
    return lines


def main() -> int:
    args = parse_arguments()
    keep_engines_here()
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: make_engine(name, Path(folder) / str(n), args) for n, name in enumerate(ENGINES)}
        times = measure(engines, args)
    rows = summarize(times)
    for row in rows:
        step = row["to_wavefront"]
        least = "" if step is None else f"; {step:.2f}x a plain step of {2 * row['tokens']} tokens"
        print(
            f"{row['tokens']:>4} tokens: vanilla {row['vanilla_ms']:7.1f} ms, PLT-2 {row['plt2_ms']:7.1f} ms, "
            f"{row['to_vanilla']:.2f}x{least}"
        )
    if args.output:
        args.output.write_text(json.dumps({"rows": rows, "turns": times}, indent=1) + "\n")
    if args.small:
        return 0
    missed = missed_bars(rows)
    print("\n".join(missed) or "all bars are held")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
