"""plt doctor: what this machine can run, what it cannot and why, and what to install.

`judge` draws conclusions from what `machine.observe` found; `render` prints them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from plt_megatron.config.rules.fp8 import ADA, BLACKWELL, CONSUMER_BLACKWELL, HOPPER, card_name
from plt_megatron.config.rules.kernels import BLOCKWISE_CUDA, DETERMINISTIC_FLASH_ATTN, DETERMINISTIC_FP8_CUDNN
from plt_megatron.extras import PYTHONS, in_range, outdated
from plt_megatron.installation import ROOT, is_checkout
from plt_megatron.run_folder.text import format_memory, format_table
from plt_megatron.runtime.machine import Device, Machine

SUPPORTED_PYTHONS = ((3, 12), (3, 13))

_INSTALL_PROJECT = "make venv, and use .venv/bin/python" if is_checkout(ROOT) else "pip install plt-megatron"
OLDEST_TRANSFORMER_ENGINE = "2.9"  # the first with te.autocast
# Transformer Engine's torch extension is distributed as source.
_BUILD_TRANSFORMER_ENGINE = (
    "use an NGC container (25.11 or newer), or, with CUDA's nvcc and cuDNN's headers (CPATH), "
    f"pip install --no-build-isolation 'transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}'"
)


@dataclass(frozen=True)
class Capability:
    """Something a user may want to do here. `remedy` is empty if nothing needs to or can be done."""

    name: str
    state: Literal["yes", "no"]
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """The result of plt doctor. `facts`: properties of this machine, by name."""

    can_train: bool
    facts: dict[str, str]
    capabilities: list[Capability]

    def to_json(self) -> str:
        facts = [{"name": name, "detail": detail} for name, detail in self.facts.items()]
        capabilities = [vars(item) for item in self.capabilities]
        return json.dumps({"can_train": self.can_train, "facts": facts, "capabilities": capabilities}, indent=2)


def judge(machine: Machine) -> Report:
    """Judge what this machine can run."""
    capabilities = []
    for name, rule in _RULES.items():
        try:
            capabilities.append(Capability(name, "yes", rule(machine)))
        except _No as no:
            capabilities.append(Capability(name, "no", *no.args))
    can_train = any(item.state == "yes" for item in capabilities if item.name.startswith("train on "))
    return Report(can_train, _facts(machine), capabilities)


def _facts(machine: Machine) -> dict[str, str]:
    def version(package: str) -> str:
        broken = ", does not load" if package in machine.import_errors else ""
        return machine.packages.get(package, "not installed") + broken

    torch = version("torch")
    if torch == machine.packages.get("torch"):
        torch += f", built for CUDA {machine.cuda_build}" if machine.cuda_build else ", CPU build"
    packages = ("megatron-core", "transformer-engine", "flash-attn", "deepspeed", "sentencepiece")
    backends = [name for name, there in (("gloo", machine.gloo), ("NCCL", machine.nccl)) if there]
    driver = "" if machine.nvidia_driver is None else f", driver {machine.nvidia_driver}"
    return {
        "Python": f"{'.'.join(map(str, machine.python))}, {machine.executable}",
        "torch": torch,
        **{package: version(package) for package in packages},
        "torch.distributed": ", ".join(backends) or "none",
        "GPU": (", ".join(map(_describe, machine.devices)) or "none usable") + driver,
        "C++ compiler": (machine.compiler or "none") + ("" if machine.python_headers else ", no Python.h"),
        "cores": str(machine.cores),
        "memory": format_memory(machine.memory),
        "free disk here": format_memory(machine.disk_free),
        "Slurm": machine.slurm or "none",
    }


def _describe(device: Device) -> str:
    return f"{device.name} ({card_name(device.capability)}, {format_memory(device.memory)})"


# Rules, one per thing that a user may want to do. A rule returns a text that says on what it can be done here, or
# raises `_No`.


class _No(Exception):
    """Why something cannot be done here, and the remedy, if there is one."""


def _need(fulfilled: object, reason: str, remedy: str = "") -> None:
    if not fulfilled:
        raise _No(reason, remedy)


def _need_loading(machine: Machine, package: str, remedy: str, subject: str = "") -> None:
    error = machine.import_errors.get(package)
    _need(error is None, f"{subject}does not load: {error}", remedy)


def _works(rule: Callable[[Machine], str], machine: Machine) -> bool:
    try:
        return bool(rule(machine))
    except _No:
        return False


def _in_range(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # `packaging` is one of the requirements, and has already been reported as missing
        return True
    return in_range(version, SpecifierSet(wanted))


def _need_core(machine: Machine) -> None:
    """Check that the project's own code can run."""
    major, minor, _ = machine.python
    known = " or ".join(f"{a}.{b}" for a, b in SUPPORTED_PYTHONS)
    supported = (major, minor) in SUPPORTED_PYTHONS
    _need(supported, f"this is Python {major}.{minor}, and {known} is needed", _INSTALL_PROJECT)
    missing = sorted(machine.requirements.keys() - machine.packages.keys())
    _need(not missing, f"not installed: {', '.join(missing)}", _INSTALL_PROJECT)
    for name, wanted in machine.requirements.items():
        version = machine.packages[name]
        _need(_in_range(version, wanted), f"{name} {version} is outside {wanted}", f"pip install '{name}{wanted}'")
    for name in ("torch", "megatron-core"):
        _need_loading(machine, name, "reinstall it in a new environment", f"{name} ")


def _train_on_cpu(machine: Machine) -> str:
    _need_core(machine)
    _need(machine.gloo, "this torch was built without gloo", "pip install --force-reinstall torch")
    return f"gloo, {machine.cores} cores, memory {format_memory(machine.memory)}"


def _train_on_gpu(machine: Machine) -> str:
    driver = machine.nvidia_driver
    _need(machine.devices or machine.nvidia_device_files or driver, "no NVIDIA GPU here")
    _need_core(machine)
    _need(machine.cuda_build, "this torch is a CPU build", "install a CUDA build of torch")
    _need(
        machine.devices,
        f"torch, built for CUDA {machine.cuda_build}, cannot use the GPU (driver {driver or 'unknown'})",
        "install a newer NVIDIA driver, or a torch built for the CUDA version that nvidia-smi shows",
    )
    _need(machine.nccl, "this torch was built without NCCL", "install a torch with NCCL")
    names = sorted({device.name for device in machine.devices})
    return f"NCCL, {len(machine.devices)} x {' and '.join(names)}"


def _transformer_engine(machine: Machine) -> str:
    version, remedy = machine.packages.get("transformer-engine"), _BUILD_TRANSFORMER_ENGINE
    if version is None:
        raise _No("not installed; the torch backend is used instead", remedy if _works(_train_on_gpu, machine) else "")
    _need_loading(machine, "transformer-engine", f"build it for this torch: {remedy}")
    oldest = OLDEST_TRANSFORMER_ENGINE
    _need(_in_range(version, f">={oldest}"), f"{version} is older than {oldest}", remedy)
    _train_on_gpu(machine)
    try:
        _torch_compile(machine)
    except _No as no:
        raise _No(f"megatron-core compiles its SwiGLU: {no.args[0]}", no.args[1]) from no
    return version


def _fp8(machine: Machine) -> str:
    _need(_works(_transformer_engine, machine), "needs Transformer Engine on a GPU")
    oldest = min(device.capability for device in machine.devices)
    _need(oldest >= ADA, f"{card_name(oldest)} has no FP8 units; Ada, Hopper and Blackwell do")
    if oldest < HOPPER:
        return "linear layers; attention in BF16"
    wanted = ".".join(map(str, BLOCKWISE_CUDA))
    has_it = _in_range(str(machine.cuda_build), f">={wanted}")
    blockwise = "" if has_it else f"; blockwise needs a torch built for CUDA {wanted}"
    if oldest >= CONSUMER_BLACKWELL:
        return f"linear layers: delayed and tensorwise recipes; attention in BF16{blockwise}"
    if oldest >= BLACKWELL:
        return f"linear layers and attention: delayed, tensorwise and mxfp8 recipes{blockwise}"
    return f"linear layers; global attention with the delayed recipe and head dimension 128; local in BF16{blockwise}"


def _flash_attention(machine: Machine) -> str:
    version = machine.packages.get("flash-attn", "")
    _need(version, "not installed; cuDNN's fused attention or torch's is used instead")
    _need_loading(machine, "flash-attn", "build it for this torch")
    _train_on_gpu(machine)
    return version


def _deterministic(machine: Machine) -> str:
    """Apply the rules of config/rules/kernels.py for `training.deterministic` to the oldest card."""
    why = "needs Transformer Engine on a GPU; the torch backend is deterministic without it"
    _need(_works(_transformer_engine, machine), why)
    oldest = min(device.capability for device in machine.devices)
    wanted = ".".join(map(str, DETERMINISTIC_FLASH_ATTN))
    flash = _works(_flash_attention, machine) and _in_range(machine.packages["flash-attn"], f">={wanted}")
    why = f"cuDNN's attention is not deterministic on {card_name(oldest)}"
    _need(flash or oldest >= HOPPER, why, f"pip install 'flash-attn>={wanted}'")
    limits = [] if flash or oldest >= BLACKWELL else ["packed documents need flash-attn"]
    major, minor = DETERMINISTIC_FP8_CUDNN
    if oldest >= HOPPER and (machine.cudnn or 0) < 10000 * major + 100 * minor:
        limits.append(f"FP8 attention needs cuDNN {major}.{minor}")
    return "; ".join(limits) or "all attentions"


def _torch_compile(machine: Machine) -> str:
    compiler = machine.compiler or ""
    _need(compiler, "no C++ compiler; training needs one for model.fused_gated_window only", "apt-get install g++")
    _need(
        machine.python_headers,
        "no Python.h; training needs it for model.fused_gated_window only",
        "apt-get install python3-dev",
    )
    return compiler


def _packages(*needed: str, extra: str = "") -> Callable[[Machine], str]:
    """Make a rule that requires these packages, which the project or one of its extras installs."""
    named = f"pip install -e '{ROOT}[{extra}]'" if is_checkout(ROOT) else f"pip install 'plt-megatron[{extra}]'"
    remedy = named + PYTHONS.get(extra, "") if extra else _INSTALL_PROJECT

    def rule(machine: Machine) -> str:
        missing = [package for package in needed if package not in machine.packages]
        _need(not missing, f"not installed: {', '.join(missing)}", remedy)
        for package in needed:
            problem = outdated(package, extra) if extra else None
            _need(problem is None, f"needs {problem}", remedy)
            _need_loading(machine, package, remedy, f"{package} ")
        return ", ".join(f"{package} {machine.packages[package]}" for package in needed)

    return rule


def _slurm(machine: Machine) -> str:
    _need(machine.slurm, "no sbatch on the PATH", "run this on the cluster's login node")
    return machine.slurm or ""


# Most important first.
_RULES: dict[str, Callable[[Machine], str]] = {
    "train on the CPU": _train_on_cpu,
    "train on GPUs": _train_on_gpu,
    "Transformer Engine": _transformer_engine,
    "FP8": _fp8,
    "flash-attn": _flash_attention,
    "deterministic on TE": _deterministic,
    "torch.compile": _torch_compile,
    "tokenizers and data": _packages("sentencepiece", "tokenizers"),
    ".zst and Parquet input": _packages("zstandard", "pyarrow", extra="data"),
    "Hugging Face models": _packages("transformers", "safetensors", extra="hf"),
    "GGUF files": _packages("gguf", "accelerate", "transformers", extra="gguf"),
    "TensorBoard and plots": _packages("tensorboard", "matplotlib"),
    "reports and studies": _packages("jinja2", "scipy", extra="report"),
    "diagnostics": _packages("jinja2", "scipy", "transformers", extra="report,hf"),
    "Weights & Biases": _packages("wandb", extra="track"),
    "lm-eval": _packages("lm-eval", "accelerate", "transformers", extra="eval"),
    "uploads": _packages("fsspec", "s3fs", "huggingface-hub", extra="upload"),
    "DeepSpeed": _packages("deepspeed", extra="deepspeed"),
    "Muon": _packages("emerging-optimizers", extra="muon"),
    "slow GPUs": _packages("nvidia-resiliency-ext", extra="resilience"),
    "tests and lint": _packages("pytest", "ruff", "mypy", extra="dev"),
    "Slurm jobs": _slurm,
}


def render(report: Report, stream: TextIO | None = None) -> None:
    """Print the report: tables on a terminal, aligned plain text elsewhere."""
    stream = stream or sys.stdout
    _show("This machine", list(report.facts.items()), stream)
    remedies = [f". To get it: {item.remedy}" if item.remedy else "" for item in report.capabilities]
    found = [
        (item.state, item.name, item.reason + how) for item, how in zip(report.capabilities, remedies, strict=True)
    ]
    _show("What it can run", found, stream)
    print(
        "Training works here." if report.can_train else "Training does not work here; see the lines above.", file=stream
    )


def _show(title: str, rows: Sequence[tuple[str, ...]], stream: TextIO) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # nothing is installed
        print(title, *("  " + "  ".join(row) for row in rows), "", sep="\n", file=stream)
        return
    if not stream.isatty():
        print(f"{title}\n{format_table(rows, indent=2)}\n", file=stream)
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, {"yes": "green", "no": "yellow"}.get(cell, "")) for cell in row))
    Console(file=stream).print(table, "")
