"""The package's location: a checkout, a job's copy of one, or an installed wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # must be on sys.path to import this package
# A wheel has the configurations inside the package (see pyproject.toml), a checkout beside it.
CONFIGS = next((path for path in (PACKAGE / "configs", ROOT / "configs") if path.is_dir()), PACKAGE / "configs")


def find_config(path: str | os.PathLike[str]) -> Path:
    """Return the given file, or the shipped one of that name: `configs/runs/plt2_tiny.yaml` works from any folder."""
    given = Path(path)
    if not given.exists() and given.parts[:1] == ("configs",):
        shipped = CONFIGS.joinpath(*given.parts[1:])
        return shipped if shipped.is_file() else given
    return given


def is_checkout(root: Path) -> bool:
    """Return whether the folder that holds the package is the project's own, not site-packages."""
    return (root / "pyproject.toml").is_file() and not (root / PACKAGE.name / "configs").is_dir()  # a wheel has them


def own_python() -> list[str]:
    """Return the command of a Python that imports this process's code and the standard library, whatever the folder
    that it starts in has: a file random.py, or a job's folder in another state by now. It needs `python_path`."""
    return [sys.executable, "-P"]


def python_path() -> str:
    """Return PYTHONPATH for processes that import this package: a checkout comes first.

    An installed package is not added: site-packages must not precede the standard library.
    """
    inherited = os.environ.get("PYTHONPATH", "")
    own = str(ROOT) if is_checkout(ROOT) else ""
    return os.pathsep.join(filter(None, (own, inherited)))


def megatron_core_version() -> str:
    """Return megatron-core's version; `unknown` if it is on the path, but not installed."""
    from importlib import metadata

    try:
        # Not `megatron.core.__version__`: it ends with the commit of whatever repository its folder lies in, ours too.
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        return "unknown"
