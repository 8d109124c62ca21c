"""Loss plots of hand-made runs: the figure is a real picture, its curves are the data, bad runs are refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from plt_megatron.errors import UserError
from plt_megatron.experiments import plots
from plt_megatron.experiments.figures import smooth


@pytest.fixture
def runs(tmp_path):
    folders = []
    for name, loops, offset in (("looped", (1, 2), 0.0), ("plain", (1,), 0.2)):
        folder = tmp_path / name
        folder.mkdir()
        records = []
        for step in range(1, 101):
            loss = 3 + offset + 6 * math.exp(-step / 8)
            records.append({"kind": "train", "step": step, "tokens": step * 4096, "loss": loss})
            if step % 25 == 0:
                common = {"kind": "validation", "step": step, "tokens": step * 4096}
                records += [{**common, "loop_count": count, "loss": loss + 1 / count} for count in loops]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        folders.append(folder)
    return folders


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, to look into."""
    figures = []
    save = Figure.savefig

    def saved(self, *args, **options):
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", saved)
    return figures


def test_the_picture_holds_every_run_in_its_color(runs, tmp_path, drawn):
    out = tmp_path / "new folder" / "loss.png"
    plots.plot_losses(runs, out, ["two loops", "one loop"])
    picture = imread(out)
    assert picture.shape[0] > 500 and picture.shape[1] > 900
    assert picture[..., :3].std() > 0.05
    (axes,) = drawn[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "two loops, training",
        f"two loops, validation, 1 loop: {3 + 6 * math.exp(-12.5) + 1:.3f}",
        f"two loops, validation, 2 loops: {3 + 6 * math.exp(-12.5) + 0.5:.3f}",
        "one loop, training",
        f"one loop, validation, 1 loop: {3.2 + 6 * math.exp(-12.5) + 1:.3f}",
    ]
    colors = [line.get_color() for line in axes.get_lines()]
    assert len(set(colors)) == 2


def test_the_curves_are_the_data_and_the_end_is_in_view(runs, tmp_path, drawn):
    plots.plot_losses(runs[:1], tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    raw = axes.get_lines()[0]
    assert list(raw.get_xdata()) == [step * 4096 for step in range(1, 101)]
    assert raw.get_ydata()[-1] == pytest.approx(3 + 6 * math.exp(-12.5))
    low, high = axes.get_ylim()
    assert low < 3 and 4 < high < 8  # the first steps' 8.3 is cut, what differs later is not


def test_smoothing_keeps_length_ends_and_level_and_skips_what_is_not_finite():
    values = [float(value) for value in range(200)]
    assert smooth(values) == pytest.approx(values)  # a centered mean leaves a line alone
    assert smooth([2.0, math.nan, 4.0])[1] == 3.0
    assert math.isnan(smooth([math.nan])[0])
    assert smooth([]) == []


def test_losses_that_are_not_finite_or_all_equal_still_give_a_picture(tmp_path):
    for name, losses in (("diverged", [5.0, math.nan, math.inf]), ("flat", [2.0, 2.0, 2.0]), ("one", [2.0])):
        folder = tmp_path / name
        folder.mkdir()
        records = [{"kind": "train", "step": step, "tokens": step, "loss": loss} for step, loss in enumerate(losses, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        plots.plot_losses([folder], folder / "loss.png")
        assert (folder / "loss.png").stat().st_size > 1000


def test_bad_requests_are_refused(runs, tmp_path):
    with pytest.raises(UserError, match="no run to plot"):
        plots.plot_losses([], tmp_path / "loss.png")
    with pytest.raises(UserError, match="has no run that has started"):
        plots.plot_losses([tmp_path / "absent"], tmp_path / "loss.png")
    with pytest.raises(UserError, match="cannot write the plot"):
        plots.plot_losses(runs, tmp_path / "loss.sculpture")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the plot"):
        plots.plot_losses(runs, tmp_path / "file" / "loss.png")


# ---------------------------------------------------------------- the page of all curves


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
