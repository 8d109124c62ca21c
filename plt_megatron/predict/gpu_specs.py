"""Accelerators by short name: memory, rates and links from the vendors' data sheets, and what of them is achieved.

Rates of arithmetic are those of `peaks`. Links are per device and direction. Achievable shares are ours, not measured
on a GPU yet: put your own there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from plt_megatron.errors import UserError
from plt_megatron.predict.peaks import DevicePeak, find_device

GB = 1_000_000_000
GIB = 1 << 30


@dataclass(frozen=True)
class GPUSpec:
    """One accelerator.

    Attributes:
        peak: dense TFLOP/s.
        memory_bytes: what a process can allocate in total.
        memory_bandwidth: bytes/s of its own memory.
        link_bandwidth: bytes/s to another device of the same node, one direction.
        network_bandwidth: bytes/s to another node, one direction; what such nodes are commonly built with.
        capability: CUDA compute capability, on which FP8 kernels depend; None: no CUDA device.
        matmul_efficiency: share of the dense peak that large matrix products reach in training: 60 to 75 % on an H100,
            whose clocks under load do not sustain the peak.
        attention_efficiency: share of it that fused causal attention reaches, forward and backward together, not
            counting the masked half.
        memory_efficiency: share of the memory bandwidth that streaming kernels reach.
        link_efficiency: share of a link's bandwidth that collectives reach.
    """

    name: str
    peak: DevicePeak
    memory_bytes: int
    memory_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float
    capability: tuple[int, int] | None = None
    matmul_efficiency: float = 0.60
    attention_efficiency: float = 0.40
    memory_efficiency: float = 0.80
    link_efficiency: float = 0.75

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"

    def flops_per_second(self, precision: str, fp8: bool = False) -> float:
        """Dense peak in FLOP/s; fp32 is true single precision, as torch computes it by default.

        `fp8`: FP8's instead. Raises `UserError` where the card has none.
        """
        if not fp8:
            return getattr(self.peak, precision) * 1e12
        if self.peak.fp8 is None:
            raise UserError(f"gpu {self.name} has no FP8: set training.fp8=null or name another --gpu")
        return self.peak.fp8 * 1e12


def _card(
    name: str,
    device: str,
    memory_gib: float,
    bandwidth_gb: float,
    link_gb: float,
    network_gb: float,
    capability: tuple[int, int],
) -> GPUSpec:
    peak = find_device(device)
    assert peak is not None, device
    return GPUSpec(name, peak, int(memory_gib * GIB), bandwidth_gb * GB, link_gb * GB, network_gb * GB, capability)


# Memory: what the driver reports of the nominal size. Links: half of the data sheet's bidirectional figure.
# Network: 400 Gbit/s (H100, H200, B200 reference systems) or 200 Gbit/s (A100's, L40S's) for each device.
_CARDS = {
    card.name: card
    for card in (
        # NVIDIA H100 Tensor Core GPU data sheet: SXM 80 GB HBM3 at 3.35 TB/s, NVLink 900 GB/s; PCIe: 2 TB/s, PCIe 5.
        _card("h100", "H100", 79.1, 3350, 450, 50, (9, 0)),
        _card("h100-pcie", "H100 PCIe", 79.1, 2000, 64, 50, (9, 0)),
        # NVIDIA H200 data sheet: 141 GB HBM3e at 4.8 TB/s, NVLink 900 GB/s.
        _card("h200", "H200", 139.8, 4800, 450, 50, (9, 0)),
        # NVIDIA A100 data sheet: SXM 80 GB HBM2e at 2,039 GB/s, 40 GB at 1,555 GB/s, NVLink 600 GB/s.
        _card("a100", "A100", 79.1, 2039, 300, 25, (8, 0)),
        _card("a100-40gb", "A100", 39.4, 1555, 300, 25, (8, 0)),
        # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s over 8 devices, NVLink 14.4 TB/s over 8.
        _card("b200", "B200", 178.3, 8000, 900, 50, (10, 0)),
        # NVIDIA L40S data sheet: 48 GB GDDR6 with ECC at 864 GB/s, no NVLink, PCIe 4 x16 (64 GB/s both ways).
        _card("l40s", "L40S", 44.4, 864, 32, 25, (8, 9)),
        # NVIDIA L4 data sheet: 24 GB at 300 GB/s, PCIe 4 x16.
        _card("l4", "L4", 22.0, 300, 32, 12.5, (8, 9)),
    )
}


def card_names() -> list[str]:
    """Names that `find_gpu_spec` knows."""
    return [*_CARDS, "cpu"]


def find_gpu_spec(name: str, processes_per_node: int = 1) -> GPUSpec:
    """The card of this short name.

    `cpu` is one process's share of this machine: its memory by `processes_per_node`, and one core's nominal rate
    (50 GFLOP/s: AVX2 on a shared server core; the real rate is measured when a run starts). Raises `UserError` for
    other names.
    """
    if name == "cpu":
        return _cpu(processes_per_node)
    if name not in _CARDS:
        raise UserError(f"gpu {name}: no such card in the table; known: {', '.join(card_names())}")
    return _CARDS[name]


def _cpu(processes_per_node: int) -> GPUSpec:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = DevicePeak("CPU core", bf16=0.05, fp32=0.05)
    return GPUSpec("cpu", peak, memory // max(1, processes_per_node), 10 * GB, 2 * GB, 1 * GB, attention_efficiency=0.3)
