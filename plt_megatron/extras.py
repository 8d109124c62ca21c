"""Optional packages: the extra of pyproject.toml that installs each module, and the message when one is missing.

Modules are looked up without importing them, so that a command can check before it begins and before slow imports.
"""

from __future__ import annotations

from importlib import util

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
    """Return `needs the packages ...: pip install ...` for those that are not installed; empty if all are."""
    missing = [module for module in modules if not _is_here(module)]
    extras = dict.fromkeys(EXTRAS[module] for module in missing)
    if not missing:
        return ""
    packages = f"package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}"
    where = "".join(PYTHONS.get(extra, "") for extra in extras)
    return f"needs the {packages}: pip install 'plt-megatron[{','.join(extras)}]'{where}"


def _is_here(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ValueError:  # it was put into sys.modules by hand, without a spec
        return True


def require(purpose: str, *modules: str) -> None:
    """Raise `UserError` if modules that `purpose` needs are not installed."""
    problem = lacking(*modules)
    if problem:
        raise UserError(f"{purpose} {problem}")
