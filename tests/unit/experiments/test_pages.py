"""What holds for every HTML page: values are escaped, and a missing package is named before any work."""

from __future__ import annotations

import sys

import pytest

from plt_megatron.commands import main
from plt_megatron.experiments.intervals import Interval
from plt_megatron.experiments.pages import TEMPLATES, Column, Page, Part, Table, Verdict, render
from plt_megatron.experiments.study import report

HOSTILE = "<script>alert(1)</script> \" ' & {{ 1 + 1 }} </title>"


def test_values_are_text():
    table = Table([Column("key", HOSTILE, lambda item: item), Column("n", HOSTILE, lambda item: None, "g")], [HOSTILE])
    part = Part(HOSTILE, [HOSTILE], {"table": table})
    answers = [Verdict(HOSTILE, decided=False), Verdict(HOSTILE, decided=True, group=HOSTILE)]
    page = render("page.html", page=Page(HOSTILE, HOSTILE, answers, [part], [HOSTILE], HOSTILE, HOSTILE, [HOSTILE]))
    assert "<script" not in page and "{{ 1 + 1 }}" in page
    # The title twice, three texts of answers, two headings, two titles of columns, a cell and its value, and four more.
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt; &#34; &#39; &amp; {{ 1 + 1 }} &lt;/title&gt;") == 16


def test_ends_are_in_the_csv_and_beside_the_pages_value():
    table = Table([Column("loss", "loss", lambda item: item, ".1f", has_ends=True)], [Interval(2.0, 1.5, 2.5)])
    assert table.csv() == "loss,loss_low,loss_high\n2.0,1.5,2.5\n"
    page = render("page.html", page=Page("", "", [], [Part("", tables={"table": table})]))
    assert 'data-value="2.0" data-low="1.5" data-high="2.5">2.0 <span>[1.5, 2.5]' in page
    assert {c.key for c in (*report._STANDINGS, *report._SOURCES) if c.has_ends} == {"loss", "behind", "phi"}


def test_nothing_in_a_template_is_taken_as_markup_but_figures():
    for path in TEMPLATES.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not any(word in text for word in ("safe", "autoescape", "<script", "http:", "https:")), path.name


@pytest.mark.parametrize("package", ["jinja2", "scipy"])
def test_a_missing_package_is_named_before_any_work(package, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    for command, *arguments in (("report", "none"), ("study", "none.yaml"), ("diagnose", "none", "--data", "none")):
        assert main([command, *arguments]) == 2
        expected = f"error: plt {command} needs the package {package}: pip install 'plt-megatron["
        assert capsys.readouterr().err.startswith(expected)
