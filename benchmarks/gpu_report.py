"""Tables of the results of benchmarks/gpu.py, and the bars that they miss."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

# Relative to the largest element of the float64 gradient. bf16 has 8 bits of mantissa, FP8 3 or 4.
GRADIENT_BARS = {"bf16": 0.05, "fp8": 0.5}
BACKENDS_BAR = 0.05  # both backends in bf16 against one another
CURVE_BAR = 0.05  # FP8's loss against bf16's, relative: each tenth of the run
END_BAR = 0.02  # and the last quarter
SPEED_BAR = 0.95  # PLT-2's tokens/s against GPT's of twice the depth


def missed_bars(results: dict[str, Any]) -> list[str]:
    """Return one line for each missed bar; a dry run has no bars."""
    missed: list[str] = []
    if not results["bars"]:
        return missed
    for name, errors in results.get("correctness", {}).items():
        bar = BACKENDS_BAR if "against" in name else GRADIENT_BARS["fp8" if "fp8" in name else "bf16"]
        if not errors["worst gradient"] <= bar:
            missed.append(f"{name}: gradient of {errors['in']} is off by {errors['worst gradient']:.3f}, bar {bar}")
        if not errors["loss"] <= bar:
            missed.append(f"{name}: the loss is off by {errors['loss']:.3f}, bar {bar}")
    training = results.get("training", {"last quarter": {}, "running means": {}})
    for name, end in training["last quarter"].items():
        missed += _missed_curves(name, end, training) if "fp8" in name else []
    for name, figures in results.get("speed", {}).items():
        if "failed" in figures:
            missed.append(f"{name}: nothing to compare with, GPT did not run: {figures['failed']}")
        elif not figures["ratio"] >= SPEED_BAR:
            missed.append(f"{name}: PLT-2 at {figures['ratio']:.3f} of GPT's tokens/s, bar {SPEED_BAR}")
    return missed


def _missed_curves(name: str, end: float, training: dict[str, Any]) -> list[str]:
    """Return one line for each bar on FP8's loss curve, relative to bf16's with the same layers, that is missed."""
    expected, missed = training["last quarter"]["te bf16"], []
    if not abs(end / expected - 1) <= END_BAR:
        missed.append(f"{name}: loss {end:.4f} at the end, {expected:.4f} in bf16, bar {END_BAR:.0%}")
    means = training["running means"]
    pairs = zip(means[name], means["te bf16"], strict=True)
    gaps = ((abs(one / other - 1), number) for number, (one, other) in enumerate(pairs, 1))
    gap, tenth = max(gaps, key=lambda pair: pair[0] if pair[0] == pair[0] else float("inf"))
    if not gap <= CURVE_BAR:
        missed.append(f"{name}: loss {gap:.1%} off bf16's in tenth {tenth} of the run, bar {CURVE_BAR:.0%}")
    return missed


def running_means(curves: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the mean loss of each tenth of a run, or of each step if there are fewer than ten."""
    means = {}
    for name, losses in curves.items():
        parts = min(10, len(losses))
        edges = [round(part * len(losses) / parts) for part in range(parts + 1)]
        means[name] = [statistics.mean(losses[first:end]) for first, end in itertools.pairwise(edges)]
    return means


def markdown(results: dict[str, Any]) -> str:
    """Return all figures as Markdown tables."""
    lines = [f"# {results['machine']}", "", f"`{results['command']}`, {results['seconds']:.0f} s", ""]
    lines.append("; ".join(f"{name} {version}" for name, version in results["versions"].items()) + "\n")
    for name, value in results.get("rates", {}).items():
        lines.append(f"- {name}: {value:,.1f}")
    for title, (header, rows) in _tables(results).items():
        if rows:
            lines += ["", f"## {title}", "", " | ".join(header), " | ".join("---" for _ in header)]
            lines += [" | ".join(str(cell) for cell in row) for row in rows]
    missed = missed_bars(results)
    if results["bars"]:
        lines += ["", *(f"- missed: {line}" for line in missed)] if missed else ["", "Every bar is met."]
    return "\n".join(lines) + "\n"


def _tables(results: dict[str, Any]) -> dict[str, tuple[tuple[str, ...], list[tuple[Any, ...]]]]:
    """Return the header and rows of each table, by title."""
    means = results.get("training", {}).get("running means", {})
    return {
        "Against float64 on the CPU (relative to a tensor's largest element)": (
            ("mode", "loss", "median gradient", "worst gradient", "in"),
            [
                (name, f"{e['loss']:.1e}", f"{e['median gradient']:.1e}", f"{e['worst gradient']:.1e}", e["in"])
                for name, e in results.get("correctness", {}).items()
            ],
        ),
        "Loss over the last quarter of a short run": (
            ("mode", "loss"),
            [(name, f"{loss:.4f}") for name, loss in results.get("training", {}).get("last quarter", {}).items()],
        ),
        "Loss curves: means over tenths of the run": (
            ("tenth", *means),
            [
                (number, *(f"{loss:.4f}" for loss in losses))
                for number, losses in enumerate(zip(*means.values(), strict=True), 1)
            ],
        ),
        "PLT-2 against GPT of twice the depth, forward and backward": (
            ("mode", "PLT-2 tokens/s", "GPT tokens/s", "ratio", "MFU (bf16 peak)", "PLT-2 MiB", "GPT MiB"),
            [_speed_row(name, figures) for name, figures in results.get("speed", {}).items()],
        ),
        "Decoding, ms a token (times vanilla)": (
            ("batch", *next(iter(results.get("decode", {}).values()), {})),
            [
                (batch, *(f"{ms:.3f} ({ms / rows['vanilla']:.2f})" for ms in rows.values()))
                for batch, rows in results.get("decode", {}).items()
            ],
        ),
    }


def _speed_row(name: str, figures: dict[str, Any]) -> tuple[str, ...]:
    if "failed" in figures:
        return (name, "", "did not run", "", "", "", "")
    mfu = figures["MFU of the bf16 peak"]
    return (
        name,
        *(f"{value:,.0f}" for value in figures["tokens/s"].values()),
        f"{figures['ratio']:.3f}",
        "" if mfu is None else f"{mfu:.1%}",
        *(f"{value:,.0f}" for value in figures["memory MiB"].values()),
    )
