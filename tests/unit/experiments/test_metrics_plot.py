"""The page of all curves, through the command as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from plt_megatron.errors import UserError
from plt_megatron.experiments import plots

ROOT = Path(__file__).resolve().parents[3]


def write_run(folder: Path, loops: int, steps: int = 30) -> Path:
    folder.mkdir()
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "kind": "train",
                "step": step,
                "tokens": 2048 * step,
                "loss": 8 / step**0.2,
                "grad_norm": 1 / step,
            }
            record |= {"lr": 1e-3, "tokens_per_second": 1e4, "mfu": 0.4, "peak_memory_bytes": 3e9}
            record |= {
                "gate_mean": [None, *[0.5] * (loops - 1)],
                "hidden_norm": [1.0] * loops,
                "step_size": [1.0] * loops,
            }
            record |= {"step_seconds": {"data": 0.01, "forward_backward": 0.2}, "source_epochs": {"web": step / 50}}
            file.write(json.dumps(record) + "\n")
            if step % 10 == 0:
                validation = {
                    "kind": "validation",
                    "step": step,
                    "tokens": 2048 * step,
                    "loop_count": loops,
                    "loss": 5.0,
                }
                file.write(json.dumps(validation) + "\n")
    return folder


def test_the_command_draws_runs_of_different_loop_counts(tmp_path):
    runs = [write_run(tmp_path / name, loops) for name, loops in (("one", 1), ("three", 3))]
    command = [sys.executable, str(ROOT / "tools/plot.py"), *map(str, runs)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    picture = tmp_path / "one" / "metrics.png"
    assert result.stdout.strip() == str(picture) and picture.read_bytes().startswith(b"\x89PNG")


def panels_drawn(monkeypatch, tmp_path, runs) -> dict[str, object]:
    """Title -> axes of the page."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_metrics(runs, tmp_path / "page.png")
    return {axes.get_title(): axes for axes in drawn[0].axes}


def test_there_is_a_curve_for_each_loop_and_part(monkeypatch, tmp_path):
    panels = panels_drawn(monkeypatch, tmp_path, [write_run(tmp_path / "run", 2)])
    assert len(panels) == 11

    def names(title: str) -> list[str]:
        return [text.get_text() for text in panels[title].get_legend().get_texts()]

    assert names("hidden states after a loop") == ["loop 1", "loop 2"]
    assert {panels[title].get_ylabel() for title in ("hidden states after a loop", "change by a loop")} == {
        "L2 norm, mean over tokens"
    }, "as model/loop_statistics.py computes them"
    assert names("gates") == ["loop 2"], "the first loop has no gate"
    assert names("where a step's time goes") == ["data", "forward backward"]
    assert names("loss") == ["validation, 2 loops: 5.000"]


def test_what_no_run_recorded_has_no_panel(monkeypatch, tmp_path):
    panels = panels_drawn(monkeypatch, tmp_path, [write_run(tmp_path / "run", 1, steps=1)])
    assert "gates" not in panels and "loss" in panels


def test_a_run_without_metrics_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl not found: .*empty has no run that has started"):
        plots.plot_metrics([tmp_path / "empty"], tmp_path / "page.png")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training step yet"):
        plots.plot_metrics([tmp_path / "empty"], tmp_path / "page.png")
    with pytest.raises(UserError, match="cannot write the plot"):
        plots.plot_metrics([write_run(tmp_path / "run", 2)], tmp_path / "page.word")


def test_parts_have_styles_of_their_own_and_nothing_lies_on_the_frame_or_under_the_legend(monkeypatch, tmp_path):
    run = write_run(tmp_path / "run", 2)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    parts = ("data", "forward_backward", "gradient_reduction", "optimizer", "validation", "checkpoint")
    for record in records:
        record["step_seconds"] = {part: 0.01 * number for number, part in enumerate(parts, start=1)}
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    panels = panels_drawn(monkeypatch, tmp_path, [run])
    times = panels["where a step's time goes"]
    styles = {str(line._unscaled_dash_pattern) for line in times.lines if len(line.get_xdata())}
    assert len(styles) == len(parts)
    for title in ("peak memory", "gates"):
        drawn = [line for line in panels[title].lines if len(line.get_ydata())]
        assert max(max(line.get_ydata()) for line in drawn) < 0.97 * panels[title].get_ylim()[1]
    figure = times.figure
    figure.canvas.draw()
    bottom = times.get_legend().get_window_extent().y0
    curves = [line for line in times.lines if len(line.get_ydata())]
    assert all(times.transData.transform((0, max(line.get_ydata())))[1] < bottom for line in curves)
