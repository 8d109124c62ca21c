"""An environment for each extra: it has what pyproject.toml installs with it, and no more, and its commands run there.

Without the extra each command says so in one line, before it begins.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import sysconfig
import tomllib
import venv
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import zstandard
from packaging.requirements import Requirement

from plt_megatron import extras
from plt_megatron.extras import EXTRAS
from plt_megatron.runtime import doctor, machine
from tests import running
from tests.hf.lm_eval_tasks import write_tasks
from tests.running import ROOT
from tests.unit.data.data_helpers import write_jsonl
from tests.unit.slurm.fake_slurm import write_tokenizer, write_tokens

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OPTIONAL = PROJECT["optional-dependencies"]


def closure(requirements: list[str]) -> set[str]:
    """Packages that pip would install for them, as far as they are installed here; our own extras are looked up."""
    found: set[str] = set()
    waiting, seen = [(text, "") for text in requirements], set()
    while waiting:
        text, extra = waiting.pop()
        requirement = Requirement(text)
        if (text, extra) in seen or not (requirement.marker is None or requirement.marker.evaluate({"extra": extra})):
            continue
        seen.add((text, extra))
        if requirement.name == "plt-megatron":
            waiting += [(each, "") for name in requirement.extras for each in OPTIONAL[name]]
            continue
        try:
            own = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        found.add(requirement.name)
        waiting += [(each, name) for each in own for name in ("", *requirement.extras)]
    return found


@functools.cache
def top_level(name: str) -> list[Path]:
    """The files and folders that a distribution has in site-packages."""
    package = distribution(name)
    names = {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}
    return [Path(str(package.locate_file(each))) for each in sorted(names)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Callable[[str], Path]:
    """The Python of an environment with the base requirements and those of extras (`hf,report`): links to what is
    installed here."""
    made: dict[str, Path] = {}

    def make(extras: str) -> Path:
        if extras not in made:
            folder = tmp_path_factory.mktemp(extras or "base")
            requirements = [text for extra in extras.split(",") for text in OPTIONAL.get(extra, [])]
            venv.create(folder, symlinks=True)
            site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
            for package in closure(PROJECT["dependencies"] + requirements):
                for path in top_level(package):
                    if path.exists() and not (site_packages / path.name).exists():
                        (site_packages / path.name).symlink_to(path)
            made[extras] = folder / "bin/python"
        return made[extras]

    return make


def run(python: Path, folder: Path, command: str, status: int = 0) -> str:
    """`plt COMMAND`; what it prints."""
    env = {"PATH": os.environ["PATH"], "HOME": str(python.parent), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    words = [python, "-m", "plt_megatron", *shlex.split(command)]
    done = running.run(words, folder, status=status, timeout=900, env=env)
    return done.stdout + done.stderr


def test_every_module_of_the_table_comes_with_its_extra():
    assert set(EXTRAS.values()) == set(OPTIONAL) - {"dev", "docs"}
    for extra in set(EXTRAS.values()) - {"gpu", "track", "resilience"}:  # not installed here
        modules = {path.name for package in closure(OPTIONAL[extra]) for path in top_level(package)}
        assert {module for module, of in EXTRAS.items() if of == extra} <= modules
    for extra in EXTRAS.values():
        named = {Requirement(text).name.replace("-", "_") for text in OPTIONAL[extra]} - {"plt_megatron"}
        assert named <= set(EXTRAS), f"{extra}: not in the table"


def test_the_advice_names_the_python_that_an_extra_is_built_for(monkeypatch):
    monkeypatch.setattr(extras.util, "find_spec", lambda module: None)
    words = "plt-megatron[resilience]' (wheels for Python 3.12 only)"
    assert extras.lacking("nvidia_resiliency_ext").endswith(words)
    assert "3.12" not in extras.lacking("transformers")


def test_a_version_outside_an_extras_range_is_as_good_as_none(monkeypatch):
    found = {"transformers": "5.3.0", "scipy": "1.12.0a1+local"}
    monkeypatch.setattr(extras.metadata, "version", lambda name: found[name])
    asked = ['transformers<6,>=5.4; extra == "hf"', 'scipy>=1.12; extra == "report"']
    monkeypatch.setattr(extras.metadata, "requires", lambda name: asked)
    problem = extras.lacking("scipy", "transformers")
    assert "transformers<6,>=5.4, not 5.3.0" in problem and problem.endswith("pip install 'plt-megatron[hf]'")
    seen = machine.Machine(python=(3, 12, 0), executable="python", packages=found | {"safetensors": "1"})
    found["safetensors"] = "1"
    (models,) = (each for each in doctor.judge(seen).capabilities if each.name == "Hugging Face models")
    assert models.state == "no" and "not 5.3.0" in models.reason


def test_doctor_looks_for_all_that_its_advice_is_about():
    seen = machine.Machine(python=(3, 12, 0), executable="python")
    seen.packages = dict.fromkeys([*machine._project_requirements(), *machine._OPTIONAL], "1")
    capabilities = doctor.judge(seen).capabilities
    assert not [each for each in capabilities if "not installed" in each.reason]


# Commands that need an extra, as typed by somebody who has none: (command, extras that its one line names).
EXPORTING = "train configs/runs/plt2_tiny.yaml checkpoint.save_interval=5 checkpoint.exports.interval=5"
WITHOUT = [
    ("export --checkpoint runs/mine --output exported", "hf"),
    ("import --model model --output imported", "hf"),
    ("generate --model model --prompt hello", "hf"),
    ("evaluate --model model --tasks choice", "eval"),
    ("diagnose runs/mine --data text.jsonl", "report"),
    ("report sweep", "report"),
    ("study configs/studies/smoke.yaml --dry-run", "report"),
    ("demo", "muon"),
    ("sweep configs/sweeps/optimizers.yaml", "muon"),
    ("rehearse configs/runs/plt2_tiny.yaml optimizer.name=muon --gpus-per-node 2", "muon"),
    ("upload model --to s3://nowhere", "upload"),
    ("preprocess --input text.parquet --tokenizer .demo/tokenizer.model --output-prefix out", "data"),
    ("preprocess --input text.jsonl.zst --tokenizer .demo/tokenizer.model --output-prefix out", "data"),
    (EXPORTING, "hf"),
    (f"{EXPORTING} evaluation.tasks=[choice]", "eval"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the commands are typed: the tiny run's data, a folder that looks like a model, texts."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_tokens(folder / ".demo/data/train_text_document")
    write_tokens(folder / ".demo/data/validation_text_document")
    write_tokenizer(folder / ".demo/tokenizer.model")
    for name in ("model/config.json", "text.jsonl", "text.parquet", "text.jsonl.zst"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}\n")
    return folder


@pytest.mark.parametrize(("command", "extra"), WITHOUT, ids=[f"{c.split()[0]}-{e}" for c, e in WITHOUT])
def test_what_is_missing_is_one_line_before_anything_begins(environment, folder, command, extra):
    before = sorted(folder.rglob("*"))
    lines = run(environment(""), folder, command, status=2).splitlines()
    named = [re.search(r"pip install 'plt-megatron\[([\w,]+)\]'", line) for line in lines]
    assert all(line.startswith("error: ") for line in lines) and len(lines) <= 2
    assert extra in {name for match in named if match for name in match[1].split(",")}, lines
    assert sorted(folder.rglob("*")) == before


def test_data_is_inspected_without_the_packages_of_training(environment, folder):
    said = run(environment(""), folder, "inspect-data configs/runs/plt2_tiny.yaml optimizer.name=muon model.backend=te")
    assert "emerging_optimizers" not in said


def test_a_dry_run_says_what_is_missing(environment, folder):
    said = run(environment(""), folder, "sweep configs/sweeps/optimizers.yaml --dry-run")
    assert "note: " in said and "plt-megatron[muon]" in said and "not found" not in said


def test_a_study_is_refused_before_its_corpus_is_made(environment, folder):
    before = sorted(folder.rglob("*"))
    said = run(environment("report"), folder, "study configs/studies/smoke.yaml optimizer.name=muon", status=2)
    assert "plt-megatron[muon]" in said and sorted(folder.rglob("*")) == before


def test_reading_and_reporting_run_with_their_extra_alone(environment, tmp_path):
    with zstandard.open(tmp_path / "text.jsonl.zst", "wt") as file:
        file.writelines(json.dumps({"text": f"The loop {i} runs."}) + "\n" for i in range(3000))
    write_tokenizer(tmp_path / "tokenizer.model")
    reading = "preprocess --input text.jsonl.zst --tokenizer tokenizer.model --output-prefix t"
    run(environment("data"), tmp_path, reading)
    shutil.copytree(ROOT / "results/paper_ablation", tmp_path / "sweep")
    assert "PLT-2" in run(environment("report"), tmp_path, "report sweep")


@pytest.mark.slow
def test_from_a_text_to_scores_each_command_with_its_extra_alone(environment, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests/unit/convert")
    from tests.unit.convert.test_import_gguf import write_gguf

    write_gguf(tmp_path / "a.gguf")
    texts = [f"The loop {i} runs {i * i} times over every token of text {i % 7}." for i in range(3000)]
    write_jsonl(tmp_path / "text.jsonl", texts)
    (tmp_path / "tasks").mkdir()
    write_tasks(tmp_path / "tasks", [{"question": "The loop", "choices": [" runs", " text"], "answer": 0}] * 3, ".")
    data = "data.tokenizer=data/tokenizer.model 'data.sources=[{path: data/text}]'"
    train = f"train configs/runs/plt2_tiny.yaml name=tiny {data}"
    for extra, command in [
        ("", "train-tokenizer --input text.jsonl --output data --vocab-size 400"),
        ("", "preprocess --input text.jsonl --tokenizer data/tokenizer.model --output-prefix data/text --workers 1"),
        ("muon", f"{train} optimizer.name=muon checkpoint.save_interval=10"),
        ("", "average runs/tiny --last 2 --output averaged"),
        ("", "plot runs/tiny --output losses.png"),
        ("hf", "export --checkpoint runs/tiny --output exported --verify"),
        ("hf", "generate --model exported --prompt loop --max-new-tokens 4"),
        ("hf", "import --model exported --output imported"),
        ("gguf", "import --model a.gguf --output from_gguf"),
        ("eval", "evaluate --model exported --tasks choice,write --include-path tasks --limit 2"),
        ("upload", f"upload exported --to file://{tmp_path}/copy"),
        ("report,hf", "diagnose runs/tiny --data text.jsonl --max-tokens 256"),
    ]:
        run(environment(extra), tmp_path, command)
