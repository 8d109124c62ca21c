"""What this machine can run, what it cannot and why, and what to install.

`judge` draws the conclusions from what `machine.observe` saw, `render` prints them.
Each rule covers one thing that a user may want to do: yes and on what, or no, why, and what to do about it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from plt_megatron.config.rules.kernels import BLOCKWISE_CUDA, DETERMINISTIC_FLASH_ATTN, DETERMINISTIC_FP8_CUDNN
from plt_megatron.installation import ROOT, is_checkout
from plt_megatron.run_folder.text import format_memory, format_table
from plt_megatron.runtime.machine import Device, Machine

SUPPORTED_PYTHONS = ((3, 12), (3, 13))

_TRAIN_ON_CPU = "train on the CPU"
_TRAIN_ON_GPU = "train on GPUs"
_TRAINING = (_TRAIN_ON_CPU, _TRAIN_ON_GPU)

_INSTALL_PROJECT = "make venv, and use .venv/bin/python" if is_checkout(ROOT) else "pip install plt-megatron"
_HOPPER, _BLACKWELL = (9, 0), (10, 0)
_FIRST_WITH_FP8 = (8, 9)
OLDEST_TRANSFORMER_ENGINE = "2.9"  # the first with te.autocast
# Its torch part comes as source.
_BUILD_TRANSFORMER_ENGINE = (
    "use an NGC container (25.11 or newer), or with CUDA's nvcc and cuDNN's headers (CPATH) at hand "
    f"pip install --no-build-isolation 'transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}'"
)


@dataclass(frozen=True)
class Fact:
    """Something about the machine, as it is."""

    name: str
    detail: str


@dataclass(frozen=True)
class Capability:
    """Something a user may want to do here. `remedy` is empty if nothing needs to or can be done."""

    name: str
    state: Literal["yes", "no"]
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """The doctor's answer."""

    can_train: bool
    facts: list[Fact]
    capabilities: list[Capability]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def judge(machine: Machine) -> Report:
    """Draw the conclusions."""
    capabilities = _capabilities(machine)
    can_train = any(item.state == "yes" for item in capabilities if item.name in _TRAINING)
    return Report(can_train, _facts(machine), capabilities)


def _facts(machine: Machine) -> list[Fact]:
    packages = machine.packages
    facts = [
        Fact("Python", f"{'.'.join(map(str, machine.python))}, {machine.executable}"),
        Fact("torch", _torch_detail(machine)),
    ]
    for distribution in ("megatron-core", "transformer-engine", "flash-attn", "deepspeed", "sentencepiece"):
        detail = packages.get(distribution, "not installed")
        if distribution in machine.import_errors:
            detail += ", does not load"
        facts.append(Fact(distribution, detail))
    backends = [name for name, there in (("gloo", machine.gloo), ("NCCL", machine.nccl)) if there]
    headers = "" if machine.python_headers else ", no Python.h"
    driver = "" if machine.nvidia_driver is None else f", driver {machine.nvidia_driver}"
    return [
        *facts,
        Fact("torch.distributed", ", ".join(backends) or "none"),
        Fact("GPU", (", ".join(_describe(device) for device in machine.devices) or "none usable") + driver),
        Fact("C++ compiler", (machine.compiler or "none") + headers),
        Fact("cores", str(machine.cores)),
        Fact("memory", _size(machine.memory)),
        Fact("free disk here", _size(machine.disk_free)),
        Fact("Slurm", machine.slurm or "none"),
    ]


def _torch_detail(machine: Machine) -> str:
    version = machine.packages.get("torch")
    if version is None:
        return "not installed"
    if "torch" in machine.import_errors:
        return f"{version}, does not load"
    return f"{version}, " + (f"built for CUDA {machine.cuda_build}" if machine.cuda_build else "CPU build")


def _size(size: int | None) -> str:
    return "unknown" if size is None else format_memory(size)


def _describe(device: Device) -> str:
    major, minor = device.capability
    return f"{device.name} (sm{major}{minor}, {_size(device.memory)})"


# Rules: one for each thing that a user may want to do.


def _capabilities(machine: Machine) -> list[Capability]:
    """All rules' answers, the most important first."""
    return [
        _train_on_cpu(machine),
        _train_on_gpu(machine),
        _transformer_engine(machine),
        _fp8(machine),
        _flash_attention(machine),
        _deterministic(machine),
        _torch_compile(machine),
        _packages(machine, "tokenizers and data", ("sentencepiece", "tokenizers"), _INSTALL_PROJECT),
        _packages(machine, ".zst and Parquet input", ("zstandard", "pyarrow"), _extra("data")),
        _packages(machine, "Hugging Face models", ("transformers", "safetensors"), _extra("hf")),
        _packages(machine, "TensorBoard and plots", ("tensorboard", "matplotlib"), _INSTALL_PROJECT),
        _packages(machine, "reports and diagnostics", ("jinja2", "scipy"), _extra("report")),
        _packages(machine, "Weights & Biases", ("wandb",), _extra("track")),
        _packages(machine, "lm-eval", ("lm-eval", "accelerate", "transformers"), _extra("eval")),
        _packages(machine, "uploads", ("fsspec", "s3fs", "huggingface-hub"), _extra("upload")),
        _packages(machine, "DeepSpeed", ("deepspeed",), _extra("deepspeed")),
        _packages(machine, "Muon", ("emerging-optimizers",), _extra("muon")),
        _packages(machine, "slow GPUs", ("nvidia-resiliency-ext",), _extra("resilience")),
        _packages(machine, "tests and lint", ("pytest", "ruff", "mypy"), _extra("dev")),
        _slurm(machine),
    ]


def _extra(name: str) -> str:
    return f"pip install -e '.[{name}]'" if is_checkout(ROOT) else f"pip install 'plt-megatron[{name}]'"


def _no(name: str, reason: str, remedy: str = "") -> Capability:
    return Capability(name, "no", reason, remedy)


def _yes(name: str, reason: str) -> Capability:
    return Capability(name, "yes", reason)


def _core_problem(machine: Machine) -> tuple[str, str] | None:
    """Why the project's own code cannot run, and the remedy; None if it can."""
    major, minor, _ = machine.python
    if (major, minor) not in SUPPORTED_PYTHONS:
        known = " or ".join(f"{a}.{b}" for a, b in SUPPORTED_PYTHONS)
        return f"this is Python {major}.{minor}, and {known} is needed", _INSTALL_PROJECT
    missing = sorted(name for name in machine.requirements if name not in machine.packages)
    if missing:
        return f"not installed: {', '.join(missing)}", _INSTALL_PROJECT
    for name, wanted in machine.requirements.items():
        if not _in_range(machine.packages[name], wanted):
            return f"{name} {machine.packages[name]} is outside {wanted}", f"pip install '{name}{wanted}'"
    for name in ("torch", "megatron-core"):
        if name in machine.import_errors:
            return f"{name} does not load: {machine.import_errors[name]}", "install it again, in a new environment"
    return None


def _in_range(version: str, wanted: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # then `packaging`, one of the requirements, is already reported as missing
        return True
    # Containers ship builds such as 2.9.0a0+...: they count.
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _train_on_cpu(machine: Machine) -> Capability:
    problem = _core_problem(machine)
    if problem:
        return _no(_TRAIN_ON_CPU, *problem)
    if not machine.gloo:
        return _no(_TRAIN_ON_CPU, "this torch was built without gloo", "pip install --force-reinstall torch")
    return _yes(_TRAIN_ON_CPU, f"gloo, {machine.cores} cores, memory {_size(machine.memory)}")


def _gpu_problem(machine: Machine) -> tuple[str, str] | None:
    """Why nothing of ours runs on a GPU here, and the remedy; None if it does."""
    if not (machine.devices or machine.nvidia_device_files or machine.nvidia_driver):
        return "no NVIDIA GPU here", ""
    problem = _core_problem(machine)
    if problem:
        return problem
    if machine.cuda_build is None:
        return "this torch is a CPU build", "install a CUDA build of torch"
    if not machine.devices:
        driver = machine.nvidia_driver or "unknown"
        return (
            f"torch, built for CUDA {machine.cuda_build}, cannot use the GPU (driver {driver})",
            "install a newer NVIDIA driver, or a torch built for the CUDA version that nvidia-smi shows",
        )
    if not machine.nccl:
        return "this torch was built without NCCL", "install a torch with NCCL"
    return None


def _train_on_gpu(machine: Machine) -> Capability:
    problem = _gpu_problem(machine)
    if problem:
        return _no(_TRAIN_ON_GPU, *problem)
    names = sorted({device.name for device in machine.devices})
    return _yes(_TRAIN_ON_GPU, f"NCCL, {len(machine.devices)} x {' and '.join(names)}")


def _transformer_engine(machine: Machine) -> Capability:
    name = "Transformer Engine"
    if "transformer-engine" not in machine.packages:
        remedy = "" if _gpu_problem(machine) else _BUILD_TRANSFORMER_ENGINE
        return _no(name, "not installed; the torch backend is used instead", remedy)
    if "transformer-engine" in machine.import_errors:
        error = machine.import_errors["transformer-engine"]
        return _no(name, f"does not load: {error}", "build it for this torch: " + _BUILD_TRANSFORMER_ENGINE)
    version = machine.packages["transformer-engine"]
    if not _in_range(version, f">={OLDEST_TRANSFORMER_ENGINE}"):
        return _no(name, f"{version} is older than {OLDEST_TRANSFORMER_ENGINE}", _BUILD_TRANSFORMER_ENGINE)
    problem = _gpu_problem(machine) or _compiler_problem(machine)
    return _no(name, *problem) if problem else _yes(name, version)


def _fp8(machine: Machine) -> Capability:
    name = "FP8"
    engine = _transformer_engine(machine)
    if engine.state == "no":
        return _no(name, "needs Transformer Engine on a GPU")
    oldest = min(device.capability for device in machine.devices)
    if oldest < _FIRST_WITH_FP8:
        return _no(name, f"sm{oldest[0]}{oldest[1]} has no FP8 units; Ada, Hopper and Blackwell have")
    if oldest < _HOPPER:
        return _yes(name, "linear layers; attention in BF16")
    wanted = ".".join(map(str, BLOCKWISE_CUDA))
    blockwise = "" if _at_least(machine.cuda_build, wanted) else f"; blockwise needs a torch built for CUDA {wanted}"
    if oldest >= _BLACKWELL:
        return _yes(name, f"linear layers and attention: delayed, tensorwise and mxfp8 recipes{blockwise}")
    return _yes(
        name,
        f"linear layers; global attention with the delayed recipe and head dimension 128; local in BF16{blockwise}",
    )


def _at_least(version: str | None, wanted: str) -> bool:
    return version is not None and _in_range(version, f">={wanted}")


def _flash_attention(machine: Machine) -> Capability:
    name = "flash-attn"
    if "flash-attn" not in machine.packages:
        return _no(name, "not installed; cuDNN's fused attention or torch's is used instead")
    if "flash-attn" in machine.import_errors:
        return _no(name, f"does not load: {machine.import_errors['flash-attn']}", "build it for this torch")
    problem = _gpu_problem(machine)
    return _no(name, *problem) if problem else _yes(name, machine.packages["flash-attn"])


def _deterministic(machine: Machine) -> Capability:
    """`training.deterministic` with Transformer Engine: config/kernel_rules.py, for the oldest card."""
    name = "deterministic on TE"
    if _transformer_engine(machine).state == "no":
        return _no(name, "needs Transformer Engine on a GPU; the torch backend is deterministic without it")
    oldest = min(device.capability for device in machine.devices)
    wanted = ".".join(map(str, DETERMINISTIC_FLASH_ATTN))
    flash = _flash_attention(machine).state == "yes" and _at_least(machine.packages["flash-attn"], wanted)
    remedy = f"pip install 'flash-attn>={wanted}'"
    if not flash and oldest < _HOPPER:
        return _no(name, f"cuDNN's attention is not deterministic on sm{oldest[0]}{oldest[1]}", remedy)
    limits = [] if flash or oldest >= _BLACKWELL else ["packed documents need flash-attn"]
    major, minor = DETERMINISTIC_FP8_CUDNN
    if oldest >= _HOPPER and (machine.cudnn or 0) < 10000 * major + 100 * minor:
        limits.append(f"FP8 attention needs cuDNN {major}.{minor}")
    return _yes(name, "; ".join(limits) or "all attentions")


def _compiler_problem(machine: Machine) -> tuple[str, str] | None:
    """megatron-core compiles its SwiGLU on Transformer Engine's layers."""
    compiling = _torch_compile(machine)
    return (
        None
        if compiling.state == "yes"
        else (f"megatron-core compiles its SwiGLU: {compiling.reason}", compiling.remedy)
    )


def _torch_compile(machine: Machine) -> Capability:
    name = "torch.compile"
    if machine.compiler is None:
        return _no(name, "no C++ compiler; not needed for training", "apt-get install g++")
    if not machine.python_headers:
        return _no(name, "Python.h is missing; not needed for training", "apt-get install python3-dev")
    return _yes(name, machine.compiler)


def _packages(machine: Machine, name: str, needed: tuple[str, ...], remedy: str) -> Capability:
    missing = [package for package in needed if package not in machine.packages]
    if missing:
        return _no(name, f"not installed: {', '.join(missing)}", remedy)
    for package in needed:
        if package in machine.import_errors:
            return _no(name, f"{package} does not load: {machine.import_errors[package]}", remedy)
    return _yes(name, ", ".join(f"{package} {machine.packages[package]}" for package in needed))


def _slurm(machine: Machine) -> Capability:
    if machine.slurm is None:
        return _no("Slurm jobs", "no sbatch on the PATH", "run this on the cluster's login node")
    return _yes("Slurm jobs", machine.slurm)


# Printing.


def render(report: Report, stream: TextIO | None = None) -> None:
    """Print for people: tables on a terminal, aligned plain text elsewhere."""
    stream = stream or sys.stdout
    rows = [(item.state, item.name, _because(item)) for item in report.capabilities]
    facts = [(fact.name, fact.detail) for fact in report.facts]
    if stream.isatty() and _render_tables(facts, rows, stream):
        return
    for title, body in (("This machine", facts), ("What it can run", rows)):
        print(f"{title}\n{_as_text(body)}\n", file=stream)
    print(_verdict(report), file=stream)


def _because(item: Capability) -> str:
    return f"{item.reason}. To get it: {item.remedy}" if item.remedy else item.reason


def _verdict(report: Report) -> str:
    return "Training works here." if report.can_train else "Training does not work here; see the lines above."


def _as_text(rows: Sequence[tuple[str, ...]]) -> str:
    try:
        return format_table(rows, indent=2)
    except ImportError:  # a bare machine has no rich
        return "\n".join("  " + "  ".join(row) for row in rows)


def _render_tables(facts: Sequence[tuple[str, ...]], rows: Sequence[tuple[str, ...]], stream: TextIO) -> bool:
    """False if rich is not installed, as on a bare machine."""
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:
        return False
    console = Console(file=stream)
    for title, body in (("This machine", facts), ("What it can run", rows)):
        table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
        for row in body:
            table.add_row(*(_COLORS.get(cell, "{}").format(escape(cell)) for cell in row))
        console.print(table)
        console.print()
    return True


_COLORS = {"yes": "[green]{}[/green]", "no": "[yellow]{}[/yellow]"}
