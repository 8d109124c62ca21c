"""What a run puts into its environment for CUDA's libraries, and when."""

import contextlib
import os
import tempfile
from unittest.mock import Mock

import pytest

from plt_megatron.config.schema import DataConfig, Fp8Config, ParallelConfig, RunConfig, TrainingConfig
from plt_megatron.errors import UserError
from plt_megatron.hf import arguments
from plt_megatron.runtime.environment import (
    ALLOCATOR,
    ALLOCATOR_TOO,
    check_environment,
    cuda_environment,
    set_cuda_environment,
)
from plt_megatron.train import main

NAMES = ("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO", ALLOCATOR, ALLOCATOR_TOO)
ALWAYS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
ONE_QUEUE = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.fixture
def unset(monkeypatch):
    """None of the variables is set; they are again afterwards as they were before."""
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("parallel", "expected"),
    [
        ({}, {}),
        ({"pipeline_model_parallel_size": 2}, {}),
        ({"tensor_model_parallel_size": 2}, ONE_QUEUE),
        ({"context_parallel_size": 2}, ONE_QUEUE),
    ],
)
def test_collectives_are_not_overtaken_where_layers_communicate(parallel, expected):
    assert cuda_environment(RunConfig(parallel=ParallelConfig(**parallel))) == ALWAYS | expected


def test_attention_is_not_compiled_for_the_length_of_every_document(monkeypatch):
    packed = RunConfig(data=DataConfig(reset_at_document_boundaries=True))
    assert cuda_environment(packed) == ALWAYS | {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1"}
    monkeypatch.setattr(arguments, "quiet_imports", lambda level: None)
    for given, then in (({}, "1"), ({"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}, "0")):
        monkeypatch.setattr(os, "environ", given)
        arguments.prepare_imports()
        assert given["TORCH_CUDNN_SDPA_DEPRIORITIZED"] == then


def test_deterministic_runs_have_what_torch_and_megatron_ask_for():
    needed = cuda_environment(RunConfig(training=TrainingConfig(deterministic=True)))
    # The values: torch's documentation of use_deterministic_algorithms, and Megatron-LM's --deterministic-mode.
    assert needed.pop("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")
    assert needed.pop("NCCL_ALGO") == "Ring"
    assert needed == ALWAYS


def test_fp8_attention_scales_by_the_largest_value_of_all_loops():
    """Transformer Engine's default covers one call, which is another loop's."""
    training = TrainingConfig(fp8=Fp8Config(attention=True))
    needed = cuda_environment(RunConfig(training=training))
    assert int(needed["NVTE_DPA_FP8DS_AMAX_HISTLEN"]) >= 1000 and needed["NVTE_DPA_FP8DS_AMAX_ALGO"] == "max"
    assert cuda_environment(RunConfig(training=TrainingConfig(fp8=Fp8Config()))) == ALWAYS


@pytest.mark.parametrize("name", ["NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN"])
def test_variables_that_megatron_core_would_refuse_with_a_traceback_are_named(monkeypatch, name):
    monkeypatch.setenv(name, "1")
    check_environment()
    monkeypatch.setenv(name, "0")
    with pytest.raises(UserError, match=f"{name}=0.*unset"):
        check_environment()


@pytest.mark.parametrize(
    ("algorithms", "repeats"), [("Ring", True), ("CollnetDirect, Ring", True), ("Tree,Ring", False)]
)
def test_deterministic_runs_take_only_algorithms_that_repeat_a_sum(monkeypatch, algorithms, repeats):
    monkeypatch.setenv("NCCL_ALGO", algorithms)
    check_environment()
    with contextlib.nullcontext() if repeats else pytest.raises(UserError, match=f"NCCL_ALGO={algorithms}"):
        check_environment(deterministic=True)


@pytest.mark.parametrize("name", [ALLOCATOR, ALLOCATOR_TOO])
def test_the_user_s_allocator_settings_stay_under_both_their_names(unset, monkeypatch, name):
    monkeypatch.setenv(name, "max_split_size_mb:512")
    set_cuda_environment(RunConfig())
    assert {key: os.environ.get(key) for key in (ALLOCATOR, ALLOCATOR_TOO)} == {
        ALLOCATOR: None,
        ALLOCATOR_TOO: None,
        name: "max_split_size_mb:512",
    }


@pytest.mark.parametrize("own", [None, "/mine"])
def test_triton_compiles_where_there_is_no_home(unset, monkeypatch, own, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/nosuch")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if own:
        monkeypatch.setenv("TRITON_CACHE_DIR", own)
    set_cuda_environment(RunConfig())
    assert os.environ["TRITON_CACHE_DIR"] == (own or f"{tempfile.gettempdir()}/triton-{os.getuid()}")


def test_triton_runs_no_code_that_others_can_put_there(unset, monkeypatch, tmp_path):
    """In a folder for all users the name can be guessed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/nosuch")
    guessed = tmp_path / f"triton-{os.getuid()}"
    guessed.mkdir()
    guessed.chmod(0o777)
    for number in range(2):
        monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
        set_cuda_environment(RunConfig())
        cache = os.environ["TRITON_CACHE_DIR"]
        assert cache != str(guessed) and os.stat(cache).st_mode & 0o077 == 0
        if number == 0:
            guessed.rmdir()
            guessed.symlink_to(cache)


def test_what_the_user_has_set_stays(unset, monkeypatch):
    own = {"NCCL_ALGO": "Ring", "CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUDA_DEVICE_MAX_CONNECTIONS": "8"} | {
        ALLOCATOR: "max_split_size_mb:512",
        ALLOCATOR_TOO: "max_split_size_mb:256",
    }
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    set_cuda_environment(RunConfig(parallel=parallel, training=TrainingConfig(deterministic=True)))
    assert {name: os.environ[name] for name in NAMES} == own


def test_a_run_sets_it_before_anything_asks_for_devices(unset, monkeypatch):
    class ReachedError(Exception):
        pass

    monkeypatch.setattr(main, "quiet_imports", Mock(side_effect=ReachedError))  # the first after importing torch
    with pytest.raises(ReachedError):
        main.train(RunConfig(training=TrainingConfig(deterministic=True)))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"]
