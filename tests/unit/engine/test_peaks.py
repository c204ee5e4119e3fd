"""The table of peaks by real device names, and the measured GEMM rate."""

import time

import pytest
import torch

from engine.peaks import Peak, choose_peak, datasheet_tflops, describe_peak, device_name, measured_gemm_tflops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100-PCIE-40GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("A100-SXM4-40GB", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA A30", 165.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40", 181.05),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", 989.5),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H20", 148.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA GB300", 2500.0),
        ("AMD Instinct MI210", 181.0),
        ("AMD Instinct MI250", 181.05),
        ("AMD Instinct MI250X", 191.5),
        ("AMD Instinct MI300A", 980.6),
        ("AMD Instinct MI300X", 1307.4),
        ("AMD Instinct MI325X", 1307.4),
        ("AMD Instinct MI355X", 2516.6),
    ],
)
def test_bf16_peak_of_a_device_name(name: str, tflops: float) -> None:
    assert datasheet_tflops(name, torch.bfloat16) == tflops


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC 9654 96-Core Processor",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA A100-SXM4-80GB MIG 1g.10gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
        "GRID A100-40C",
        "NVIDIA A10-24Q",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA H800 PCIe",
        "NVIDIA RTX A1000",
        "Quadro RTX 8000",
        "",
    ],
)
def test_no_peak_for_unknown_devices_and_parts_of_a_gpu(name: str) -> None:
    assert datasheet_tflops(name, torch.bfloat16) is None


def test_fp32_uses_tf32_only_where_allowed_and_present() -> None:
    assert datasheet_tflops("NVIDIA A100-SXM4-80GB", torch.float32) == 19.5
    assert datasheet_tflops("NVIDIA A100-SXM4-80GB", torch.float32, tf32=True) == 156.0
    assert datasheet_tflops("AMD Instinct MI250X", torch.float32, tf32=True) == 47.85


def test_fp64_and_formats_without_a_number() -> None:
    assert datasheet_tflops("NVIDIA H200", torch.float64) == 67.0
    assert datasheet_tflops("NVIDIA L4", torch.float64) is None
    assert datasheet_tflops("NVIDIA H200", torch.int8) is None


def test_v100_has_tensor_cores_for_fp16_only() -> None:
    assert datasheet_tflops("Tesla V100-SXM2-32GB", torch.float16) == 125.0
    assert datasheet_tflops("Tesla V100-PCIE-16GB", torch.float16) == 112.0
    assert datasheet_tflops("Tesla V100S-PCIE-32GB", torch.float16) == 130.0
    assert datasheet_tflops("Tesla V100-SXM2-32GB", torch.bfloat16) is None


def test_choosing_a_peak_on_a_cpu() -> None:
    assert choose_peak(0.0, CPU, torch.bfloat16, 1.7) == Peak(tflops=1.7, kind="measured", name=device_name(CPU))
    assert choose_peak(5.0, CPU, torch.bfloat16, 1.7) == Peak(tflops=5.0, kind="configured", name=device_name(CPU))
    assert device_name(CPU)


@pytest.mark.parametrize(
    ("peak", "text"),
    [
        (
            Peak(tflops=989.5, kind="datasheet", name="NVIDIA H200"),
            "NVIDIA H200: MFU against 989.5 TFLOP/s (datasheet); a GEMM reaches 790.4 TFLOP/s here",
        ),
        (
            Peak(tflops=800.0, kind="configured", name="NVIDIA H200"),
            "NVIDIA H200: MFU against 800 TFLOP/s (metrics.peak_tflops); a GEMM reaches 790.4 TFLOP/s here",
        ),
        (
            Peak(tflops=790.4, kind="measured", name="Some GPU"),
            "Some GPU: no vendor peak listed; MFU is against the GEMM rate measured here, 790.4 TFLOP/s",
        ),
    ],
)
def test_a_peak_is_described_with_its_source(peak: Peak, text: str) -> None:
    assert describe_peak(peak, 790.4) == text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_measures_a_plausible_rate_within_its_budget_and_restores_threads(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    began = time.perf_counter()
    tflops = measured_gemm_tflops(CPU, dtype, threads=1, budget_s=1.0)
    took_s = time.perf_counter() - began
    assert torch.get_num_threads() == before
    assert took_s < 5, "the budget is 1.5 s on a quiet machine"
    # One core of any CPU since 2013 does more than 0.5 GFLOP/s, and none does 20 TFLOP/s.
    assert 0.0005 < tflops < 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_reaches_no_more_than_its_datasheet_says() -> None:
    device = torch.device("cuda")
    gemm_tflops = measured_gemm_tflops(device, torch.bfloat16, budget_s=1.0)
    peak = choose_peak(0.0, device, torch.bfloat16, gemm_tflops)
    assert peak.kind == "measured" or 0.4 * peak.tflops < gemm_tflops <= peak.tflops
