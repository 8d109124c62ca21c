"""README and docs keep their promises: what they name exists, and tables say what the schema says."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from plt_megatron.config.loader import load_config
from plt_megatron.config.schema import ModelConfig
from plt_megatron.config.validation import validate
from tests.running import ROOT

DOCUMENTS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md", "results/README.md"]
DOCUMENTS += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    folder = (ROOT / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", text(name)):
        if not target.startswith("http"):
            assert (folder / target).exists(), target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    folders = "plt_megatron|configs|docs|launch|tools|tests|benchmarks"
    inside_package = "config|runtime|model|data|train|hf|experiments|predict"
    made_in_examples = set(re.findall(r"^\+\+\+ b/(\S+)", text(name), re.MULTILINE))
    for path in re.findall(rf"\b(?:{folders})/[\w./-]+\.\w+", text(name)):
        yours = Path(path).stem in ("NAME", "mine")
        assert yours or path in made_in_examples or (ROOT / path).exists(), path
    for path in re.findall(rf"`((?:{inside_package})/\w+\.py)`", text(name)):
        assert (ROOT / "plt_megatron" / path).exists(), path


@pytest.mark.parametrize("name", DOCUMENTS)
def test_make_targets_that_are_named_exist(name):
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text(name), re.DOTALL))
    named = set(re.findall(r"`make ([a-z-]+)", text(name)))
    for line in re.findall(r"^make +(.*?)(?:#.*)?$", blocks, re.MULTILINE):
        named |= {word for word in line.split() if re.fullmatch(r"[a-z][a-z-]+", word)}
    assert named <= targets, named - targets


def test_the_figure_is_well_formed_and_needs_nothing_from_elsewhere():
    tree = ElementTree.fromstring(text("docs/plt.svg"))
    assert tree.get("viewBox") and tree.get("aria-label")
    own = {element.get("id") for element in tree.iter()}
    for element in tree.iter():
        for name, value in element.attrib.items():
            assert "http" not in value, (name, value)
            if name == "href":
                assert value.removeprefix("#") in own


def ablation_rows() -> list[tuple[str, list[str]]]:
    table = text("docs/model.md").split("<!-- ablation rows: checked by a test -->")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (.+?) \| `(.+?)` \|$", table, re.MULTILINE)
    return [(row, overrides.split()) for row, overrides in rows if "=" in overrides]


def test_the_ablation_has_five_rows_that_are_five_models():
    assert len(ablation_rows()) == 5
    switches = []
    for _, overrides in ablation_rows():
        config = load_config(ROOT / "configs/runs/plt2_ablation.yaml", overrides)
        validate(config, check_files=False)
        model = config.model
        loop = (model.cross_loop_parallel, model.share_kv, model.gated_window)
        switches.append((model.loop_count, *(loop if model.loop_count > 1 else ())))
    assert switches == [
        (1,),
        (2, False, False, False),
        (2, True, False, False),
        (2, True, True, False),
        (2, True, True, True),
    ]


def test_documented_switches_and_defaults_are_those_of_the_schema():
    section = text("docs/model.md").split("## Switches")[1].split("`validation.loop_counts")[0]
    defaults = ModelConfig()
    seen = set()
    for names, default in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\w+) \|", section, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            assert getattr(defaults, name) == yaml.safe_load(default), name
            seen.add(name)
    assert len(seen) >= 11


# docs/launcher.md: each promise names tests that are there.


def test_the_tests_that_hold_a_promise_exist():
    named = set(re.findall(r"`(test_\w+)`", text("docs/launcher.md")))
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert {name for name in named if not re.search(rf"^def {name}\(", sources, re.MULTILINE)} == set()


def test_every_file_of_the_package_is_explained():
    page = text("docs/launcher.md")
    for path in (ROOT / "plt_megatron" / "launcher").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in page, path.name
