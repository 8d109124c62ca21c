"""Loss plots of hand-made runs: the figure is a real picture, its curves are the data, bad runs are refused."""

from __future__ import annotations

import json
import math

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
