"""Dense peak rates from the vendor's data sheets, for MFU.

TFLOP/s of one device, without sparsity. `fp32` is the rate of true single precision; a program that allows
TF32 (`torch.backends.cuda.matmul.allow_tf32`) is compared with `tf32`. CPUs are not listed: their rate is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp32", "tf32", "fp8"]


@dataclass(frozen=True)
class DevicePeak:
    """Dense TFLOP/s by precision; None where the device has no such unit."""

    name: str
    bf16: float
    fp32: float
    tf32: float | None = None
    fp8: float | None = None


# The first match wins, so a variant comes before its family.
_PEAKS: tuple[tuple[str, DevicePeak], ...] = (
    (r"GB300", DevicePeak("GB300", bf16=2500, fp32=80, tf32=1250, fp8=5000)),
    (r"B300", DevicePeak("B300", bf16=2250, fp32=75, tf32=1125, fp8=4500)),
    (r"GB200", DevicePeak("GB200", bf16=2500, fp32=80, tf32=1250, fp8=5000)),
    (r"B200", DevicePeak("B200", bf16=2250, fp32=75, tf32=1125, fp8=4500)),
    (r"B100", DevicePeak("B100", bf16=1750, fp32=60, tf32=875, fp8=3500)),
    (r"H200 NVL", DevicePeak("H200 NVL", bf16=835.5, fp32=60, tf32=417.5, fp8=1670.5)),
    (r"GH200|H200", DevicePeak("H200 SXM", bf16=989.4, fp32=66.9, tf32=494.7, fp8=1978.9)),
    (r"H100 NVL", DevicePeak("H100 NVL", bf16=835.5, fp32=60, tf32=417.5, fp8=1670.5)),
    (r"H100 PCIe|H800 PCIe", DevicePeak("H100 PCIe", bf16=756, fp32=51, tf32=378, fp8=1513)),
    (r"H100|H800", DevicePeak("H100 SXM", bf16=989.4, fp32=66.9, tf32=494.7, fp8=1978.9)),
    (r"H20", DevicePeak("H20", bf16=148, fp32=44, tf32=74, fp8=296)),
    (r"A100|A800", DevicePeak("A100", bf16=312, fp32=19.5, tf32=156)),
    (r"A40", DevicePeak("A40", bf16=149.7, fp32=37.4, tf32=74.8)),
    (r"A30", DevicePeak("A30", bf16=165, fp32=10.3, tf32=82)),
    (r"A10", DevicePeak("A10", bf16=125, fp32=31.2, tf32=62.5)),
    (r"L40S", DevicePeak("L40S", bf16=362, fp32=91.6, tf32=183, fp8=733)),
    (r"L40", DevicePeak("L40", bf16=181, fp32=90.5, tf32=90.5, fp8=362)),
    (r"L4", DevicePeak("L4", bf16=121, fp32=30.3, tf32=60, fp8=242)),
)


def find_device(device_name: str) -> DevicePeak | None:
    """The data sheet for a name as `torch.cuda.get_device_name` gives it; None if it is not in the table."""
    if re.search(r"\bMIG\b", device_name):  # a slice of a device: no data sheet
        return None
    for pattern, peak in _PEAKS:
        if re.search(rf"(?<![A-Za-z0-9])(?:{pattern})(?![A-Za-z0-9])", device_name, re.IGNORECASE):
            return peak
    return None


def lookup(device_name: str, precision: Precision) -> float | None:
    """Dense TFLOP/s of one device; None if unknown (give logging.peak_tflops, or measure)."""
    device = find_device(device_name)
    return None if device is None else getattr(device, precision)
