"""The decode benchmark runs, and its bars say what they should."""

import importlib.util
import json
import sys

import pytest

from tests.running import ROOT, run

SCRIPT = ROOT / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("benchmark_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_decode"] = module
    spec.loader.exec_module(module)
    return module


def timings(bench, **ms):
    """Timings with constant slices, by row; `plt2=30.0` and so on, `shift` for PLT-2's shifted keys over it."""
    names = {"vanilla": "vanilla", "naive": "naive loop", "plt2": "PLT-2", "shifted": "PLT-2, shifted keys"}
    ms |= {"shifted": ms["plt2"] * ms.pop("shift")}
    shares = {"linear": 0.7, "attention": 0.2, "other": 0.1}
    found = {names[key]: bench.Timing(slices=[value] * 3, parts=shares) for key, value in ms.items()}
    return found | {"vanilla, shifted keys": found["vanilla"]}


@pytest.mark.parametrize(
    ("batch", "plt2", "naive", "shift", "missed"),
    [
        (4, 12.0, 20.0, 1.0, []),
        (4, 12.6, 20.0, 1.0, ["PLT-2 takes 1.26x vanilla, more than 1.25"]),
        (4, 12.4, 18.0, 1.0, ["PLT-2 takes 0.69x the naive loop, more than 0.65"]),
        (4, 10.0, 30.0, 1.0, ["the naive loop takes 3.00x vanilla"]),
        (1, 19.0, 20.0, 1.0, []),
        (1, 21.0, 20.0, 1.0, ["PLT-2 takes 1.05x the naive loop, more than 1"]),
        (16, 19.0, 20.0, 1.02, []),
        (16, 19.0, 20.0, 1.03, ["shifted keys take 1.030x PLT-2, more than 1.02"]),
    ],
)
def test_time_bars(bench, batch, plt2, naive, shift, missed):
    lines = bench.missed_time_bars(batch, timings(bench, vanilla=10.0, naive=naive, plt2=plt2, shift=shift))
    assert len(lines) == len(missed)
    for line, what in zip(lines, missed, strict=True):
        assert line.startswith(f"batch {batch}: {what}")
        assert "linear 7.0 ->" in line, "a missed bar says where the time goes"


def test_memory_bar_holds_for_the_benchmarks_model(bench):
    sizes = {
        name: {
            label: bench.kv_bytes(bench.PLTConfig(**{**bench.MODEL, **row}), n, 2) for label, n in bench.LENGTHS.items()
        }
        for name, row in bench.ROWS.items()
    }
    assert bench.missed_kv_bars(sizes) == []
    sizes["PLT-2"] = {label: 2 * size for label, size in sizes["vanilla"].items()}
    assert len(bench.missed_kv_bars(sizes)) == len(bench.LENGTHS)
    assert bench.missed_kv_bars(sizes)[0].startswith("KV cache of PLT-2 at 1,280 tokens is 2.000x vanilla")


@pytest.mark.slow
def test_small_run(tmp_path):
    command = [sys.executable, SCRIPT, "--small", "--threads", "1", "--output", tmp_path / "out.json"]
    assert "every bar that applies is met" in run(command, tmp_path).stdout
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]["1"]
    others = {"vanilla": ["shifted keys"], "PLT-2": ["shifted keys", "last loop"]}  # beside their rows
    of_the_paper = ["vanilla", "naive loop", "+ CLP", "+ KV sharing", "PLT-2", "PLT-3"]
    assert list(rows) == [
        name for row in of_the_paper for name in (row, *(f"{row}, {other}" for other in others.get(row, [])))
    ]
    assert all(len(row["slices"]) == 2 and row["ms"] > 0 for row in rows.values())


def test_bad_sizes_are_refused(bench, capsys):
    for arguments in (["--decode", "20", "--slice", "16"], ["--batch", "0"], ["--device", "cpu", "--graph"]):
        with pytest.raises(SystemExit) as error:
            bench.parse_arguments(arguments)
        assert error.value.code == 2
    assert "--graph needs a CUDA device" in capsys.readouterr().err
