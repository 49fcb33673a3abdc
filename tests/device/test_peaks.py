"""Device peaks are found by the names torch gives devices."""

from __future__ import annotations

import pytest

from megatron_implicit.device.peaks import DEVICE_PEAKS, device_peak, peak_flops


@pytest.mark.parametrize(
    "name, entry",
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("AMD Instinct MI300X", "MI300X"),
    ],
)
def test_the_most_exact_entry_is_found(name: str, entry: str) -> None:
    assert device_peak(name).name == entry


def test_an_unknown_device_has_no_peak() -> None:
    assert device_peak("CPU (2 threads)") is None
    assert peak_flops("CPU (2 threads)", "fp32") is None
    assert peak_flops("Tesla V100-SXM2-32GB", "bf16") is None


def test_no_entry_hides_behind_one_before_it() -> None:
    assert [device_peak(peak.name) for peak in DEVICE_PEAKS] == list(DEVICE_PEAKS)
