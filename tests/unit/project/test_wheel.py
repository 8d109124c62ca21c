"""A wheel built from the tree, installed in an empty environment elsewhere: from a text to a sample of the model."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import plt_megatron
from plt_megatron.commands import COMMANDS
from tests import running
from tests.running import ROOT
from tests.unit.data.data_helpers import write_jsonl

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)], ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel, and besides it what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--disable-pip-version-check"]
    run([*pip, "install", "--quiet", "--no-compile", "--no-deps", "--no-index", str(wheel)], folder)
    site_packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # Its .pth files, and with them an editable install of the tree, are not read from there.
    (site_packages / "other_packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(command: list[str], folder: Path) -> str:
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "OMP_NUM_THREADS": "1"}
    return running.run(command, folder, env=env).stdout


def test_what_is_in_it(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = message_from_bytes(archive.read(next(name for name in names if name.endswith("/METADATA"))))
    info = f"plt_megatron-{plt_megatron.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"plt_megatron", info}
    package, configs = (
        {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        for folder in ("plt_megatron", "configs")
    )
    expected = {name for name in package if "__pycache__" not in name} | {f"plt_megatron/{name}" for name in configs}
    assert {name for name in names if not name.startswith(info)} == expected
    assert f"{info}/licenses/LICENSE" in names
    assert metadata["Version"] == plt_megatron.__version__ and metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Classifier") == PROJECT["classifiers"]


def test_every_command_answers(installed, tmp_path):
    plt = str(installed / "plt")
    assert list(PROJECT["scripts"]) == ["plt"] and run([plt, "--help"], tmp_path).startswith("usage: plt ")
    for name in COMMANDS:
        assert run([plt, name, "--help"], tmp_path).startswith(f"usage: plt {name} ")


def test_it_is_no_checkout_whatever_other_packages_leave_beside_it(installed, tmp_path):
    program = "from plt_megatron.installation import ROOT, is_checkout as f; print(ROOT); print(f(ROOT))"
    command = [str(installed / "python"), "-c", program]
    site_packages, _ = run(command, tmp_path).splitlines()
    beside = Path(site_packages, "pyproject.toml")  # Poetry's `include` puts it there
    beside.write_text("[tool.poetry]\nname = 'other'\n")
    assert run(command, tmp_path).splitlines() == [site_packages, "False"]
    beside.unlink()


@pytest.mark.slow
def test_from_a_text_to_a_sample_without_the_tree(installed, tmp_path):
    where = [str(installed / "python"), "-c", "import plt_megatron; print(plt_megatron.__file__)"]
    assert Path(run(where, tmp_path).strip()).is_relative_to(installed.parent)
    texts = [f"The loop {i} runs {i * i} times over every token of text {i % 7}." for i in range(3000)]
    write_jsonl(tmp_path / "text.jsonl", texts)

    def command(name: str, *arguments: str) -> str:
        return run([str(installed / "plt"), name, *arguments], tmp_path)

    command("train-tokenizer", "--input", "text.jsonl", "--output", "data", "--vocab-size", "400")
    tokenizer = ["--tokenizer", "data/tokenizer.model"]
    command("preprocess", "--input", "text.jsonl", *tokenizer, "--output-prefix", "data/text", "--workers", "1")
    data = ["data.tokenizer=data/tokenizer.model", "data.train_sources=[{path: data/text}]"]
    settings = [*data, "data.validation_sources=[{path: data/text}]", "training.train_iters=10"]
    command("train", "configs/runs/plt2_tiny.yaml", "name=tiny", *settings)
    records = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert records[-1]["step"] == 10 and losses[-1] < losses[0]
    command("export", "--checkpoint", "runs/tiny", "--output", "exported")
    assert (tmp_path / "exported/modeling_plt.py").is_file()
    sample = command("generate", "--model", "exported", "--prompt", "The loop", "--max-new-tokens", "8")
    assert sample.startswith("The loop")
