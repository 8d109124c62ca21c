"""plt doctor: what this machine can run, what it cannot and why, and what to install.

`judge` draws conclusions from what `machine.observe` found; `render` prints them. Each rule covers one thing that a
user may want to do and answers yes and on what, or no, why, and what to do about it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from plt_megatron.config.rules.kernels import BLOCKWISE_CUDA, DETERMINISTIC_FLASH_ATTN, DETERMINISTIC_FP8_CUDNN
from plt_megatron.installation import ROOT, is_checkout
from plt_megatron.run_folder.text import format_memory, format_table
from plt_megatron.runtime.machine import Device, Machine

SUPPORTED_PYTHONS = ((3, 12), (3, 13))

_TRAIN_ON_CPU = "train on the CPU"
_TRAIN_ON_GPU = "train on GPUs"

_INSTALL_PROJECT = "make venv, and use .venv/bin/python" if is_checkout(ROOT) else "pip install plt-megatron"
_HOPPER, _BLACKWELL = (9, 0), (10, 0)
_FIRST_WITH_FP8 = (8, 9)
OLDEST_TRANSFORMER_ENGINE = "2.9"  # the first with te.autocast
# Transformer Engine's torch extension is distributed as source.
_BUILD_TRANSFORMER_ENGINE = (
    "use an NGC container (25.11 or newer), or, with CUDA's nvcc and cuDNN's headers (CPATH), "
    f"pip install --no-build-isolation 'transformer-engine[pytorch]>={OLDEST_TRANSFORMER_ENGINE}'"
)


@dataclass(frozen=True)
class Fact:
    """A property of this machine."""

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
    """The result of plt doctor."""

    can_train: bool
    facts: list[Fact]
    capabilities: list[Capability]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)


def judge(machine: Machine) -> Report:
    """Judge what this machine can run."""
    capabilities = []
    for name, rule in _RULES.items():
        answer = rule(machine)
        if isinstance(answer, str):
            capabilities.append(Capability(name, "yes", answer))
        else:
            capabilities.append(Capability(name, "no", *answer))
    can_train = any(item.state == "yes" for item in capabilities if item.name in (_TRAIN_ON_CPU, _TRAIN_ON_GPU))
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


# Rules, one per thing that a user may want to do. A rule returns a text that says on what it can be done here, or the
# reason why it cannot, and a remedy.

Answer = str | tuple[str, str]


def _extra(name: str) -> str:
    return f"pip install -e '.[{name}]'" if is_checkout(ROOT) else f"pip install 'plt-megatron[{name}]'"


def _core_problem(machine: Machine) -> tuple[str, str] | None:
    """Return why the project's own code cannot run, and the remedy; None if it can."""
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
            return f"{name} does not load: {machine.import_errors[name]}", "reinstall it in a new environment"
    return None


def _in_range(version: str | None, wanted: str) -> bool:
    if version is None:
        return False
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:  # `packaging` is one of the requirements, and has already been reported as missing
        return True
    # Containers ship builds such as 2.9.0a0+..., which count.
    return SpecifierSet(wanted).contains(version, prereleases=True)


def _train_on_cpu(machine: Machine) -> Answer:
    if problem := _core_problem(machine):
        return problem
    if not machine.gloo:
        return "this torch was built without gloo", "pip install --force-reinstall torch"
    return f"gloo, {machine.cores} cores, memory {_size(machine.memory)}"


def _train_on_gpu(machine: Machine) -> Answer:
    if not (machine.devices or machine.nvidia_device_files or machine.nvidia_driver):
        return "no NVIDIA GPU here", ""
    if problem := _core_problem(machine):
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
    names = sorted({device.name for device in machine.devices})
    return f"NCCL, {len(machine.devices)} x {' and '.join(names)}"


def _unless_no_gpu(machine: Machine, answer: Answer) -> Answer:
    """Return the answer if GPUs work here, else why they do not."""
    gpu = _train_on_gpu(machine)
    return answer if isinstance(gpu, str) else gpu


def _transformer_engine(machine: Machine) -> Answer:
    if "transformer-engine" not in machine.packages:
        remedy = _unless_no_gpu(machine, _BUILD_TRANSFORMER_ENGINE)
        return "not installed; the torch backend is used instead", remedy if isinstance(remedy, str) else ""
    if error := machine.import_errors.get("transformer-engine"):
        return f"does not load: {error}", "build it for this torch: " + _BUILD_TRANSFORMER_ENGINE
    version = machine.packages["transformer-engine"]
    if not _in_range(version, f">={OLDEST_TRANSFORMER_ENGINE}"):
        return f"{version} is older than {OLDEST_TRANSFORMER_ENGINE}", _BUILD_TRANSFORMER_ENGINE
    compiling = _torch_compile(machine)
    if not isinstance(compiling, str):
        compiling = (f"megatron-core compiles its SwiGLU: {compiling[0]}", compiling[1])
    return _unless_no_gpu(machine, version if isinstance(compiling, str) else compiling)


def _fp8(machine: Machine) -> Answer:
    if not isinstance(_transformer_engine(machine), str):
        return "needs Transformer Engine on a GPU", ""
    oldest = min(device.capability for device in machine.devices)
    if oldest < _FIRST_WITH_FP8:
        return f"sm{oldest[0]}{oldest[1]} has no FP8 units; Ada, Hopper and Blackwell do", ""
    if oldest < _HOPPER:
        return "linear layers; attention in BF16"
    wanted = ".".join(map(str, BLOCKWISE_CUDA))
    has_it = _in_range(machine.cuda_build, f">={wanted}")
    blockwise = "" if has_it else f"; blockwise needs a torch built for CUDA {wanted}"
    if oldest >= _BLACKWELL:
        return f"linear layers and attention: delayed, tensorwise and mxfp8 recipes{blockwise}"
    return f"linear layers; global attention with the delayed recipe and head dimension 128; local in BF16{blockwise}"


def _flash_attention(machine: Machine) -> Answer:
    if "flash-attn" not in machine.packages:
        return "not installed; cuDNN's fused attention or torch's is used instead", ""
    if error := machine.import_errors.get("flash-attn"):
        return f"does not load: {error}", "build it for this torch"
    return _unless_no_gpu(machine, machine.packages["flash-attn"])


def _deterministic(machine: Machine) -> Answer:
    """Apply the rules of config/rules/kernels.py for `training.deterministic` on Transformer Engine to the oldest
    card."""
    if not isinstance(_transformer_engine(machine), str):
        return "needs Transformer Engine on a GPU; the torch backend is deterministic without it", ""
    oldest = min(device.capability for device in machine.devices)
    wanted = ".".join(map(str, DETERMINISTIC_FLASH_ATTN))
    version = _flash_attention(machine)
    flash = isinstance(version, str) and _in_range(version, f">={wanted}")
    if not flash and oldest < _HOPPER:
        why = f"cuDNN's attention is not deterministic on sm{oldest[0]}{oldest[1]}"
        return why, f"pip install 'flash-attn>={wanted}'"
    limits = [] if flash or oldest >= _BLACKWELL else ["packed documents need flash-attn"]
    major, minor = DETERMINISTIC_FP8_CUDNN
    if oldest >= _HOPPER and (machine.cudnn or 0) < 10000 * major + 100 * minor:
        limits.append(f"FP8 attention needs cuDNN {major}.{minor}")
    return "; ".join(limits) or "all attentions"


def _torch_compile(machine: Machine) -> Answer:
    if machine.compiler is None:
        return "no C++ compiler; not needed for training", "apt-get install g++"
    if not machine.python_headers:
        return "Python.h is missing; not needed for training", "apt-get install python3-dev"
    return machine.compiler


def _packages(*needed: str, remedy: str) -> Callable[[Machine], Answer]:
    """Make a rule that requires these packages to be installed and to load."""

    def rule(machine: Machine) -> Answer:
        missing = [package for package in needed if package not in machine.packages]
        if missing:
            return f"not installed: {', '.join(missing)}", remedy
        for package in needed:
            if error := machine.import_errors.get(package):
                return f"{package} does not load: {error}", remedy
        return ", ".join(f"{package} {machine.packages[package]}" for package in needed)

    return rule


def _slurm(machine: Machine) -> Answer:
    return machine.slurm or ("no sbatch on the PATH", "run this on the cluster's login node")


# Most important first.
_RULES: dict[str, Callable[[Machine], Answer]] = {
    _TRAIN_ON_CPU: _train_on_cpu,
    _TRAIN_ON_GPU: _train_on_gpu,
    "Transformer Engine": _transformer_engine,
    "FP8": _fp8,
    "flash-attn": _flash_attention,
    "deterministic on TE": _deterministic,
    "torch.compile": _torch_compile,
    "tokenizers and data": _packages("sentencepiece", "tokenizers", remedy=_INSTALL_PROJECT),
    ".zst and Parquet input": _packages("zstandard", "pyarrow", remedy=_extra("data")),
    "Hugging Face models": _packages("transformers", "safetensors", remedy=_extra("hf")),
    "TensorBoard and plots": _packages("tensorboard", "matplotlib", remedy=_INSTALL_PROJECT),
    "reports and diagnostics": _packages("jinja2", "scipy", remedy=_extra("report")),
    "Weights & Biases": _packages("wandb", remedy=_extra("track")),
    "lm-eval": _packages("lm-eval", "accelerate", "transformers", remedy=_extra("eval")),
    "uploads": _packages("fsspec", "s3fs", "huggingface-hub", remedy=_extra("upload")),
    "DeepSpeed": _packages("deepspeed", remedy=_extra("deepspeed")),
    "Muon": _packages("emerging-optimizers", remedy=_extra("muon")),
    "slow GPUs": _packages("nvidia-resiliency-ext", remedy=_extra("resilience")),
    "tests and lint": _packages("pytest", "ruff", "mypy", remedy=_extra("dev")),
    "Slurm jobs": _slurm,
}


# Printing.


def render(report: Report, stream: TextIO | None = None) -> None:
    """Print the report: tables on a terminal, aligned plain text elsewhere."""
    stream = stream or sys.stdout
    found = [(item.state, item.name, _because(item)) for item in report.capabilities]
    facts = [(fact.name, fact.detail) for fact in report.facts]
    for title, rows in (("This machine", facts), ("What it can run", found)):
        _show(title, rows, stream)
    verdict = "Training works here." if report.can_train else "Training does not work here; see the lines above."
    print(verdict, file=stream)


def _because(item: Capability) -> str:
    return f"{item.reason}. To get it: {item.remedy}" if item.remedy else item.reason


def _show(title: str, rows: Sequence[tuple[str, ...]], stream: TextIO) -> None:
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ImportError:  # nothing is installed
        print(title, *("  " + "  ".join(row) for row in rows), "", sep="\n", file=stream)
        return
    if not stream.isatty():
        print(f"{title}\n{format_table(rows, indent=2)}\n", file=stream)
        return
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_COLORS.get(cell, "{}").format(escape(cell)) for cell in row))
    console = Console(file=stream)
    console.print(table)
    console.print()


_COLORS = {"yes": "[green]{}[/green]", "no": "[yellow]{}[/yellow]"}
