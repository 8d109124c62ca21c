"""The image's two definitions: files that are there, one base that is new enough, and what installs into it."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.running import ROOT

FOLDER = ROOT / "launch/container"
CONTAINERFILE = (FOLDER / "Containerfile").read_text(encoding="utf-8")
DEFINITION = (FOLDER / "plt_megatron.def").read_text(encoding="utf-8")
OLDEST_BASE = (25, 11)  # the first with Transformer Engine 2.9


def instructions() -> list[tuple[str, list[str]]]:
    """(name, words) of the Containerfile's instructions."""
    lines = [line for line in CONTAINERFILE.splitlines() if line.strip() and not line.startswith("#")]
    assert not any(line.endswith("\\") for line in lines), "this reads whole lines"
    return [(name, words) for name, *words in map(str.split, lines)]


def sections() -> dict[str, list[str]]:
    """The lines of each section of Apptainer's definition; of its header, by the empty name."""
    found: dict[str, list[str]] = {"": []}
    for line in DEFINITION.splitlines():
        if line.startswith("%"):
            found[line[1:].strip()] = []
        elif line.strip() and not line.startswith("#"):
            found[list(found)[-1]].append(line.strip())
    return found


def copied() -> dict[str, str]:
    """Source -> target, as the Containerfile copies them."""
    pairs = {}
    for name, words in instructions():
        if name == "COPY":
            *sources, target = words
            for source in sources:
                is_folder = target.endswith("/")
                pairs[source] = f"{target}{Path(source).name}" if is_folder else target
    return pairs


def test_both_copy_the_same_files_that_are_in_the_repository():
    apptainers = dict(line.split() for line in sections()["files"])
    apptainers = {
        source: f"{target}{source}" if target.endswith("/") else target for source, target in apptainers.items()
    }
    assert copied() == apptainers
    assert all((ROOT / source).exists() for source in copied())


def test_the_context_is_what_is_copied():
    """Else an environment of gigabytes is sent along."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    taken = {line.removeprefix("!") for line in lines if line.startswith("!")}
    assert taken == {"launch/container" if source.startswith("launch") else source for source in copied()}


def test_what_the_project_is_built_of_is_copied():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    needed |= set(project["project"]["license-files"])
    assert needed <= set(copied())


def test_one_base_with_a_transformer_engine_that_is_new_enough():
    known = {"ARG", "FROM", "COPY", "RUN", "WORKDIR"}
    assert {name for name, _ in instructions()} == known and set(sections()) == {"", "files", "post", "test"}
    ((name, _, base),) = (words[0].partition("=") for kind, words in instructions() if kind == "ARG")
    header = dict(line.split(": ") for line in sections()[""])
    assert name == "BASE" and header == {"Bootstrap": "docker", "From": base}
    (tag,) = re.findall(r"/pytorch:(\d+)\.(\d+)-py3$", base)
    assert tuple(map(int, tag)) >= OLDEST_BASE


def test_both_install_with_the_script():
    (run,) = (" ".join(words) for kind, words in instructions() if kind == "RUN")
    assert sections()["post"] == [run]
    assert run.split()[1] == copied()["launch/container/install.sh"]


def test_the_clusters_profiles_use_the_image():
    profiles = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "configs/clusters").glob("*.yaml"))]
    containers = [profile["container"] for profile in profiles if "container" in profile]
    images = {container["runtime"]: Path(container["image"]).name for container in containers}
    assert images == {"pyxis": "plt_megatron.sqsh", "apptainer": "plt_megatron.sif"}
    documented = (ROOT / "docs/slurm.md").read_text(encoding="utf-8")
    for text in (CONTAINERFILE, DEFINITION):
        commands = re.findall(r"^#     (\S.*?)(?: {2,}#.*)?$", text, re.MULTILINE)
        assert commands and all(command in documented for command in commands)


PYTHON = """#!/bin/sh
# Stands for an image's Python: says which versions there are, and keeps what pip is asked for.
case "$1 $2" in
"- ") printf 'torch==2.10.0a0+b558c98\\ntransformer-engine==2.9.0\\n' ;;
"-m pip") printf '%s\\n' "$@" >"$KEPT/arguments"; cp "$9" "$KEPT/constraint"
  echo "${PIP_CONSTRAINT-}" >"$KEPT/others"; exit "${PIP_FAILS:-0}" ;;
"-c "*) exit "${IMPORT_FAILS:-0}" ;;
esac
"""


@pytest.mark.parametrize("failure", ["", "PIP_FAILS", "IMPORT_FAILS"])
def test_the_bases_torch_stays(tmp_path, failure):
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    variables = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "KEPT": str(tmp_path)}
    variables["PIP_CONSTRAINT"] = "/etc/pip/constraint.txt"  # of NGC's images: the versions of all packages
    variables |= {failure: "3"} if failure else {}
    done = subprocess.run(["bash", FOLDER / "install.sh"], cwd="/", env=variables, capture_output=True, check=False)
    assert done.returncode == (3 if failure else 0), done.stderr
    assert (tmp_path / "constraint").read_text() == "torch==2.10.0a0+b558c98\ntransformer-engine==2.9.0\n"
    assert (tmp_path / "others").read_text() == "\n"
    installed = (tmp_path / "arguments").read_text().splitlines()[-1]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted = set(installed.removeprefix(".[").removesuffix("]").split(","))
    assert wanted <= set(extras) and "gpu" not in wanted, "Transformer Engine is the base's"
