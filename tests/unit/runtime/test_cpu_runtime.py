"""The CPU runtime, family by family of what it replaces.

It changes torch for the whole process, so everything happens in processes of its own: this file is also their main
program. One runs each `probe_*` function on the entered runtime, another stands for a machine with a GPU.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.running import ROOT, run


def probe_the_compiler_is_imported_when_something_is_compiled() -> None:
    """The first probe: others may import it."""
    import torch

    assert "megatron.core.fusions.fused_bias_geglu" in sys.modules
    assert not {"torch._dynamo", "torch._inductor.compile_fx"} & set(sys.modules)
    assert torch.compile.__module__ == "torch"

    from megatron.core.fusions.fused_bias_geglu import geglu

    x = torch.randn(3, 8)
    gate, up = x.chunk(2, -1)
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(geglu(x), torch.nn.functional.gelu(gate, approximate="tanh") * up, atol=1e-6)
    assert "torch._dynamo" in sys.modules and geglu.__name__ == "geglu"


def probe_device_queries() -> None:
    import torch

    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
    assert torch.cuda.device_count() == 1
    assert not torch.cuda.is_available()  # it answers calls, it does not pretend to be a GPU
    torch.cuda.set_device(0)
    torch.cuda.synchronize()
    torch.cuda.synchronize(torch.device("cuda"))
    torch.cuda.empty_cache()


def probe_streams_and_events() -> None:
    import torch

    stream, other = torch.cuda.Stream(), torch.cuda.Stream(device="cuda", priority=-1)
    event = torch.cuda.Event(enable_timing=True)
    for each in (stream, torch.cuda.current_stream(), torch.cuda.default_stream()):
        each.wait_stream(other)
        each.synchronize()
        each.wait_event(event)
        assert each.record_event(event) is event
        assert each.record_event().query() and each.query()
    event.record(stream)
    event.record()
    event.wait(stream)
    event.synchronize()
    assert event.query()
    for context in (torch.cuda.stream(stream), torch.cuda.stream(None), other):
        with context:
            assert (torch.ones(2) + 1).tolist() == [2, 2]
    torch.ones(2).record_stream(stream)


def probe_random_state_setters_really_set() -> None:
    import torch

    for module in (torch.cuda, torch.cuda.random):
        state = module.get_rng_state()
        first = torch.rand(4)
        assert not torch.equal(torch.rand(4), first)
        module.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
        module.set_rng_state(state, device="cuda")
        assert torch.equal(torch.rand(4), first)
        assert torch.equal(module.get_rng_state("cuda"), torch.get_rng_state())


def probe_seeding_seeds_and_does_not_call_itself() -> None:
    import torch

    expected = torch.rand(4, generator=torch.Generator().manual_seed(5))
    seeders = (torch.cuda.manual_seed, torch.cuda.manual_seed_all, torch.cuda.random.manual_seed, torch.manual_seed)
    for seed in seeders:
        torch.rand(3)
        seed(5)
        assert torch.equal(torch.rand(4), expected)
    # torch.manual_seed seeds every device, and so calls torch.cuda.manual_seed_all.
    assert isinstance(torch.manual_seed(5), torch.Generator)


def probe_megatrons_random_tracker() -> None:
    import torch
    from megatron.core.tensor_parallel import random as megatron_random

    state = torch.get_rng_state()
    megatron_random._set_cuda_rng_state(state)
    first = torch.rand(4)
    megatron_random._set_cuda_rng_state(state, graph_safe=False)
    assert torch.equal(torch.rand(4), first)

    tracker = megatron_random.CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("mine", 7)
    torch.manual_seed(1)
    outside = torch.rand(4)
    torch.manual_seed(1)
    with tracker.fork("mine"):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(4), outside), "a fork leaves the state outside alone"
    assert torch.equal(inside, torch.rand(4, generator=torch.Generator().manual_seed(7)))
    with tracker.fork("mine"):
        assert not torch.equal(torch.rand(4), inside), "and goes on with its own"


def probe_fork_rng() -> None:
    import torch

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.random.fork_rng():
        torch.rand(10)
    assert torch.equal(torch.rand(2), expected)


def _factory_calls() -> dict[str, tuple]:
    import torch

    like = torch.ones(2, 3)
    return {
        **dict.fromkeys(("empty", "ones", "rand", "randn", "zeros"), (2, 3)),
        **dict.fromkeys(("empty_like", "ones_like", "rand_like", "randn_like", "zeros_like"), (like,)),
        **dict.fromkeys(("arange", "eye", "randperm"), (3,)),
        **dict.fromkeys(("as_tensor", "tensor"), ([1.0, 2.0],)),
        "empty_strided": ((2, 3), (3, 1)),
        "full": ((2,), 7),
        "full_like": (like, 7),
        "linspace": (0, 1, 5),
        "randint": (5, (2,)),
    }


def probe_factories() -> None:
    import torch

    for name, args in _factory_calls().items():
        factory = getattr(torch, name)
        for device in ("cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1), "cpu", None):
            assert factory(*args, device=device).device.type == "cpu", (name, device)
        assert factory(*args).device.type == "cpu"
        assert factory(*args, device="cuda", dtype=torch.float64).dtype == torch.float64, name
        if not name.startswith("as_"):
            assert factory(*args, device="meta").device.type == "meta", f"{name}: other devices stay"
        assert factory.__name__ == name
    for name in ("empty", "zeros", "ones", "full", "tensor", "arange", "rand"):
        assert not getattr(torch, name)(*_factory_calls()[name], pin_memory=True).is_pinned()
    same = [torch.randn(3, device="cuda", generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*same)
    assert torch.full((2,), 7, device="cuda").tolist() == [7, 7]


def probe_defaults_that_megatron_keeps() -> None:
    """Its functions keep the factories that they find when they are imported."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor

    empty = ShardedTensor.from_rank_offsets("key", torch.zeros(2, 3)).without_data()
    empty.init_data("cuda")  # what is received for another rank, while a checkpoint is read
    assert empty.data.shape == (2, 3) and empty.data.device.type == "cpu"


def probe_tensor_methods() -> None:
    import torch

    x = torch.arange(3.0)
    for device in ("cuda", "cuda:1", torch.device("cuda"), torch.device("cuda", 0)):
        assert x.to(device).device.type == x.to(device=device).device.type == "cpu"
        assert x.to(device, torch.float64).dtype == x.to(device=device, dtype=torch.float64).dtype == torch.float64
        assert x.to(device, non_blocking=True).tolist() == [0, 1, 2]
        for made in (
            x.new_empty(2, device=device),
            x.new_zeros(2, device=device),
            x.new_ones(2, device=device),
            x.new_full((2,), 4, device=device),
            x.new_tensor([1, 2], device=device),
            x.new_empty_strided((2,), (1,), device=device),
        ):
            assert made.device.type == "cpu" and made.shape == (2,) and made.dtype == x.dtype
    assert x.to(torch.int32).dtype == torch.int32
    assert x.to(torch.zeros(1, dtype=torch.float16)).dtype == torch.float16
    assert x.to("meta").device.type == "meta"
    assert x.cuda() is x.cuda(0, non_blocking=True) is x.pin_memory() is x
    assert not x.new_zeros(2, pin_memory=True).is_pinned()
    y = x.clone().requires_grad_()
    (2 * y.to("cuda").cuda()).sum().backward()
    assert y.grad.tolist() == [2, 2, 2]


def probe_modules() -> None:
    import torch

    module = torch.nn.Linear(2, 2, device="cuda")
    weight = module.weight
    assert module.cuda() is module.to("cuda") is module and module.weight is weight
    assert module.to(device=torch.device("cuda"), dtype=torch.bfloat16).weight.dtype == torch.bfloat16
    assert torch.nn.Parameter(torch.empty(2, device=torch.cuda.current_device())).device.type == "cpu"


def probe_tensor_type() -> None:
    import torch

    names = {
        torch.float32: "torch.cuda.FloatTensor",
        torch.float16: "torch.cuda.HalfTensor",
        torch.bfloat16: "torch.cuda.BFloat16Tensor",
        torch.float64: "torch.cuda.DoubleTensor",
        torch.int64: "torch.cuda.LongTensor",
    }
    for dtype, name in names.items():
        x = torch.ones(2, dtype=dtype)
        assert x.type() == name
        assert torch.ones(2).type(name).dtype == dtype
        assert torch.ones(2).type(name.replace("cuda.", "")).dtype == dtype
        assert torch.ones(2).type(dtype).dtype == dtype
        assert torch.ones(2).type(dtype=dtype, non_blocking=True).dtype == dtype
    assert torch.ones(2).type(torch.LongTensor).dtype == torch.int64


def probe_entering_again_changes_nothing() -> None:
    import torch

    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime, is_cpu_runtime

    before = torch.empty, torch.Tensor.to, torch.cuda.current_device
    assert enter_cpu_runtime() and enter_cpu_runtime(force=True) and is_cpu_runtime()
    assert before == (torch.empty, torch.Tensor.to, torch.cuda.current_device)


def probe_packages_that_need_a_gpu_are_not_found() -> None:
    """Where Transformer Engine is installed, megatron-core would take its optimizer."""
    from importlib.util import find_spec

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "transformer_engine.py").touch()
        sys.path.insert(0, folder)
        assert find_spec("transformer_engine") is None
        sys.path.remove(folder)


def probe_no_gpu_whatever_torch_asks() -> None:
    """DeepSpeed sets the variable when it is imported; torch then asks its device count."""
    import torch

    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    assert not torch.cuda.is_available()


def probe_freed_memory_is_kept() -> None:
    """The last probe. A large tensor gets the pages of a freed one, not new ones, which the kernel has to clear."""
    import platform
    import resource

    import torch

    from plt_megatron.runtime.cpu_runtime import keep_freed_memory

    def new_pages() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(50_000_000)  # 200 MB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    if platform.libc_ver()[0] != "glibc":
        return
    new_each_time = min(new_pages(), new_pages())
    keep_freed_memory()
    new_pages()
    assert 10 * new_pages() < new_each_time  # thousands, or a hundred huge ones


PROBES: dict[str, Callable[[], None]] = {
    name.removeprefix("probe_"): function for name, function in list(globals().items()) if name.startswith("probe_")
}


def run_probes() -> dict[str, str]:
    """Name -> traceback, empty where the probe passed."""
    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime

    assert enter_cpu_runtime()
    results = {}
    for name, probe in PROBES.items():
        try:
            probe()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results


def _fingerprint() -> dict[str, int]:
    """What stands behind every public name of torch, its tensors and torch.cuda."""
    import torch

    return {
        f"{owner.__name__}.{name}": id(getattr(owner, name))
        for owner in (torch, torch.Tensor, torch.cuda, torch.cuda.random)
        for name in vars(owner)
        if not name.startswith("_")
    }


def stand_for_a_machine_with_a_gpu() -> dict[str, Any]:
    import torch

    from plt_megatron.runtime.cpu_runtime import enter_cpu_runtime, is_cpu_runtime

    torch.cuda.is_available = lambda: True
    before, environment = _fingerprint(), dict(os.environ)
    return {
        "entered": enter_cpu_runtime(),
        "is_cpu_runtime": is_cpu_runtime(),
        "changed": [name for name, thing in _fingerprint().items() if before.get(name) != thing],
        "environment": environment == dict(os.environ),
        "imported": "megatron" in sys.modules,
        "entered by force": enter_cpu_runtime(force=True) and is_cpu_runtime(),
    }


def _in_a_process(function: str) -> Any:
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(ROOT)
    return json.loads(run([sys.executable, "-W", "ignore", __file__, function], env=env).stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    return _in_a_process("run_probes")


@pytest.mark.parametrize("probe", PROBES)
def test_on_the_cpu_runtime(results, probe):
    assert not results[probe], results[probe]


def test_every_factory_replaced_is_probed():
    from plt_megatron.runtime import cpu_runtime

    assert set(cpu_runtime._FACTORIES) == set(_factory_calls())


@pytest.mark.slow
def test_with_a_gpu_it_does_nothing():
    assert _in_a_process("stand_for_a_machine_with_a_gpu") == {
        "entered": False,
        "is_cpu_runtime": False,
        "changed": [],
        "environment": True,
        "imported": False,
        "entered by force": True,
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]]()))
