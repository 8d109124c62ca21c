"""Plots of hand-made runs: the figure is a real picture, its curves are the data, bad runs are refused."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from sweep_helpers import edit_records, write_records

from plt_megatron.errors import UserError
from plt_megatron.experiments import plots
from plt_megatron.experiments.figures import Named, add_legend, new_figure, smooth, svg
from tests.running import ROOT, run


def test_a_pages_figure_has_its_numbers_whole_and_its_coordinates_short():
    figure, (axes,) = new_figure(4, 3)
    axes.plot([0.0005, 0.0015], [2.0975, 2.1594], label="naive loop: 2.0975", gid="title:loss 2.3456 < 2.4")
    axes.legend()
    text = svg(Named("losses", "Losses", figure))
    assert "naive loop: 2.0975" in text and ">0.0006<" in text and "loss 2.3456" in text
    assert not re.search(r"<[^>]*\.\d{3}[^>]*>", text)


@pytest.fixture
def runs(tmp_path):
    """A run of two loops and one of one loop, whose losses fall steeply at first."""
    folders = [tmp_path / "looped", tmp_path / "plain"]
    for folder, loops, offset in zip(folders, ((1, 2), (1,)), (0.0, 0.2), strict=True):
        losses = [3 + offset + 6 * math.exp(-step / 8) for step in range(1, 101)]
        write_losses(folder, losses, loops)
    return folders


def write_losses(folder: Path, losses: list[float], loops: tuple[int, ...] = ()) -> None:
    """Metrics with a validation at each loop count every 25 steps."""
    folder.mkdir()
    records = []
    for step, loss in enumerate(losses, start=1):
        record = {"kind": "train", "step": step, "tokens": step * 4096, "loss": loss, "grad_norm": loss}
        records.append(record)
        if step % 25 == 0:
            records += [{**record, "kind": "validation", "loop_count": n, "loss": loss + 1 / n} for n in loops]
    write_records(folder / "metrics.jsonl", records)


def test_the_losses_alone_are_one_picture_with_every_run_in_its_color(runs, tmp_path, monkeypatch):
    panels = panels_drawn(monkeypatch, tmp_path, runs, ["two loops", "one loop"], ["loss"])
    (axes,) = panels.values()
    end = 3 + 6 * math.exp(-12.5)
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        f"validation, 1 loop: {end + 1:.3f}",
        f"validation, 2 loops: {end + 0.5:.3f}",
        f"validation, 1 loop: {end + 1.2:.3f}",
    ]
    (names,) = axes.figure.legends
    assert [text.get_text() for text in names.get_texts()] == ["two loops", "one loop"]
    raw = axes.get_lines()[0]
    assert list(raw.get_xdata()) == [step * 4096 for step in range(1, 101)]
    assert raw.get_ydata()[-1] == pytest.approx(end)
    assert len({line.get_color() for line in axes.get_lines() if len(line.get_xdata())}) == 2
    low, high = axes.get_ylim()
    assert low < 3 and 4 < high < 8  # the first steps' 8.3 is cut, what differs later is not


def test_the_picture_is_one(runs, tmp_path):
    out = tmp_path / "new folder" / "loss.png"
    plots.plot_metrics(runs, out, fields=["loss"])
    picture = imread(out)
    assert picture.shape[0] > 500 and picture.shape[1] > 900
    assert picture[..., :3].std() > 0.05


def test_twelve_runs_of_long_names_have_their_colors_and_leave_the_curves_room(tmp_path, monkeypatch):
    many = [tmp_path / f"model.num_layers={layers},{'x' * 100}" for layers in range(12)]
    for folder in many:
        write_losses(folder, [3.0, 2.0, 1.0])
    (axes,) = panels_drawn(monkeypatch, tmp_path, many, None, ["loss"]).values()
    axes.figure.draw_without_rendering()
    (names,) = axes.figure.legends
    assert len({line.get_color() for line in names.get_lines()}) == 12
    assert names.get_window_extent().width <= axes.figure.bbox.width
    assert names.get_window_extent().y0 > axes.bbox.y1 > axes.bbox.y0 + 3 * axes.figure.dpi


def test_smoothing_keeps_length_ends_and_level_and_skips_what_is_not_finite():
    values = [float(value) for value in range(200)]
    assert smooth(values) == pytest.approx(values)  # a centered mean leaves a line alone
    assert smooth([2.0, math.nan, 4.0])[1] == 3.0
    assert math.isnan(smooth([math.nan])[0])
    assert smooth([]) == []


@pytest.mark.parametrize("losses", [[5.0, math.nan, math.inf], [math.nan] * 3, [2.0, 2.0, 2.0], [2.0]])
def test_losses_that_are_not_finite_or_all_equal_still_give_a_picture(tmp_path, losses):
    """Norms too, whose scale is logarithmic; and the run's name is no formula."""
    write_losses(tmp_path / "a$^$b", losses)
    plots.plot_metrics([tmp_path / "a$^$b"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_bad_requests_are_refused(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "study/round/run").mkdir(parents=True)
    (tmp_path / "study/round/run/config.yaml").touch()
    for asked, name, said in (
        ([tmp_path / "absent"], "loss.png", r"metrics\.jsonl not found: .*absent has no run that has started"),
        ([tmp_path / "study"], "loss.png", "study has folders of runs, as .*study/round/run"),
        ([tmp_path / "study/round/run/config.yaml"], "loss.png", "file: name its run's folder, as .*/run$"),
        ([tmp_path / "empty"], "loss.png", "no training step yet"),
        (runs, "loss.sculpture", "cannot write the plot"),
        (runs, "file/loss.png", "cannot write the plot"),
    ):
        with pytest.raises(UserError, match=said):
            plots.plot_metrics(asked, tmp_path / name)


# ---------------------------------------------------------------- the page of all curves


def write_run(folder: Path, loops: int, steps: int = 30) -> Path:
    folder.mkdir()
    records = []
    for step in range(1, steps + 1):
        at = {"step": step, "tokens": 2048 * step}
        record = {"kind": "train", **at, "loss": 8 / step**0.2, "grad_norm": 1 / step}
        record |= {"lr": 1e-3, "tokens_per_second": 1e4, "mfu": 0.4, "peak_memory_bytes": 3e9}
        record |= {"hidden_norm": [1.0] * loops, "step_size": [1.0] * loops, "gate_mean": [None, *[0.5] * (loops - 1)]}
        record |= {
            "step_seconds": {"data": 0.01, "forward_backward": 0.2},
            "source_epochs": {"loop_code": 0.1, "loop 3": 0.2},
        }
        records.append(record)
        if step % 10 == 0:
            records.append({"kind": "validation", **at, "loop_count": loops, "loss": 5.0})
    write_records(folder / "metrics.jsonl", records)
    return folder


def test_the_command_draws_runs_of_different_loop_counts(tmp_path):
    runs = [write_run(tmp_path / name, loops) for name, loops in (("one", 1), ("three", 3))]
    command = [sys.executable, str(ROOT / "tools/plot.py"), *map(str, runs)]
    said = run(command).stdout
    picture = tmp_path / "one" / "metrics.png"
    assert said.strip() == str(picture) and picture.read_bytes().startswith(b"\x89PNG")


def panels_drawn(monkeypatch, tmp_path, runs, *options) -> dict[str, object]:
    """Title -> axes of the page."""
    drawn = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    plots.plot_metrics(runs, tmp_path / "page.png", *options)
    return {axes.get_title(): axes for axes in drawn[0].axes}


def test_there_is_a_curve_for_each_loop_and_part(monkeypatch, tmp_path):
    panels = panels_drawn(monkeypatch, tmp_path, [write_run(tmp_path / "run", 2)])
    assert len(panels) == 11

    def names(title: str) -> list[str]:
        return [text.get_text() for text in panels[title].get_legend().get_texts()]

    assert names("hidden states after a loop") == ["loop 1", "loop 2"]
    assert {panels[title].get_ylabel() for title in ("hidden states after a loop", "change by a loop")} == {
        "L2 norm, mean over tokens"
    }, "as model/loop_context.py computes them"
    assert names("gates") == ["loop 2"], "the first loop has no gate"
    assert names("passes over the sources") == ["loop_code", "loop 3"]
    styles = (
        [ax.get_linestyle() for ax in panels[t].lines[:2]] for t in ("passes over the sources", "change by a loop")
    )
    assert next(styles) == next(styles), "of the first two, whatever the sources' names"
    assert names("where a step's time goes") == ["data", "forward backward"]
    assert names("loss") == ["validation, 2 loops: 5.000"]


def test_what_no_run_recorded_has_no_panel(monkeypatch, tmp_path):
    panels = panels_drawn(monkeypatch, tmp_path, [write_run(tmp_path / "run", 1, steps=1)])
    assert "gates" not in panels and "loss" in panels


def test_parts_have_styles_of_their_own_and_nothing_lies_on_the_frame_or_under_the_legend(monkeypatch, tmp_path):
    run = write_run(tmp_path / "run", 2)
    parts = ("data", "forward_backward", "gradient_reduction", "optimizer", "validation", "checkpoint")
    seconds = {part: 0.01 * number for number, part in enumerate(parts, start=1)}
    edit_records(run / "metrics.jsonl", lambda record: record | {"step_seconds": seconds})
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


@pytest.mark.parametrize(("count", "letters"), [(1, 9), (4, 9), (4, 60), (5, 60), (13, 9), (23, 9), (24, 9), (40, 9)])
def test_a_legend_of_any_length_leaves_the_curves_their_room(count, letters):
    figure, (axes,) = new_figure(8, 5)
    for place in range(count):
        axes.plot([0, 1], [3, 2.5], label=f"{place:0{letters}}")
    axes.set_ylim(2.4, 3.1)
    add_legend(axes)
    figure.savefig(io.BytesIO())  # lays it out
    bottom, top = axes.get_ylim()
    assert bottom == 2.4 and 3.1 <= top < 4 and axes.get_position().width > 0.5
    assert axes.get_legend().get_frame().get_facecolor()[:3] == (1, 1, 1), "curves that go on behind it are not read"


@pytest.mark.parametrize("gates", [[-0.6, -0.4], [-0.2, 0.7]])
def test_gates_below_zero_are_seen(gates, monkeypatch, tmp_path):
    """Those of tanh."""
    run = write_run(tmp_path / "run", 3)
    edit_records(run / "metrics.jsonl", lambda record: record | {"gate_mean": [None, *gates]})
    low, high = panels_drawn(monkeypatch, tmp_path, [run])["gates"].get_ylim()
    assert low < min(gates) and max(gates) < high
