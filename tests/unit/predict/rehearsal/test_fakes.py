from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from torch.profiler import profile
from plt_megatron.predict.rehearsal.fakes import fake_gpu
from plt_megatron.predict.rehearsal.observer import Observer

def look_up(device):  # as megatron-core's embedding does with deterministic_mode
    table = torch.zeros(1000, 64, device=device, requires_grad=True)
    table[torch.zeros(4, dtype=torch.long, device=device)].sum().backward()

with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as real:
    look_up("cpu")
print(-sum(event.cpu_memory_usage for event in real.events() if event.name == "[memory]") // 256_000)
observer = Observer()
with fake_gpu(observer):
    look_up("cuda")
print(sum(observer.peak.values()) // 256_000)
"""


def test_the_gradient_of_a_table_that_is_indexed_is_written_in_place():
    """Where Python dispatches the operations, autograd would make a second table."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2"]  # the table and its gradient
