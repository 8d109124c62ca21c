"""`plt` before any of its commands: the map, what it does not know, and what it does not import."""

from __future__ import annotations

import re
import resource
import sys

import pytest

import plt_megatron
from plt_megatron.commands import COMMANDS, GROUPS, load, main
from tests.running import ROOT, run


def test_every_module_is_a_command_of_the_table():
    modules = {path.stem for path in (ROOT / "plt_megatron/commands").glob("*.py")} - {"__init__"}
    assert {load(name).__name__.rpartition(".")[2] for name in COMMANDS} == modules
    assert sum(map(len, GROUPS.values())) == len(COMMANDS) == len(modules)


def test_every_command_has_one_script_in_a_checkout():
    scripts = [path for folder in ("tools", "launch") for path in (ROOT / folder).glob("*.py")]
    assert sorted(path.stem.replace("_", "-") for path in scripts) == sorted(["plt", *COMMANDS])
    assert {path.resolve() for path in scripts} == {ROOT / "tools/plt.py"}


def test_the_map_has_a_line_for_each_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith("usage: plt COMMAND")
    assert re.findall(r"^([\w ]+):$", shown, re.MULTILINE)[:-1] == list(GROUPS)
    assert dict(re.findall(r"^  ([a-z-]+) +(\S.*)$", shown, re.MULTILINE)).items() >= COMMANDS.items()
    assert max(map(len, shown.splitlines())) <= 110


def test_no_command_is_an_error_with_the_map(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert not shown.out and shown.err.startswith("usage: plt COMMAND")


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("tarin", "train"), ("inspect_data", "inspect-data"), ("plot_metrics", "plot"), ("qqq", None), ("--hlep", None)],
)
def test_what_is_no_command_is_a_line_with_the_nearest(capsys, word, nearest):
    with pytest.raises(SystemExit) as ended:
        main([word, "--help"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and word in said
    assert (f"did you mean plt {nearest}?" in said) if nearest else ("did you mean" not in said)


@pytest.mark.parametrize("word", ["--help", "--version", "qqq"])
def test_it_answers_at_once_without_a_commands_modules(tmp_path, word):
    env = {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run([sys.executable, "-m", "plt_megatron", word], tmp_path, status=None, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of the processor: the machine may be busy
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.3
    imported = set(re.findall(r"\| +(\S+)$", done.stderr, re.MULTILINE))
    ours = {name for name in imported if name.startswith("plt_megatron")}
    assert ours == {"plt_megatron", "plt_megatron.commands", "plt_megatron.errors"}
    assert not imported & {"torch", "megatron", "numpy", "yaml", "rich", "multiprocessing", "importlib.metadata"}
    if word == "--version":
        assert done.stdout == f"plt-megatron {plt_megatron.__version__}\n"


# A command that ends before its work begins, the bounds of an option of it, and how its error names them.
BOUNDS = [
    ("generate --model nowhere --prompt a", "--seed", 0, 4294967295, "from 0 to 4,294,967,295"),
    ("generate --model nowhere --prompt a", "--max-new-tokens", 1, None, "at least 1"),
    ("evaluate --model nowhere --tasks ,", "--limit", 1, None, "at least 1"),
    ("train-tokenizer --input nowhere --output t --vocab-size 99", "--threads", 1, 1024, "from 1 to 1,024"),
    ("preprocess --input nowhere --output-prefix t --tokenizer t", "--workers", 1, None, "at least 1"),
    *(("inspect-data nowhere", option, 1, None, "at least 1") for option in ("--batch", "--samples")),
    ("inspect-data nowhere", "--width", 0, None, "at least 0"),
    ("inspect-data nowhere", "--span-tokens", 8, None, "at least 8"),
    ("sweep nowhere", "--jobs", 1, None, "at least 1"),
    ("report nowhere", "--decode-batch", 1, None, "at least 1"),
    ("submit nowhere", "--nodes", 1, None, "at least 1"),
    ("submit nowhere", "--chain", 1, 1000, "from 1 to 1,000"),
    ("submit nowhere", "--signal-margin", 1, 65_535, "from 1 to 65,535"),  # what sbatch takes
    ("submit --array nowhere", "--max-concurrent", 1, None, "at least 1"),
]


@pytest.mark.parametrize(("command", "option", "least", "most", "limit"), BOUNDS)
def test_a_number_out_of_bounds_is_a_line_with_the_option_and_its_limit(capsys, command, option, least, most, limit):
    def error_for(value: object) -> str:
        try:
            status = main([*command.split(), option, str(value)])
        except SystemExit as ended:
            status = ended.code
        said = capsys.readouterr().err
        assert status == 2 and said.startswith("error: ") and said.count("\n") == 1
        return said

    for value in [least - 1] + ([] if most is None else [most + 1]):
        assert f"{option}: must be {limit}, got {value:,}" in error_for(value)
    for value in {least, least + 1, least if most is None else most}:
        assert option not in error_for(value)
    assert f"{option}: invalid int value: 'many'" in error_for("many")
