"""The doctor's conclusions about machines of every kind, and that it survives a bare one."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import tomllib

import pytest

from plt_megatron.runtime import doctor, machine
from plt_megatron.runtime.machine import Device, Machine
from tests.running import ROOT, run

H100 = Device("NVIDIA H100 80GB HBM3", (9, 0), 80 * 2**30)
A100 = Device("NVIDIA A100", (8, 0), 40 * 2**30)
B200 = Device("NVIDIA B200", (10, 0), 180 * 2**30)

VERSIONS = {
    "torch": "2.14.1",
    "megatron-core": "0.19.2",
    "psutil": "7.2",
    "packaging": "26",
    "sentencepiece": "0.2.3",
    "tokenizers": "0.23.3",
    "tensorboard": "2.21",
    "matplotlib": "3.11",
}
REQUIREMENTS = {"torch": ">=2.8,<2.15", "megatron-core": ">=0.19.2,<0.20", "psutil": ">=5.9"}


def cpu_machine(**changes) -> Machine:
    base = Machine(
        python=(3, 13, 5),
        executable="/usr/bin/python3",
        packages=dict(VERSIONS),
        requirements=dict(REQUIREMENTS),
        cuda_build="13.0",
        gloo=True,
        nccl=True,
        compiler="/usr/bin/g++",
        python_headers=True,
        cores=2,
        memory=24 * 2**30,
        disk_free=70 * 2**30,
    )
    return dataclasses.replace(base, **changes)


def gpu_machine(*devices: Device, **changes) -> Machine:
    packages = {**VERSIONS, "transformer-engine": "2.20.2", "flash-attn": "2.8"}
    seen = cpu_machine(packages=packages, devices=list(devices), nvidia_driver="580.1", nvidia_device_files=True)
    return dataclasses.replace(seen, **changes)


def answer(seen: Machine, name: str) -> doctor.Capability:
    (found,) = (item for item in doctor.judge(seen).capabilities if item.name == name)
    return found


def test_a_cpu_machine_trains_and_says_why_not_the_rest():
    report = doctor.judge(cpu_machine())
    states = {item.name: item.state for item in report.capabilities}
    assert report.can_train
    assert states["train on the CPU"] == "yes"
    assert states["train on GPUs"] == states["Transformer Engine"] == states["FP8"] == "no"
    assert answer(cpu_machine(), "train on GPUs").reason == "no NVIDIA GPU here"
    assert answer(cpu_machine(), "train on GPUs").remedy == ""


def test_every_no_has_a_reason():
    for seen in (Machine(), cpu_machine(), gpu_machine(A100), gpu_machine(H100, gloo=False, nccl=False)):
        for item in doctor.judge(seen).capabilities:
            assert item.reason, item


@pytest.mark.parametrize(
    ("python", "trains"), [((3, 11, 9), False), ((3, 12, 0), True), ((3, 13, 9), True), ((3, 14, 0), False)]
)
def test_python_must_be_in_the_supported_range(python, trains):
    report = doctor.judge(cpu_machine(python=python))
    assert report.can_train is trains
    if not trains:
        assert f"Python {python[0]}.{python[1]}" in report.capabilities[0].reason


@pytest.mark.parametrize(
    ("package", "version", "trains"),
    [
        ("torch", "2.7.1", False),
        ("torch", "2.8.0", True),
        ("torch", "2.9.0a0+145a3a7bda.nv25.10", True),
        ("torch", "2.15.0", False),
        ("megatron-core", "0.19.1", False),
        ("megatron-core", "0.20.0", False),
    ],
)
def test_versions_outside_their_range_stop_training(package, version, trains):
    seen = cpu_machine(packages={**VERSIONS, package: version})
    assert doctor.judge(seen).can_train is trains
    if not trains:
        said = answer(seen, "train on the CPU")
        assert f"{package} {version} is outside" in said.reason
        assert f"pip install '{package}{REQUIREMENTS[package]}'" == said.remedy


def test_missing_packages_are_all_named():
    packages = {name: version for name, version in VERSIONS.items() if name not in ("psutil", "megatron-core")}
    said = answer(cpu_machine(packages=packages), "train on the CPU")
    assert said.reason == "not installed: megatron-core, psutil"
    assert "make venv" in said.remedy


def test_a_package_that_does_not_load_counts_as_broken():
    seen = cpu_machine(import_errors={"torch": "OSError: libcudart.so.13: cannot open shared object file"})
    assert not doctor.judge(seen).can_train
    assert "libcudart.so.13" in answer(seen, "train on the CPU").reason


def test_gloo_is_needed_on_a_cpu_and_nccl_on_a_gpu():
    assert not doctor.judge(cpu_machine(gloo=False)).can_train
    assert answer(gpu_machine(H100, nccl=False), "train on GPUs").state == "no"
    assert doctor.judge(gpu_machine(H100, gloo=False)).can_train


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cuda_build": None}, "CPU build"),
        ({"nvidia_driver": "470.82"}, "driver 470.82"),
        ({"nvidia_driver": None}, "driver unknown"),
    ],
)
def test_a_gpu_that_torch_cannot_use_gets_a_reason_and_a_remedy(changes, said):
    found = answer(gpu_machine(**changes), "train on GPUs")
    assert found.state == "no" and said in found.reason and found.remedy


@pytest.mark.parametrize(
    ("devices", "state", "said"),
    [
        ([A100], "no", "sm80"),
        ([H100], "yes", "delayed recipe"),
        ([B200], "yes", "mxfp8"),
        ([Device("NVIDIA GeForce RTX 5090", (12, 0), 32 * 2**30)], "yes", "tensorwise recipes; attention in BF16"),
        ([H100, A100], "no", "sm80"),
        ([Device("NVIDIA L40S", (8, 9), 48 * 2**30)], "yes", "attention in BF16"),
    ],
)
def test_fp8_follows_the_oldest_card(devices, state, said):
    found = answer(gpu_machine(*devices), "FP8")
    assert found.state == state and said in found.reason


def test_blockwise_needs_a_cuda_that_has_it():
    assert "blockwise" not in answer(gpu_machine(H100, cuda_build="12.10"), "FP8").reason
    assert "; blockwise needs a torch built for CUDA 12.9" in answer(gpu_machine(H100, cuda_build="12.8"), "FP8").reason


@pytest.mark.parametrize(
    ("device", "flash", "cudnn", "state", "said"),
    [
        (H100, True, 91900, "yes", "all attentions"),
        (H100, True, 91800, "yes", "FP8 attention needs cuDNN 9.19"),
        (H100, False, 92400, "yes", "packed documents need flash-attn"),
        (B200, False, 92400, "yes", "all attentions"),
        (A100, False, 92400, "no", "cuDNN's attention is not deterministic on sm80"),
        (A100, True, 90000, "yes", "all attentions"),
    ],
)
def test_what_is_deterministic_follows_from_card_cudnn_and_flash_attn(device, flash, cudnn, state, said):
    seen = gpu_machine(device, cudnn=cudnn)
    if not flash:
        del seen.packages["flash-attn"]
    found = answer(seen, "deterministic on TE")
    assert (found.state, found.reason) == (state, said) and bool(found.remedy) == (state == "no")


TE_TOO_OLD = {**VERSIONS, "transformer-engine": "2.8.0", "flash-attn": "2.8"}


@pytest.mark.parametrize(
    ("changes", "reason", "remedy"),
    [
        ({"import_errors": {"transformer-engine": "ImportError: undefined symbol: _ZN3c10"}}, "undefined symbol", ""),
        ({"packages": TE_TOO_OLD}, "2.8.0 is older than 2.9", "--no-build-isolation"),
        ({"compiler": None}, "megatron-core compiles its SwiGLU: no C++ compiler", "apt-get install g++"),
    ],
    ids=["built for another torch", "too old", "no compiler"],
)
def test_a_transformer_engine_that_does_not_work_is_reported(changes, reason, remedy):
    seen = gpu_machine(H100, **changes)
    found = answer(seen, "Transformer Engine")
    assert found.state == "no" and reason in found.reason and found.remedy and remedy in found.remedy
    assert answer(seen, "FP8").state == "no" and doctor.judge(seen).can_train


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [({"compiler": None}, "apt-get install g++"), ({"python_headers": False}, "apt-get install python3-dev")],
)
def test_torch_compile_needs_compiler_and_headers(changes, remedy):
    found = answer(cpu_machine(**changes), "torch.compile")
    assert (found.state, found.remedy) == ("no", remedy)


def test_every_extra_it_advises_exists():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    advised = [item.remedy for item in doctor.judge(gpu_machine(H100, packages=dict(VERSIONS))).capabilities]
    named = {
        name for remedy in advised if str(ROOT) in remedy for name in remedy.split("[")[1].split("]")[0].split(",")
    }
    expected = {"hf", "gguf", "data", "report", "track", "eval", "upload", "deepspeed", "muon", "resilience", "dev"}
    assert expected == named <= set(extras)


def test_plain_text_has_a_line_for_everything():
    report, stream = doctor.judge(cpu_machine()), io.StringIO()
    doctor.render(report, stream)
    lines = stream.getvalue().splitlines()
    for item in report.capabilities:
        assert any(line.split()[:1] == [item.state] and item.name in line for line in lines), item
    assert lines[-1] == "Training works here."
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_tables_and_odd_names_survive_markup():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    seen = cpu_machine(packages={name: version for name, version in VERSIONS.items() if name != "psutil"})
    doctor.render(doctor.judge(seen), stream)
    assert "[track]'" in stream.getvalue()  # not taken for a rich tag


def test_requirements_are_those_of_pyproject():
    read = machine._project_requirements()
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {name + wanted for name, wanted in read.items()} == set(listed)
    assert all(wanted for wanted in read.values())


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise ImportError('no such symbol')", "ImportError: no such symbol"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "crashed (SIGSEGV)"),
        ("raise SystemExit(3)", "exited with status 3"),
    ],
)
def test_a_package_that_breaks_at_import_breaks_only_its_probe(tmp_path, monkeypatch, source, said):
    (tmp_path / "torch.py").write_text("")
    (tmp_path / "deepspeed.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    _, error = machine._probe_import("deepspeed")
    assert said in error


def test_a_bare_python_gets_an_answer_and_status_1(tmp_path):
    """No site-packages at all, as on a machine where nothing has been installed yet."""
    done = run([sys.executable, "-I", "-S", ROOT / "tools" / "doctor.py", "--json"], tmp_path, status=1)
    report = json.loads(done.stdout)
    assert report["can_train"] is False
    assert "not installed" in report["capabilities"][0]["reason"]
    assert "make venv" in report["capabilities"][0]["remedy"]


@pytest.mark.slow  # it compiles
def test_this_machine_can_train():
    """The suite runs here, so the doctor had better agree."""
    assert json.loads(run([sys.executable, "tools/doctor.py", "--json"]).stdout)["can_train"] is True


@pytest.mark.parametrize(("wanted", "is_in"), [(">=2.9", True), (">=2.9.1", False), (">=2.8,<2.9", False)])
def test_a_containers_build_counts_as_the_version_that_it_precedes(wanted, is_in):
    assert doctor._in_range("2.9.0a0+145a3a7bda.nv25.10", wanted) is is_in


def test_without_packaging_the_rest_is_judged(monkeypatch):
    for name in ("packaging", "packaging.requirements"):
        monkeypatch.setitem(sys.modules, name, None)
    seen = Machine(packages={"zstandard": "0.25", "pyarrow": "20"})
    assert {each.name: each.state for each in doctor.judge(seen).capabilities}[".zst and Parquet input"] == "yes"
