"""The report's files: the page's and the Markdown's numbers are the CSVs', in the text and in a real browser."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from unittest.mock import Mock

import matplotlib.image
import pytest
from headless_chromium import A4_LANDSCAPE, PIXELS_PER_MM, Browser, needs_chromium
from sweep_helpers import LOOPS, finish, note_scores, saved_plan

from plt_megatron.experiments import sweep_report
from plt_megatron.experiments.records import load_results
from plt_megatron.experiments.sweep_report import FLOPS, TOKENS, Report, write_report
from plt_megatron.experiments.verdicts import fit_laws, make_rows

BUDGETS = "axes: {budget: {" + ", ".join(f"b{n}: {{training.train_iters: {n}}}" for n in (100, 250, 500)) + "}, "
TABLES = ("rows", "questions", "laws", "scores", "runs")
QUESTIONS = 'questions: {does the second loop help: [2 loops, 1 loop], "third <b>&amp; more": [3 loops, 2 loops]}\n'


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Report:
    """Of a sweep with a problem, decoding times, scores and three budgets, which suffice for a law of D."""
    folder = tmp_path_factory.mktemp("report")
    text = LOOPS.replace("axes: {", BUDGETS) + QUESTIONS + "title: Loops <&> budgets\n"
    plan = saved_plan(folder, text)
    rows = {}
    for run in plan.runs:
        if run.name != "b100-3_loops-seed2":
            loops = run.config.model.loop_count
            luck = 0.001 * (run.seed * run.tokens // 64 % 7 - 3)
            finish(run, 2 + 0.1 / loops + 40 / run.tokens**0.5 + luck)
            note_scores(run, {"reading/acc": 0.25 + loops / 10} | ({"sums/exact_match": 0.5} if loops == 2 else {}))
        rows[run.row()] = {"milliseconds": 2.0 + loops / 7, "relative": (2 + loops / 7) / 2.1, "cache_bytes": 100}
    (plan.folder / "decode.json").write_text(json.dumps({"conditions": "made up", "rows": rows}))
    return write_report(plan.folder)


class _Cells(HTMLParser):
    """Of each table by its id: rows of (text, data-value, data-interval)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[str, list[list[list[str | None]]]] = {}
        self._cell: list[str | None] | None = None
        self.outside: list[str] = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.outside += [values[key] for key in ("src", "href", "xlink:href", "data", "action") if values.get(key)]
        if tag in ("script", "iframe", "object", "embed", "base", "form"):
            self.outside.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(values["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag == "td":
            self._cell = ["", values.get("data-value"), values.get("data-interval")]
            self._table[-1].append(self._cell)

    def handle_data(self, data):
        if self._cell is not None:
            self._cell[0] += data

    def handle_endtag(self, tag):
        if tag == "td":
            self._cell = None


def read_csv(report: Report, name: str) -> tuple[list[str], list[list[str]]]:
    with (report.folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file))
    return header, rows


def cells_of(report: Report) -> _Cells:
    parser = _Cells()
    parser.feed((report.folder / "index.html").read_text(encoding="utf-8"))
    return parser


def shown_numbers(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?", text)]


@pytest.mark.parametrize("name", TABLES)
def test_the_pages_values_are_the_csvs(report, name):
    _, expected = read_csv(report, name)
    rows = [row for row in cells_of(report).tables[name] if row]
    found = [[value for cell in row for value in cell[1:] if value is not None] for row in rows]
    assert found == expected and len(expected) > 1


@pytest.mark.parametrize("name", TABLES)
def test_what_is_shown_is_the_value_rounded(report, name):
    for row in cells_of(report).tables[name]:
        for text, *values in row:
            try:
                numbers = [float(value) for value in values if value]
            except ValueError:
                continue  # words
            for shown, value in zip(shown_numbers(text), numbers, strict=True):
                assert shown == pytest.approx(value, rel=6e-3, abs=6e-5), (text, values)


@pytest.mark.parametrize("name", TABLES)
def test_markdown_shows_the_same_cells(report, name):
    text = (report.folder / "report.md").read_text(encoding="utf-8")
    rows = [[cell[0] for cell in row] for row in cells_of(report).tables[name] if row]
    assert rows
    for row in rows:
        assert "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" in text


def test_the_page_is_one_file_that_fetches_nothing(report):
    assert [link for link in cells_of(report).outside if not link.startswith("#")] == ["data:,"]
    page = (report.folder / "index.html").read_text(encoding="utf-8")
    assert "@import" not in page and not re.search(r"url\((?!#)", page)
    assert "third <b>" not in page and "Loops &lt;&amp;&gt; budgets" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_problems_answers_and_figures_are_in_every_form(report):
    page = (report.folder / "index.html").read_text(encoding="utf-8")
    markdown = (report.folder / "report.md").read_text(encoding="utf-8")
    for text in (page, markdown):
        assert "b100-3_loops-seed2" in text and "not started" in text
        assert all(f"t equal {what}" in text for what in ("tokens", "training FLOPs", "decoding latency"))
    pictures = sorted(path.name for path in report.folder.glob("*.png"))
    assert {"loss_tokens_1.png", "loss_flops_3.png", "loss_latency_2.png", "residuals.png"} <= set(pictures)
    assert all(f"]({name})" in markdown for name in pictures) and page.count("<svg") == len(pictures)
    for name in pictures:
        picture = matplotlib.image.imread(report.folder / name)
        assert picture.shape[1] == 1200 and picture[..., :3].std() > 0.02  # not blank


def test_the_scaling_law_of_each_loop_count_is_there(report):
    header, rows = read_csv(report, "laws")
    assert [row[0] for row in rows] == ["1 loop", "2 loops", "3 loops"]
    for loops, row in enumerate(rows, 1):
        found = dict(zip(header, row, strict=True))
        # Planted: 2 + 0.1/loops + 40 D^-0.5, and each run's luck.
        assert float(found["beta_low"]) <= 0.5 <= float(found["beta_high"])
        assert float(found["E_low"]) <= 2 + 0.1 / loops <= float(found["E_high"])
        assert found["alpha"] == "" and "part of E" in found["remark"]
        assert float(found["predicted_low"]) <= 2 + 0.1 / loops + 40 / (4 * 500 * 64) ** 0.5


def test_no_law_is_fitted_over_other_settings(tmp_path):
    """Three budgets suffice for one, but each has two rates."""
    plan = saved_plan(tmp_path, LOOPS.replace("axes: {", f"{BUDGETS}optimizer.lr: [1e-3, 2e-3], "))
    for run in plan.runs:
        finish(run, 2 + 40 / run.tokens**0.5 + run.config.optimizer.lr)
    laws = fit_laws(make_rows(load_results(plan.folder)))
    assert len(laws) == 3 and all(law.fit is None and "differ in other settings" in law.reason for law in laws)


@pytest.mark.slow
def test_writing_again_gives_the_same(report):
    before = {path.name: path.read_bytes() for path in report.folder.iterdir() if path.suffix != ".png"}
    write_report(report.folder.parent)
    assert {path.name: path.read_bytes() for path in report.folder.iterdir() if path.suffix != ".png"} == before


@needs_chromium
def test_a_browser_shows_the_csvs_numbers_offline_and_prints_whole_tables(report, tmp_path):
    read = (
        "[...document.querySelectorAll('table')].map(t => [t.id, [...t.tBodies[0].rows].map("
        "r => [...r.cells].map(c => [c.innerText, c.dataset.value, c.dataset.interval]))])"
    )
    with Browser(tmp_path / "profile") as browser:
        browser.open(report.folder / "index.html")
        tables = dict(browser.evaluate(read))
        figures = browser.heights("svg")
        screenshot = browser.screenshot()
        width, height = (round(side * PIXELS_PER_MM) for side in A4_LANDSCAPE)
        overhang = browser.lay_out_for_print(width, height)
        tallest = max(browser.heights("figure, tr, dd"))
        pdf = browser.pdf()
        assert browser.complaints() == []
        assert [url for url in browser.requests() if not url.startswith("data:")] == [
            (report.folder / "index.html").resolve().as_uri()
        ]
    for name in TABLES:
        _, expected = read_csv(report, name)
        assert [[v for cell in row for v in cell[1:] if v is not None] for row in tables[name]] == expected
        assert all(cell[0].strip() or not cell[1] for row in tables[name] for cell in row)
    assert len(figures) == len(list(report.folder.glob("*.png"))) and min(figures) > 150
    assert overhang == 0 and tallest < height
    assert pdf.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3
    Path(tmp_path / "page.png").write_bytes(screenshot)
    assert matplotlib.image.imread(tmp_path / "page.png")[..., :3].std() > 0.02


@pytest.mark.parametrize("has_equal_steps", [True, False])
def test_against_flops_a_row_whose_steps_differ_in_cost_has_its_end_alone(has_equal_steps):
    row = Mock(has_equal_steps=has_equal_steps, curve=[(10, 3.0), (20, 2.5), (30, 2.0)], losses={1: 2.0}, label="row")
    row.loss.value = 2.0
    points = {x: [*sweep_report._curves([row], lambda row: 2.0, x).curves[0].x] for x in (TOKENS, FLOPS)}
    assert points == {TOKENS: [20, 40, 60], FLOPS: [20, 40, 60] if has_equal_steps else [60]}
