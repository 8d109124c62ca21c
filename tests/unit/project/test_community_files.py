"""Workflows, hooks, templates, the citation and release notes, in step with the project."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import plt_megatron
from tests.running import ROOT, run

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
NOTES = ROOT / "tools/release_notes.sh"


def commands_of(workflow: Path) -> list[str]:
    """The lines that its jobs run."""
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"].values()
    return [line for job in jobs for step in job["steps"] for line in step.get("run", "").splitlines()]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_what_exists(workflow):
    runs = commands_of(workflow)
    assert runs
    for command in runs:
        words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "1", command), comments=True)
        words = words[words[0] == "sudo" :]
        if words[0] == "make":
            settings = {word.partition("=")[0] for word in words[1:] if "=" in word}
            assert all(f"$({name}" in MAKEFILE for name in settings), command
            assert {word for word in words[1:] if "=" not in word} <= TARGETS, command
        for word in words:
            path = re.match(r"\.?[a-z]+/[\w/.]+$", word) and not word.startswith("build/")
            assert not path or (ROOT / word).is_file(), word


def test_actions_are_pinned_to_a_major_version():
    for workflow in WORKFLOWS:
        used = re.findall(r"uses: (\S+)", workflow.read_text(encoding="utf-8"))
        assert used and all(re.fullmatch(r"actions/[\w-]+@v\d+", action) for action in used)


def test_hooks_are_the_steps_of_lint():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    tools = {shlex.split(hook["entry"])[2] for hook in repository["hooks"]}
    recipe = MAKEFILE.split("\nlint:")[1].split("\n\n")[0]
    assert tools == set(re.findall(r"-m (\w+)", recipe))


def test_issue_forms_have_what_a_reader_needs():
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        parsed = yaml.safe_load(form.read_text(encoding="utf-8"))
        assert {"name", "description", "body"} <= parsed.keys()
        ids = [part["id"] for part in parsed["body"]]
        assert len(ids) == len(set(ids)) and any(part["validations"]["required"] for part in parsed["body"])


def test_the_version_is_said_alike():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == plt_megatron.__version__
    assert f"version = {{{plt_megatron.__version__}}}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_release_notes_are_the_changelogs_section():
    shown = run([NOTES, plt_megatron.__version__]).stdout
    sections = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n## ")
    (own,) = [text for text in sections if re.match(rf"{re.escape(plt_megatron.__version__)}\b", text)]
    assert shown.strip() == own.partition("\n")[2].strip() != ""


def test_a_tag_of_another_version_is_refused():
    done = run([NOTES, "99.0.0"], status=2)
    assert done.stdout == ""
    assert "99.0.0" in done.stderr and plt_megatron.__version__ in done.stderr and len(done.stderr.splitlines()) == 1
