"""Device names as drivers report them, to the right data sheet."""

from __future__ import annotations

import pytest

from plt_megatron.predict.cards import find_device, lookup


@pytest.mark.parametrize(
    ("device_name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("A100-SXM4-40GB", 312),
        ("NVIDIA A800-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD EPYC", None),
        ("", None),
    ],
)
def test_bf16(device_name, bf16):
    assert lookup(device_name, "bf16") == bf16


def test_precisions():
    name = "NVIDIA H100 80GB HBM3"
    assert (lookup(name, "fp32"), lookup(name, "tf32"), lookup(name, "fp8")) == (66.9, 494.7, 1978.9)
    assert lookup("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_figures_are_dense():
    """Each step down in precision doubles the dense rate; a sparse figure would double it again."""
    for name in ("H100", "H200", "B200", "H100 PCIe", "H20", "L40S"):
        peak = find_device(name)
        assert peak is not None and peak.tf32 and peak.fp8
        assert peak.bf16 / peak.tf32 == pytest.approx(2, rel=0.02)
        assert peak.fp8 / peak.bf16 == pytest.approx(2, rel=0.02)
