#!/usr/bin/env python3
"""Depth task: pointer chains, solved by layers, serial loops and parallel loops.

    python benchmarks/depth_tasks.py data .demo/depth_tasks
    plt sweep configs/sweeps/depth_tasks.yaml --jobs 2
    python benchmarks/depth_tasks.py score runs/sweeps/depth_tasks/*-seed*
    python benchmarks/depth_tasks.py report runs/sweeps/depth_tasks

A row shows a random cycle f of eight symbols as the pairs "a f(a)" in the order of a, and asks for f, f(f), ... up to
four times. A question is one token for its hops k and its pauses p, a symbol x, p pause tokens, and the answer f^k(x).
With cross-loop parallelism, loop l of a token reads loop l-1 of the previous token, so a chain that continues in the
second loop needs another token to do so. `score` exports each run and decodes the answers token by token, with parallel
loops where the model has them.

Exit status of `report`: 1 where a bar is missed. Each with the pauses that suit it best, PLT-2 lies between its layers
once and twice as many (A), and solves more than 95 % of some depth of which its layers alone solve less than 60 % (B).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from plt_megatron.data.indexed import flat_tokens, mask_path, read_index, write_index
from plt_megatron.errors import UserError, run_command
from plt_megatron.experiments.figures import new_figure, save
from plt_megatron.experiments.records import state_of
from plt_megatron.experiments.sweep_plan import load_plan
from plt_megatron.run_folder.files import write_json
from plt_megatron.run_folder.text import plural

SYMBOLS, HOPS, PAUSES = 8, 4, 3  # questions have 1 to HOPS hops and 0 to PAUSES - 1 pauses
ROW = 128  # tokens
# A symbol has four tokens: as source and as target of a pair, in a question, and as an answer.
FROM, TO, ASKED, ANSWER, QUESTION = (number * SYMBOLS for number in range(5))
BOS, SEP, PAUSE, EOD = range(QUESTION + HOPS * PAUSES, QUESTION + HOPS * PAUSES + 4)
VOCABULARY = EOD + 1
FIRST_QUESTION = 2 + 2 * SYMBOLS
SCORES = "depth_tasks.json"  # in a run's folder
EXPORT = "exports/depth_tasks"  # where `plt archive` leaves weights out
ONE, TWICE, PLT = "k layers", "2k layers", "PLT-2"  # the sweep's rows that the bars compare
SOLVED, FAILED = 0.95, 0.60
CLOSE = 0.01  # shares of right answers that differ by less count as equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write the rows to begin with, to train on, and to score")
    data.add_argument("folder", type=Path)
    score = commands.add_parser("score", help="let runs answer the held-out questions")
    score.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    score.add_argument("--data", type=Path, default=Path(".demo/depth_tasks"), metavar="FOLDER")
    score.add_argument("--rows", type=int, default=512, metavar="N", help="held-out rows (default: %(default)s)")
    report = commands.add_parser("report", help="table and figure of a sweep's scored runs")
    report.add_argument("folder", type=Path, help="of the sweep")
    report.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .svg or .pdf file")
    arguments = parser.parse_args()
    if arguments.command == "data":
        return run_command(lambda: write_data(arguments.folder))
    if arguments.command == "score":
        return run_command(lambda: score_runs(arguments.runs, arguments.data, arguments.rows))
    return run_command(lambda: report_sweep(arguments.folder, arguments.plot))


# ---------------------------------------------------------------- data


def question_token(hops: int | np.ndarray, pauses: int | np.ndarray) -> Any:
    """Return the token of a question with 1 to `HOPS` hops and 0 to `PAUSES` - 1 pauses."""
    return QUESTION + PAUSES * (hops - 1) + pauses


@dataclass(frozen=True)
class Part:
    """Rows whose questions have 1 to `hops` hops and fewer than `pauses` pauses, uniformly distributed."""

    rows: int
    hops: int = HOPS
    pauses: int = PAUSES


# A run begins with single lookups and goes on to longer chains, since chains are hardly learned from the start.
PARTS = {"lookups": Part(20_000, hops=1, pauses=1)}
PARTS |= {f"hops_{most}": Part(20_000, hops=most) for most in range(1, HOPS)}
PARTS |= {"train": Part(80_000), "validation": Part(2_048)}


def draw_rows(generator: np.random.Generator, part: Part) -> np.ndarray:
    """Return uint8 [rows, ROW]: BOS, the pairs, SEP, as many whole questions as fit, and EOD in what is left."""
    count = part.rows
    every = np.arange(count)[:, None]
    cycles = generator.permuted(np.tile(np.arange(SYMBOLS), (count, 1)), axis=1)
    rows = np.full((count, ROW), EOD, np.uint8)
    rows[:, 0], rows[:, FIRST_QUESTION - 1] = BOS, SEP
    rows[:, 1 : FIRST_QUESTION - 1 : 2] = FROM + np.arange(SYMBOLS)
    rows[every, 2 + 2 * cycles] = TO + np.roll(cycles, -1, axis=1)
    shape = (count, (ROW - FIRST_QUESTION) // 3)
    hops, pauses = generator.integers(1, part.hops + 1, shape), generator.integers(0, part.pauses, shape)
    starts = generator.integers(0, SYMBOLS, shape)
    ends = FIRST_QUESTION + np.cumsum(3 + pauses, axis=1)
    row, question = np.nonzero(ends <= ROW)
    k, p, start, end = (values[row, question] for values in (hops, pauses, starts, ends))
    rows[row, end - 3 - p] = question_token(k, p)
    rows[row, end - 2 - p] = ASKED + cycles[row, start]
    for number in range(1, PAUSES):
        rows[row[p >= number], end[p >= number] - 1 - number] = PAUSE
    rows[row, end - 1] = ANSWER + cycles[row, (start + k) % SYMBOLS]
    return rows


def write_data(folder: Path, parts: dict[str, Part] = PARTS, seed: int = 1) -> None:
    """Write each part's .bin, .idx (a document per row) and loss mask (answers only).

    The bytes are the same for the same seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, part) in enumerate(parts.items()):
        rows = draw_rows(np.random.default_rng([seed, number]), part)
        rows.tofile(folder / f"{name}.bin")
        ((rows >= ANSWER) & (rows < QUESTION)).astype(np.uint8).tofile(mask_path(folder / name))
        lengths = np.full(part.rows, ROW, np.int32)
        write_index(folder / f"{name}.idx", np.uint8, lambda lengths=lengths: [lengths])
        print(f"{folder / name}: {part.rows:,} rows of {ROW} tokens")


def find_questions(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return row, index of the answer, hops and pauses of every question in `rows`."""
    row, at = np.nonzero((rows >= QUESTION) & (rows < BOS))
    kind = rows[row, at].astype(int) - QUESTION
    hops, pauses = kind // PAUSES + 1, kind % PAUSES
    return row, at + 2 + pauses, hops, pauses


# ---------------------------------------------------------------- scores


def score_runs(runs: Sequence[Path], data: Path, count: int) -> None:
    """Write `SCORES` into each run's folder: shares of right answers and numbers of questions, by pauses and hops."""
    index = read_index(data / "validation")
    rows = np.array(flat_tokens(index)).reshape(-1, ROW)[:count]
    for run in runs:
        scores = score(rows, answer(load(run), rows))
        write_json(run / SCORES, scores)
        shares = "; ".join(f"{p} pauses {', '.join(f'{value:.2f}' for value in s)}" for p, s in scores["right"].items())
        print(f"{run.name}: right at 1 to {HOPS} hops: {shares}", flush=True)


def load(run: Path) -> Any:
    """Return the run's model, loaded by transformers; export it first if that has not been done."""
    from plt_megatron.hf.exporting import ExportOptions, export
    from plt_megatron.hf.modeling_plt import PLTForCausalLM

    folder = run / EXPORT
    if not folder.exists():
        export(ExportOptions(run, folder), say=lambda _: None)
    return PLTForCausalLM.from_pretrained(folder).eval()


def answer(model: Any, rows: np.ndarray, batch: int = 128) -> np.ndarray:
    """Return int64 [rows, ROW]: at each index the token that `model` decodes greedily after the row's previous tokens.

    The pairs are a prompt. The rest is decoded token by token, with parallel loops where the model has them. Indices up
    to `FIRST_QUESTION` hold -1.
    """
    import torch

    decoded = np.full(rows.shape, -1, np.int64)
    for first in range(0, len(rows), batch):
        tokens = torch.from_numpy(rows[first : first + batch].astype(np.int64))
        cache = model.new_cache()
        with torch.inference_mode():
            model(input_ids=tokens[:, :FIRST_QUESTION], cache=cache, logits_to_keep=1)
            for at in range(FIRST_QUESTION, ROW - 1):
                logits = model(input_ids=tokens[:, at : at + 1], cache=cache).logits[:, -1]
                decoded[first : first + batch, at + 1] = logits.argmax(-1).numpy()
    return decoded


def score(rows: np.ndarray, decoded: np.ndarray) -> dict[str, Any]:
    """Return `right`: pauses -> shares of right answers at 1, 2, ... hops, and `asked`: the same of question counts."""
    row, at, hops, pauses = find_questions(rows)
    right = decoded[row, at] == rows[row, at]
    cells = {p: [right[(pauses == p) & (hops == k)] for k in range(1, HOPS + 1)] for p in range(PAUSES)}
    return {
        "right": {str(p): [float(cell.mean()) if len(cell) else None for cell in cells[p]] for p in cells},
        "asked": {str(p): [len(cell) for cell in cells[p]] for p in cells},
    }


# ---------------------------------------------------------------- report

Right = dict[int, list[list[float]]]  # pauses -> for each seed, shares of right answers at 1, 2, ... hops


def report_sweep(folder: Path, plot: Path | None) -> int:
    rows = read(folder)
    print("\n".join(table(rows)))
    if plot is not None:
        draw(rows, plot)
        print(f"\n{plot}")
    missed = missed_bars(rows)
    print("\n" + "\n".join([f"missed: {line}" for line in missed] or ["both bars hold"]))
    return int(bool(missed))


def read(folder: Path) -> dict[str, Right]:
    """Return the finished runs' scores by row, in the sweep's order.

    Raises:
        UserError: a finished run has no scores, or a row that the bars compare has no finished run.
    """
    rows: dict[str, Right] = {}
    for run in load_plan(folder).runs:
        path = run.folder.path / SCORES
        if not path.is_file():
            if state_of(run) != "finished":
                continue
            raise UserError(f"{path} is missing: run depth_tasks.py score {path.parent}")
        row = rows.setdefault(" ".join(run.labels.values()), defaultdict(list))
        for pauses, shares in json.loads(path.read_text(encoding="utf-8"))["right"].items():
            row[int(pauses)].append(shares)
    if missing := {ONE, TWICE, PLT} - rows.keys():
        raise UserError(f"{folder}: no finished run of {', '.join(sorted(missing))}")
    return rows


def means(row: Right, pauses: int) -> list[float]:
    """Return shares of right answers by hops, averaged over the seeds."""
    return [fmean(shares) for shares in zip(*row[pauses], strict=True)]


def best_pauses(row: Right) -> int:
    """Return the pauses with the row's best mean share: a pause may cost one loop the step that fetches the answer."""
    return max(row, key=lambda pauses: fmean(means(row, pauses)))


def best(row: Right) -> list[float]:
    return means(row, best_pauses(row))


def table(rows: dict[str, Right]) -> list[str]:
    """Return the lines of a Markdown table, where each row has the pauses that suit it best.

    Its columns are means over seeds in percent, the lowest and highest seed's mean over all hops, and the share of the
    gain of twice the layers.
    """
    header = [
        "row",
        "seeds",
        "pauses",
        *(f"k = {k}" for k in range(1, HOPS + 1)),
        "all k",
        "of the seeds",
        "of 2k's gain",
    ]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    once, twice = fmean(best(rows[ONE])), fmean(best(rows[TWICE]))
    for name, row in rows.items():
        pauses = best_pauses(row)
        shares = means(row, pauses)
        mean, seeds = fmean(shares), [fmean(of_seed) for of_seed in row[pauses]]
        cells = [f"{share:.1%}" for share in [*shares, mean]]
        gain = f"{(mean - once) / (twice - once):.0%}" if abs(twice - once) > CLOSE else "-"
        cells += [f"{min(seeds):.1%} to {max(seeds):.1%}", gain]
        lines.append("| " + " | ".join([name, str(len(seeds)), str(pauses), *cells]) + " |")
    return lines


def missed_bars(rows: dict[str, Right]) -> list[str]:
    """Return one line for each missed bar."""
    once, plt, twice = (best(rows[name]) for name in (ONE, PLT, TWICE))
    lines = []
    if not fmean(once) + CLOSE < fmean(plt) <= fmean(twice) + CLOSE:
        lines.append(f"A: {PLT} {fmean(plt):.1%} is not between {ONE} {fmean(once):.1%} and {TWICE} {fmean(twice):.1%}")
    if not any(b > SOLVED and a < FAILED for a, b in zip(once, plt, strict=True)):
        shares = ", ".join(f"{a:.1%} and {b:.1%}" for a, b in zip(once, plt, strict=True))
        lines.append(
            f"B: at no depth does {PLT} solve more than {SOLVED:.0%} and {ONE} less than {FAILED:.0%}: {shares}"
        )
    return lines


def draw(rows: dict[str, Right], path: Path) -> None:
    """Draw each row's shares of right answers by hops, as colors and numbers, with the pauses that suit it best."""
    shares = np.array([best(row) for row in rows.values()])
    figure, (axes,) = new_figure(6.4, 0.8 + 0.34 * len(rows), 1)
    axes.imshow(shares, cmap="YlGnBu", vmin=1 / SYMBOLS, vmax=1.0, aspect="auto")
    for (y, x), share in np.ndenumerate(shares):
        axes.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=9, color="white" if share > 0.6 else "black")
    labels = [f"{name} ({plural(len(row[0]), 'seed')})" for name, row in rows.items()]
    axes.set_yticks(range(len(rows)), labels, fontsize=9)
    axes.set_xticks(range(HOPS), ["1 hop", *(f"{k} hops" for k in range(2, HOPS + 1))])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    axes.set_title(f"right answers (exact match; by chance {1 / SYMBOLS:.0%})", fontsize=10)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
