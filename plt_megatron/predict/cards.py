"""Accelerators from the vendors' data sheets: dense peak rates by device name, and cards by short name, with memory,
links and achievable shares.

Rates are TFLOP/s of one device, without sparsity. `fp32` is the rate of true single precision, not of TF32, which
training does not use. CPUs are not listed: their rate is measured. Links are per device and direction. Achievable
shares are our assumptions, not yet measured on a GPU: replace them with your own measurements.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from plt_megatron.errors import UserError

GB = 1_000_000_000
GIB = 1 << 30
Precision = Literal["bf16", "fp32", "fp8"]


@dataclass(frozen=True)
class DevicePeak:
    """Dense TFLOP/s by precision; None where the device has no such unit."""

    bf16: float
    fp32: float
    fp8: float | None = None


# The first match wins, so a variant comes before its family.
_PEAKS: tuple[tuple[str, DevicePeak], ...] = (
    (r"GB300|GB200", DevicePeak(bf16=2500, fp32=80, fp8=5000)),
    (r"B300|B200", DevicePeak(bf16=2250, fp32=75, fp8=4500)),
    (r"B100", DevicePeak(bf16=1750, fp32=60, fp8=3500)),
    (r"H200 NVL|H100 NVL", DevicePeak(bf16=835.5, fp32=60, fp8=1670.5)),
    (r"H100 PCIe|H800 PCIe", DevicePeak(bf16=756, fp32=51, fp8=1513)),
    (r"GH200|H200|H100|H800", DevicePeak(bf16=989.4, fp32=66.9, fp8=1978.9)),
    (r"H20", DevicePeak(bf16=148, fp32=44, fp8=296)),
    (r"A100|A800", DevicePeak(bf16=312, fp32=19.5)),
    (r"A40", DevicePeak(bf16=149.7, fp32=37.4)),
    (r"A30", DevicePeak(bf16=165, fp32=10.3)),
    (r"A10", DevicePeak(bf16=125, fp32=31.2)),
    (r"L40S", DevicePeak(bf16=362, fp32=91.6, fp8=733)),
    (r"L40", DevicePeak(bf16=181, fp32=90.5, fp8=362)),
    (r"L4", DevicePeak(bf16=121, fp32=30.3, fp8=242)),
)


def find_device(device_name: str) -> DevicePeak | None:
    """Return the peaks for a name as `torch.cuda.get_device_name` reports it; None if it is not in the table."""
    if re.search(r"\bMIG\b", device_name):  # a slice of a device: no data sheet
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return peak
    return None


def lookup(device_name: str, precision: Precision) -> float | None:
    """Return the dense TFLOP/s of one device; None if unknown (set logging.peak_tflops, or measure it)."""
    device = find_device(device_name)
    return None if device is None else getattr(device, precision)


@dataclass(frozen=True)
class GPUSpec:
    """One accelerator.

    Attributes:
        peak: dense TFLOP/s.
        memory_bytes: total memory that a process can allocate.
        memory_bandwidth: bytes/s of the device's memory.
        link_bandwidth: bytes/s to another device in the node, one direction.
        network_bandwidth: bytes/s to another node, one direction, as commonly built for this card.
        capability: CUDA compute capability, which determines the FP8 kernels; None: not a CUDA device.
        matmul_efficiency: share of the dense peak that large matrix products reach in training: 60 to 75 % on an H100,
            whose clocks under load do not sustain the peak.
        attention_efficiency: share of the dense peak that fused causal attention reaches, forward and backward
            together, not counting the masked half.
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

    def flops_per_second(self, precision: str, fp8: bool = False) -> float:
        """Return the dense peak in FLOP/s; fp32 is true single precision, torch's default.

        `fp8`: return the FP8 peak instead. Raises `UserError` if the card has no FP8.
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


# Memory: usable part of the nominal size, as the driver reports it. Links: half of the data sheet's bidirectional rate.
# Network: 400 Gbit/s (H100, H200, B200 reference systems) or 200 Gbit/s (A100, L40S) per device.
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
    """Return the names that `find_gpu_spec` knows."""
    return [*_CARDS, "cpu"]


def find_gpu_spec(name: str, processes_per_node: int = 1) -> GPUSpec:
    """Return the card with this short name.

    `cpu` is one process's share of this machine: its memory divided by `processes_per_node`, and one core's nominal
    rate (50 GFLOP/s: AVX2 on a shared server core; the real rate is measured when a run starts). Raises `UserError` for
    unknown names.
    """
    if name == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(1, processes_per_node)
        peak = DevicePeak(bf16=0.05, fp32=0.05)
        return GPUSpec("cpu", peak, memory, 10 * GB, 2 * GB, 1 * GB, attention_efficiency=0.3)
    if name not in _CARDS:
        raise UserError(f"gpu {name}: no such card in the table; known: {', '.join(card_names())}")
    return _CARDS[name]
