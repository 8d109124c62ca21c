"""plt diagnose: a checkpoint and its export give the same numbers; what is written; what is refused."""

from __future__ import annotations

import csv
import html
import json
import math
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from headless_chromium import A4_LANDSCAPE, PIXELS_PER_MM, Browser, needs_chromium

from plt_megatron.data.indexed import mask_path
from plt_megatron.data.preprocess import PreprocessOptions, preprocess
from plt_megatron.data.tokenizer import load_tokenizer
from plt_megatron.data.tokenizer_training import TrainingOptions, train_tokenizer
from plt_megatron.errors import UserError
from plt_megatron.experiments.diagnostics import report
from plt_megatron.experiments.diagnostics.inputs import draw_sequences
from plt_megatron.experiments.diagnostics.report import DiagnoseOptions, run_diagnosis
from tests.running import ROOT, run
from tests.unit.convert.convert_helpers import make_model, megatron_logits, quiet, random_weights, save_run
from tests.unit.data.data_helpers import write_source

IDS = 380

pytestmark = pytest.mark.usefixtures("one_thread")


class Place:
    """A run of three loops with random weights, its export, and text, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run, self.export = folder, folder / "run", folder / "exported"
        self.text, self.prefix = folder / "heldout.jsonl", folder / "heldout"
        words = ["loop ", "window ", "def f(x):\n", "    return x\n", "token ", "12,5 ", "\u00e9t\u00e9 ", "the "]
        rng = random.Random(3)
        documents = ["".join(rng.choices(words, k=rng.randrange(4, 60))) for _ in range(120)]
        self.text.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        trained = train_tokenizer(TrainingOptions([str(self.text)], str(folder / "tokenizer"), IDS, threads=1))
        self.tokenizer = trained.model
        self.model = make_model(loop_count=3)
        self.weights = random_weights(self.model, IDS)
        save_run(self.run, self.model, self.weights, tokenizer=self.tokenizer)
        quiet((self.run, self.export))

    def diagnose_other(self, folder: Path, **settings):
        """Diagnose another model, of random weights too, on two sequences."""
        model = make_model(**settings)
        save_run(folder, model, random_weights(model, IDS), tokenizer=self.tokenizer)
        return self.diagnose(folder, max_tokens=2 * 64)

    def draw(self, data: Path | None = None, **options):
        """The sequences of a diagnosis with these options."""
        options = {"length": 64, "max_tokens": 6 * 64, "seed": 0, **options}
        return draw_sequences(str(data or self.text), load_tokenizer(self.tokenizer), IDS, **options)

    def diagnose(self, model: Path, data: Path | None = None, **options):
        options = {"max_tokens": 6 * 64, **options}
        return run_diagnosis(DiagnoseOptions(model=model, data=str(data or self.text), **options))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    torch.set_num_threads(1)
    return Place(tmp_path_factory.mktemp("diagnose"))


@pytest.fixture(scope="module")
def done(place):
    """The checkpoint's diagnosis."""
    return place.diagnose(place.run)


def read(folder: Path) -> dict:
    return json.loads((folder / "diagnostics.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------- numbers


@pytest.mark.slow  # README's commands diagnose an export too
def test_an_export_gives_the_same_numbers(place, done):
    other = place.diagnose(place.export)
    ours, theirs = read(done.folder), read(other.folder)
    assert ours["measures"].keys() == theirs["measures"].keys() and len(ours["measures"]) == 22
    for part in ("measures", "details", "changes"):
        for name, numbers in ours[part].items():
            for key in ("value", "low", "high"):
                one, another = (np.array(each, dtype=float) for each in (numbers[key], theirs[part][name][key]))
                np.testing.assert_allclose(one, another, rtol=1e-6, atol=1e-9, err_msg=f"{part} {name} {key}")
    assert ours["decision"] == theirs["decision"] and ours["data"] == theirs["data"]


def test_losses_are_the_training_models(place, done):
    """Cross-entropy of the megatron model's logits on the same tokens, run with 1, 2 and 3 loops."""
    tokens = torch.from_numpy(place.draw().tokens)
    for loops in (1, 2, 3):
        logits = megatron_logits(place.model, place.weights, tokens[:, :-1], IDS, loop_count=loops)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        assert done.diagnosis.loops["lens_loss"].mean[loops] == pytest.approx(float(loss), rel=1e-5)


def test_a_run_that_masks_the_loss_after_documents_is_measured_so(place, done, monkeypatch):
    monkeypatch.setattr(report, "make_figures", lambda diagnosis: [])  # most of the time
    save_run(place.folder / "masked", place.model, place.weights, tokenizer=place.tokenizer, eod_mask_loss=True)
    masked = place.diagnose(place.folder / "masked")
    tokens = torch.from_numpy(place.draw().tokens)
    logits = megatron_logits(place.model, place.weights, tokens[:, :-1], IDS)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    counted = tokens[:, :-1] != load_tokenizer(place.tokenizer).eod
    assert not counted.all()
    rows = [float(row[kept].mean()) for row, kept in zip(losses, counted, strict=True)]
    assert masked.diagnosis.loops["lens_loss"].mean[3] == pytest.approx(np.mean(rows), rel=1e-5)
    assert read(masked.folder)["data"]["eod_mask_loss"] and not read(done.folder)["data"]["eod_mask_loss"]


@pytest.mark.slow
def test_packed_documents_change_what_is_measured(place, done):
    apart = place.diagnose(place.run, reset=True, output=place.folder / "apart")
    assert read(apart.folder)["data"]["reset_at_document_boundaries"] is True
    assert apart.diagnosis.loops["lens_loss"].mean[2] != done.diagnosis.loops["lens_loss"].mean[2]


def test_tokenized_data_holds_the_same_sequences(place):
    """All of a text file's sequences, from the text and from its .bin and .idx."""
    preprocess(PreprocessOptions([str(place.text)], str(place.folder / "heldout"), str(place.tokenizer)))
    text, indexed = (place.draw(data, length=32, max_tokens=10**6) for data in (place.text, place.prefix))
    assert len(text.tokens) == text.seen == indexed.seen == len(indexed.tokens) > 50
    np.testing.assert_array_equal(text.tokens, indexed.tokens)
    np.testing.assert_array_equal(text.starts, indexed.starts)
    ends = text.tokens[:, :-1] == load_tokenizer(place.tokenizer).eod
    np.testing.assert_array_equal(text.starts[:, 1:], ends)
    np.testing.assert_array_equal(text.tokens[1:, 0], text.tokens[:-1, -1], "the last token is the next one's first")


def test_a_loss_mask_is_drawn_with_its_tokens(tmp_path):
    tokens = np.arange(250) % IDS
    prefix = write_source(tmp_path / "chat", tokens, [100, 150])
    drawn = draw_sequences(prefix, None, IDS, length=16, max_tokens=5 * 16, seed=0)
    assert drawn.mask is None and len(drawn.tokens) == 5
    (tokens % 3 == 0).astype(np.uint8).tofile(mask_path(prefix))
    drawn = draw_sequences(prefix, None, IDS, length=16, max_tokens=5 * 16, seed=0)
    np.testing.assert_array_equal(drawn.mask, drawn.tokens % 3 == 0)


def test_sequences_are_drawn_by_seed(place):
    one, again, other = (place.draw(length=32, max_tokens=32 * 8, seed=seed) for seed in (1, 1, 2))
    assert one.tokens.shape == (8, 33) and one.seen > 50
    np.testing.assert_array_equal(one.tokens, again.tokens)
    assert (one.tokens != other.tokens).any()


# ---------------------------------------------------------------- files


def test_what_is_written(place, done):
    assert done.folder.parent == place.run / "diagnostics"
    names = {path.name for path in done.folder.iterdir()}
    figures = {"states.png", "lens.png", "gates.png", "attention.png", "heads.png"}
    assert names == {"diagnostics.json", "diagnostics.csv", "index.html"} | figures
    assert all((done.folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    found = read(done.folder)
    assert found["model"]["loop_count"] == 3 and found["model"]["window_size"] == 5
    assert found["data"]["sequences"] == 6 and found["data"]["tokens"] == 384
    assert found["interval"] == {
        "level": 0.95,
        "method": "expanded percentile bootstrap of the mean over sequences; Student's t of fewer than 8 values",
        "resamples": 2000,
        "sequences": 6,
    }


def test_csv_and_json_hold_the_same_numbers(done):
    found = read(done.folder)
    with (done.folder / "diagnostics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["measure"] for row in rows}) == 26 and len(rows) > 150
    for row in rows:
        name = row["measure"]
        if row["layer"]:
            numbers = found["details"][name]
        elif name.endswith("_change"):
            numbers = found["changes"][name.removesuffix("_change")]
        else:
            numbers = found["measures"][name]
        place = [int(row[key]) for key in ("loop", "layer", "head") if row[key]]
        for key in ("value", "low", "high"):
            number = numbers[key]
            for index in place:
                number = number[index]
            assert float(row[key]) == number


def test_the_page_has_the_jsons_numbers_and_fetches_nothing(place, done):
    page, found = (done.folder / "index.html").read_text(encoding="utf-8"), read(done.folder)
    step = int(done.folder.name.removeprefix("step_"))
    assert f"<title>Diagnostics of {place.run.name}, step {step}</title>" in page
    text = html.unescape(page)
    assert found["decision"]["answer"] in text
    losses = page[page.index('<table id="losses">') : page.index("</table>")]
    for loop in (1, 2, 3):
        assert f"{found['measures']['lens_loss']['value'][loop]:.4f}" in losses
    for name, measure in found["measures"].items():
        assert measure["title"] in text and measure["meaning"] in text, name
    assert page.count("<svg") == 5 and "<script" not in page
    fetched = re.findall(r'(?:src|href|url\()\s*=?\s*"?([^"\s>)]+)', page)
    assert all(target.startswith(("data:", "#")) for target in fetched), fetched


@needs_chromium
def test_a_browser_shows_the_page_offline_and_prints_it_whole(done, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        browser.open(done.folder / "index.html")
        shown = browser.evaluate("document.querySelector('#losses tbody').innerText")
        heights = browser.heights("svg")
        overhang = browser.lay_out_for_print(round(A4_LANDSCAPE[0] * PIXELS_PER_MM), 700)
        assert browser.complaints() == []
    losses = read(done.folder)["measures"]["lens_loss"]["value"]
    assert all(f"{losses[loop]:.4f} [" in shown for loop in (1, 2, 3))
    assert len(heights) == 5 and min(heights) > 100 and overhang == 0


def test_the_terminal_shows_the_table_and_the_rule(done):
    lines = done.text.splitlines()
    assert lines[0].endswith(f"6 of {read(done.folder)['data']['available_sequences']} sequences of 64 tokens of "
                             f"{read(done.folder)['data']['path']}.")  # fmt: skip
    (ranks,) = (line for line in lines if line.startswith("effective rank"))
    assert len(re.findall(r"\d+\.\d\d \[\d+\.\d\d, \d+\.\d\d\]", ranks)) == 4
    assert done.decision.answer in lines


# ---------------------------------------------------------------- other models


def test_a_model_of_one_loop_says_what_is_missing(tmp_path, place):
    result = place.diagnose_other(tmp_path / "one", loop_count=1)
    assert result.decision.verdict == "one_loop" and "needs at least two" in result.text
    assert not (result.folder / "gates.png").exists() and (result.folder / "index.html").exists()
    assert "update_cosine" not in read(result.folder)["measures"]


def test_loops_that_change_nothing_yet_have_no_direction(tmp_path, place):
    """As with gates and a scale of new loops that start at zero."""
    model = make_model(loop_count=2, hidden_scale=0.0)
    weights = random_weights(model, IDS)
    for name, weight in weights.items():
        if "linear_proj" in name or "linear_fc2" in name:
            weight.zero_()
    save_run(tmp_path / "idle", model, weights, tokenizer=place.tokenizer)
    result = place.diagnose(tmp_path / "idle", max_tokens=2 * 64)
    assert not any(value is not None for value in read(result.folder)["measures"]["update_cosine"]["value"])
    assert (result.folder / "states.png").exists()


def test_full_attention_in_the_last_loop_is_said(tmp_path, place):
    """The losses after earlier loops are not those of fewer loops."""
    form = {"loop_count": 3, "share_kv": False, "gated_window": False, "full_attention": "last_loop"}
    result = place.diagnose_other(tmp_path / "last", **form)
    found, page = read(result.folder), (result.folder / "index.html").read_text(encoding="utf-8")
    assert found["model"]["full_attention"] == "last_loop"
    values = {name: [value is not None for value in measure["value"]] for name, measure in found["measures"].items()}
    assert values["entropy_global"] == [False, False, False, True]
    assert values["entropy_local"] == [False, True, True, False] and "gate_mean" not in values
    assert not (result.folder / "gates.png").exists() and (result.folder / "attention.png").exists()
    assert "Loss of these weights after each loop" in page and "equals running with r loops" not in page
    assert any("attend to a window only" in caution for caution in result.decision.cautions)


@pytest.mark.slow
def test_a_single_sequence_has_no_intervals(tmp_path, place):
    result = place.diagnose(place.run, max_tokens=64, output=tmp_path / "single")
    assert result.decision.verdict == "undecided"
    numbers = read(result.folder)["measures"]["step_size"]
    assert numbers["value"][1] > 0 and numbers["low"] == [None] * 4
    assert math.isfinite(result.diagnosis.loops["lens_loss"].mean[3])


# ---------------------------------------------------------------- what is refused


def test_errors(tmp_path, place):
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "bad.jsonl"
    empty.write_text("")
    binary.write_bytes(b'\xff\xfe\n{"text": 3}\n')
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    # What is given, and what is said.
    cases = [
        ({"model": tmp_path / "none"}, "no such run or checkpoint"),
        ({"model": tmp_path}, "no complete checkpoint there"),
        ({"data": tmp_path / "none.jsonl"}, "none.jsonl"),
        ({"data": empty}, "holds no text"),
        ({"data": binary}, "bad.jsonl, line 1"),
        ({"data": short}, "too few for one sequence of 64"),
        ({"max_tokens": 63}, "--max-tokens 63 is less than one sequence of 64"),
        ({"sequence_length": 65}, "--sequence-length 65 must be from 2 to the model's 64"),
        ({"output": short / "out"}, "cannot write to"),
        ({"tokenizer": tmp_path / "none.model"}, "none.model"),
    ]
    if not torch.cuda.is_available():
        cases.append(({"device": "cuda"}, "--device cuda: torch finds no GPU here"))
    for changes, message in cases:
        arguments = {"model": place.run, "output": tmp_path / "out", **changes}
        with pytest.raises(UserError) as error:
            place.diagnose(arguments.pop("model"), arguments.pop("data", None), **arguments)
        assert message in str(error.value) and "\n" not in str(error.value), changes


def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path, place):
    other = train_tokenizer(TrainingOptions([str(place.text)], str(tmp_path / "other"), IDS + 30, threads=1)).model
    with pytest.raises(UserError, match=f"has {IDS + 30} ids, the model's vocabulary {IDS}"):
        place.diagnose(place.run, tokenizer=other, output=tmp_path / "out")
    with pytest.raises(UserError, match="token .* the model's vocabulary has 50 "):
        draw_sequences(str(place.text), load_tokenizer(place.tokenizer), 50, length=64, max_tokens=64 * 9, seed=0)


def test_layers_that_run_once_are_refused(tmp_path, place):
    with pytest.raises(UserError, match=r"run: model.loop_span \[0, 1\]: diagnostics need a model whose"):
        place.diagnose_other(tmp_path / "run", loop_span=[0, 1])
    with pytest.raises(UserError, match="other: model.loop_order layer: diagnostics need a model whose layers all"):
        place.diagnose_other(tmp_path / "other", cross_loop_parallel=False, loop_order="layer")


def test_the_command(tmp_path, place, warm_python):
    """As a user starts it: what it prints, where it writes, and its exit statuses."""

    def command(*arguments):
        return run([warm_python, ROOT / "tools/diagnose.py", *map(str, arguments)], tmp_path, status=None)

    fine = command(place.run, "--data", place.text, "--output", "out", "--max-tokens", 128, "--seed", 5)
    assert fine.returncode == 0 and fine.stderr == ""
    assert fine.stdout.splitlines()[-1] == "out/index.html" and (tmp_path / "out/index.html").exists()
    assert "Rule: add a loop while the effective rank still rises; stop when it falls." in fine.stdout
    bad = command(tmp_path / "none", "--data", place.text)
    assert bad.returncode == 2 and bad.stdout == ""
    assert bad.stderr == f"error: {tmp_path}/none: no such run or checkpoint\n"
