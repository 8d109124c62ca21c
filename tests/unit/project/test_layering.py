"""Imports point one way, and commands answer before anything heavy is imported."""

from __future__ import annotations

import ast
import graphlib
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from tests.running import ROOT, run

PACKAGE = ROOT / "plt_megatron"

# What each part may import of ours, besides itself, `errors`, `extras` and `installation`.
ALLOWED = {
    "config": set(),
    "run_folder": {"config", "model.parameters"},
    "runtime": {"config", "run_folder"},
    "model.parameters": {"config"},  # one file of `model`, without torch
    "model.trainable": {"config", "model.parameters"},  # and another
    "slurm.client": set(),  # one file of `slurm`: jobs ask Slurm, too
    "predict": {"config", "run_folder", "model.parameters", "model.trainable"},  # without torch, too
    "launcher": {"config", "run_folder", "runtime", "slurm.client"},
    "storage": {"config", "run_folder"},
    "slurm": {"config", "run_folder", "runtime", "predict", "launcher", "storage", "data", "model.trainable"},
    "data": {"config", "run_folder", "runtime"},
    "model": {"config", "runtime"},
    "train": {"config", "run_folder", "runtime", "predict", "launcher", "storage", "data", "model"},
    "predict.rehearsal": {"config", "run_folder", "runtime", "predict", "model", "train"},
    "hf": {"config", "run_folder", "runtime", "predict", "data", "model", "train"},
    "demo.steps": {"config", "run_folder", "runtime", "data"},  # a sweep's data, too
    "experiments": {"config", "run_folder", "runtime", "predict", "data", "model", "train", "hf", "demo.steps"},
    # A sweep is submitted to Slurm; everything else reads run folders.
    "experiments.sweep": {"config", "run_folder", "runtime", "predict", "slurm", "experiments", "demo.steps"},
    "demo": {"config", "run_folder", "runtime", "predict", "data", "experiments", "demo.steps"},
    "commands": {
        *("config", "run_folder", "runtime", "predict", "predict.rehearsal"),
        *("slurm", "storage", "data", "hf", "experiments", "demo"),
    },
}
APART = {"predict.rehearsal"}  # those who may import `predict` may not import this, too
SCRIPTS = sorted([*ROOT.glob("tools/*.py"), *ROOT.glob("launch/*.py")])
# Importing one of these takes seconds.
HEAVY = ("torch", "megatron", "transformers", "matplotlib", "sentencepiece", "tensorboard")


def parts() -> list[str]:
    return sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py")))


def named_imports(path: Path, module: str, known: Collection[str] = ()) -> Iterator[str]:
    """List what a file imports, wherever in it: at its top, in a function, for type checkers alone.

    `known`: modules, which tell `from MODULE import NAME` from `from PACKAGE import MODULE`.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(filter(None, (package, node.module)))
            names = [f"{source}.{alias.name}" for alias in node.names]
            yield from (name if not known or name in known else source for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def imports_of_ours(path: Path) -> set[str]:
    """The parts of the package that a file imports."""
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return {part_of(name) for name in named_imports(path, module) if name.startswith("plt_megatron.")}


def part_of(module: str) -> str:
    """`plt_megatron.config.schema.RunConfig` is of `config`, or of a file with a rule of its own."""
    _, part, name, *_ = [*module.split("."), ""]
    return f"{part}.{name}" if f"{part}.{name}" in ALLOWED else part


def test_every_part_of_the_package_is_ruled():
    assert set(parts()) <= set(ALLOWED)


@pytest.mark.parametrize("part", parts())
def test_imports_point_one_way(part):
    for path in sorted((PACKAGE / part).rglob("*.py")):
        of = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        named = {*ALLOWED[of], *APART}
        imported = {name if name in named else name.split(".")[0] for name in imports_of_ours(path)}
        wrong = imported - ALLOWED[of] - {of, "errors", "extras", "installation"}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def modules() -> dict[str, Path]:
    """The package's files by module name."""
    names = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported_modules(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The files that a file imports, with those of the packages that they are in: their own files run before them."""
    found = set(named_imports(path, name, known))
    packages = {each.rsplit(".", depth)[0] for each in found for depth in range(1, each.count(".") + 1)}
    return ((found | packages) & known.keys()) - {name}


def look_for_circles(known: dict[str, Path]) -> None:
    """A CycleError names the files of one."""
    graph = {name: imported_modules(name, path, known) for name, path in known.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_file_imports_one_that_imports_it():
    look_for_circles(modules())


@pytest.mark.parametrize(
    ("package", "module"),
    [
        ("def start():\n    from p.a import start", "from p import b"),
        ("import p.a", "import p.b"),
        ("from p.a import start", "from p.b import other"),
        ("if TYPE_CHECKING:\n    from p import a", "from . import b"),
    ],
)
def test_a_circle_through_a_packages_own_file_is_found(tmp_path, package, module):
    files = {"p": package, "p.a": module, "p.b": ""}
    known = {name: tmp_path / f"{name}.py" for name in files}
    for name, path in known.items():
        path.write_text(files[name])
    with pytest.raises(graphlib.CycleError):
        look_for_circles(known)
    known["p"].write_text("")
    look_for_circles(known)


def test_imports_are_relative_only_in_what_an_export_takes_along():
    """Hugging Face's remote code asks for it; its modeling file imports nothing else of ours."""
    relative = [path for path in PACKAGE.rglob("*.py") if re.search(r"^\s*from \.", path.read_text(), re.MULTILINE)]
    assert {path.parent.name for path in relative} == {"hf"}
    modeling = (PACKAGE / "hf" / "modeling_plt.py").read_text()
    assert not re.search(r"^\s*(from|import) plt_megatron", modeling, re.MULTILINE)


def test_what_commands_check_first_imports_nothing_heavy():
    """A wrong checkpoint, folder or setting is refused at once, not after seconds of imports."""
    first = ("hf.averaged_checkpoints", "hf.arguments", "config.validation", "predict.report", "slurm.submission")
    imports = "; ".join(f"import plt_megatron.{module}" for module in first)
    run([sys.executable, "-c", f"import sys; {imports}; assert not sys.modules.keys() & set({HEAVY})"])


@pytest.mark.parametrize("script", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.name)
def test_a_benchmark_uses_names_that_exist(script):
    """Some run for minutes or need a GPU, so that no other test would notice."""
    known, imported = modules(), {}
    tree = ast.parse(script.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("plt_megatron"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                assert name in known or alias.name in names_of(known[node.module]), name
                if name in known:
                    imported[alias.asname or alias.name] = names_of(known[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            assert node.attr in imported[node.value.id], f"{node.value.id}.{node.attr}"


def names_of(path: Path) -> set[str]:
    """The names that a file defines or imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_comes_from_any_folder_before_anything_heavy(script, tmp_path):
    """Packages that would take seconds are replaced by ones that refuse to be imported."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text("raise RuntimeError(f'{__name__} imported')")
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    assert run([sys.executable, script, "--help"], tmp_path, env=env).stdout.startswith("usage:")
