"""Optional packages: the extra of pyproject.toml that installs each module, and the message when one is missing.

Modules are looked up without importing them, so that a command can check before it begins and before slow imports.
"""

from __future__ import annotations

from importlib import metadata, util
from typing import Any

from plt_megatron.errors import UserError

# Module -> extra. `eval` brings `hf` too.
EXTRAS = {
    "transformer_engine": "gpu",
    "transformers": "hf",
    "safetensors": "hf",
    "gguf": "gguf",
    "wandb": "track",
    "fsspec": "upload",
    "s3fs": "upload",
    "huggingface_hub": "upload",
    "lm_eval": "eval",
    "accelerate": "eval",
    "deepspeed": "deepspeed",
    "nvidia_resiliency_ext": "resilience",
    "emerging_optimizers": "muon",
    "zstandard": "data",
    "pyarrow": "data",
    "jinja2": "report",
    "scipy": "report",
}
# What else an extra needs, for messages.
PYTHONS = {"resilience": " (wheels for Python 3.12 only)"}


def lacking(*modules: str) -> str:
    """Return `needs the packages ...: pip install ...` for those that are not installed, or not in a version that their
    extra asks for; empty if all are."""
    problems = {module: problem for module in modules if (problem := _problem(module))}
    extras = dict.fromkeys(EXTRAS[module] for module in problems)
    if not problems:
        return ""
    packages = f"package{'s' if len(problems) > 1 else ''} {' and '.join(problems.values())}"
    where = "".join(PYTHONS.get(extra, "") for extra in extras)
    return f"needs the {packages}: pip install 'plt-megatron[{','.join(extras)}]'{where}"


def _problem(module: str) -> str | None:
    """Return what is needed in place of what is installed; None if nothing is."""
    try:
        is_here = util.find_spec(module) is not None
    except ValueError:  # it was put into sys.modules by hand, without a spec
        return None
    return outdated(module, EXTRAS[module]) if is_here else module


def outdated(package: str, extra: str) -> str | None:
    """Return `package>=2, not 1.5` if the installed version is outside the extra's range; None if not, or not known."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        version, requirements = metadata.version(package), metadata.requires("plt-megatron") or []
    except ImportError:  # no `packaging`; or, not found: it comes under another name, or this is a bare checkout
        return None
    for each in map(Requirement, requirements):
        is_asked = each.marker is not None and each.marker.evaluate({"extra": extra})
        if is_asked and canonicalize_name(each.name) == canonicalize_name(package):
            if not in_range(version, each.specifier):
                return f"{each.name}{each.specifier}, not {version}"
    return None


def in_range(version: str, wanted: Any) -> bool:
    """Check a version against a `SpecifierSet`. Containers ship builds such as 2.9.0a0+..., which count as 2.9.0."""
    from packaging.version import Version

    return any(wanted.contains(known, True) for known in (version, Version(version).base_version))


def require(purpose: str, *modules: str) -> None:
    """Raise `UserError` if modules that `purpose` needs are not installed."""
    problem = lacking(*modules)
    if problem:
        raise UserError(f"{purpose} {problem}")
