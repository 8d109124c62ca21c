"""Cards and data sheets: figures that must be consistent with one another, names, and device names as drivers report
them."""

from __future__ import annotations

import pytest

from plt_megatron.errors import UserError
from plt_megatron.predict.cards import card_names, find_device, find_gpu_spec, lookup


def test_public_figures():
    h100, a100, b200 = (find_gpu_spec(name) for name in ("h100", "a100", "b200"))
    assert h100.flops_per_second("bf16") == 989.4e12
    assert h100.memory_bandwidth == 3.35e12 and h100.link_bandwidth == 450e9
    assert a100.flops_per_second("bf16") == 312e12 and a100.memory_bandwidth == 2.039e12
    assert b200.memory_bandwidth > find_gpu_spec("h200").memory_bandwidth > h100.memory_bandwidth


@pytest.mark.parametrize("name", [name for name in card_names() if name != "cpu"])
def test_memory_is_what_a_driver_reports(name):
    """A little under the nominal size, which counts in powers of ten or two as the vendor likes."""
    nominal = {
        "h100": 80, "h100-pcie": 80, "h200": 141, "a100": 80, "a100-40gb": 40, "b200": 180, "l40s": 48, "l4": 24,
    }  # fmt: skip
    card = find_gpu_spec(name)
    assert 0.9 * nominal[name] * 2**30 < card.memory_bytes < nominal[name] * 1.1e9
    assert card.memory_bandwidth > 4 * card.link_bandwidth > card.network_bandwidth
    assert 0 < card.attention_efficiency <= card.matmul_efficiency < 1


def test_cards_with_fp8_rates_are_those_whose_generation_has_fp8():
    for name in card_names():
        card = find_gpu_spec(name)
        assert (card.peak.fp8 is not None) == (card.capability is not None and card.capability >= (8, 9)), name


def test_rates_are_those_that_mfu_is_measured_against():
    assert find_gpu_spec("h100").peak.bf16 == lookup("NVIDIA H100 80GB HBM3", "bf16")
    assert find_gpu_spec("l40s").peak.bf16 == lookup("NVIDIA L40S", "bf16")


def test_a_cpu_is_a_process_share_of_this_machine():
    one, four = find_gpu_spec("cpu"), find_gpu_spec("cpu", 4)
    assert one.name == "cpu" and one.memory_bytes == pytest.approx(4 * four.memory_bytes, rel=1e-6)


def test_an_unknown_card_is_refused_with_those_known():
    with pytest.raises(UserError, match="h101: .* known: h100, .*cpu"):
        find_gpu_spec("h101")


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
def test_a_device_name_leads_to_its_data_sheet(device_name, bf16):
    assert lookup(device_name, "bf16") == bf16


def test_rates_by_precision():
    name = "NVIDIA H100 80GB HBM3"
    assert (lookup(name, "fp32"), lookup(name, "fp8")) == (66.9, 1978.9)
    assert lookup("NVIDIA A100-SXM4-80GB", "fp8") is None


def test_figures_are_dense():
    """FP8 doubles the dense rate; a sparse figure would double it again."""
    for name in ("H100", "H200", "B200", "H100 PCIe", "H20", "L40S"):
        peak = find_device(name)
        assert peak is not None and peak.fp8
        assert peak.fp8 / peak.bf16 == pytest.approx(2, rel=0.02)
