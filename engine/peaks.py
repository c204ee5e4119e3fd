"""What a device could do at best: dense peaks from the vendors' datasheets, and the rate a real GEMM reaches here.

MFU needs a denominator, and a wrong one makes every number wrong by a constant, so a device counts as known only when
its name says exactly what it is; a slice of a GPU (MIG, vGPU) and anything else unlisted is held against its own
measured GEMM rate, and the record says so. All table values are dense: datasheets that print the rate with 2:4
structured sparsity are halved. Vendor pages are named beside each row.
"""

import platform
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch.nn import functional as F

PeakKind = Literal["datasheet", "measured", "configured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """The rate that utilisation is measured against, for one device in the compute format."""

    tflops: float
    """Multiply and add counted as two, in units of 1e12 a second."""
    kind: PeakKind
    """datasheet: the vendor's dense peak. measured: a GEMM on this device. configured: metrics.peak_tflops."""
    name: str
    """The device, as its driver or /proc/cpuinfo calls it."""


class _Row(NamedTuple):
    """Dense peaks in TFLOP/s of devices whose name matches `pattern`; None where the vendor gives no such number."""

    pattern: str
    half: float
    tf32: float | None
    fp32: float | None
    fp64: float | None
    bf16: bool = True


# The first row that matches wins: a variant stands above the family. fp32 and fp64 are the best the chip has for a
# matrix product in that format (matrix or tensor cores where they exist).
_PEAKS: tuple[_Row, ...] = (
    _Row(r"\bV100S\b", 130.0, None, 16.4, 8.2, bf16=False),  # NVIDIA V100 datasheet (V100S PCIe)
    _Row(r"\bV100-(SXM[23]|DGXS)", 125.0, None, 15.7, 7.8, bf16=False),  # NVIDIA V100 datasheet (SXM2)
    _Row(r"\bV100-PCIE", 112.0, None, 14.0, 7.0, bf16=False),  # NVIDIA V100 datasheet (PCIe)
    _Row(r"\bA[18]00\b(?!-SXM-64GB)", 312.0, 156.0, 19.5, 19.5),  # NVIDIA A100 datasheet; not Leonardo's die
    _Row(r"\bA40\b", 149.7, 74.8, 37.4, None),  # NVIDIA A40 datasheet
    _Row(r"\bA30\b", 165.0, 82.0, 10.3, 10.3),  # NVIDIA A30 datasheet
    _Row(r"\bA10G\b", 70.0, 35.0, None, None),  # NVIDIA A10G datasheet (AWS G5)
    _Row(r"\bA10\b", 125.0, 62.5, 31.2, None),  # NVIDIA A10 datasheet
    _Row(r"\bL4\b", 121.0, 60.0, 30.3, None),  # NVIDIA L4 datasheet, sparse 242
    _Row(r"\bL40S\b", 362.05, 183.0, 91.6, None),  # NVIDIA L40S datasheet
    _Row(r"\bL40\b", 181.05, 90.5, 90.5, None),  # NVIDIA L40 datasheet
    _Row(r"\bRTX 3090$", 71.0, 35.6, 35.6, None),  # NVIDIA GA102 whitepaper, FP32 accumulate
    _Row(r"\bRTX 4090$", 165.2, 82.6, 82.6, None),  # NVIDIA Ada whitepaper, FP32 accumulate
    _Row(r"\bRTX 5090$", 209.5, 104.8, 104.8, None),  # NVIDIA RTX Blackwell whitepaper, FP32 accumulate
    _Row(r"\bGH200\b", 989.5, 494.5, 67.0, 67.0),  # NVIDIA GH200 datasheet, sparse 1,979
    _Row(r"\bH[12]00 NVL\b", 835.5, 417.5, 60.0, 60.0),  # NVIDIA H100 NVL and H200 NVL datasheets, sparse 1,671
    _Row(r"\bH100 PCIe\b", 756.5, 378.0, 51.0, 51.0),  # NVIDIA H100 PCIe datasheet, sparse 1,513
    _Row(r"\bH100\b(?! 64GB)", 989.5, 494.5, 67.0, 67.0),  # NVIDIA H100 SXM datasheet; not MareNostrum's
    _Row(r"\bH800$", 989.5, 494.5, 67.0, None),  # NVIDIA H800 SXM datasheet
    _Row(r"\bH200\b", 989.5, 494.5, 67.0, 67.0),  # NVIDIA H200 SXM datasheet, sparse 1,979
    _Row(r"\bH20\b", 148.0, 74.0, 44.0, None),  # NVIDIA H20 datasheet
    _Row(r"\bGB200\b", 2500.0, 1250.0, 80.0, 40.0),  # NVIDIA GB200 NVL72 datasheet, sparse 10,000 over 2
    _Row(r"\bB200\b", 2250.0, 1125.0, 75.0, 37.0),  # NVIDIA HGX B200 specifications, sparse 36,000 over 8
    _Row(r"\bGB300\b", 2500.0, 1250.0, None, None),  # NVIDIA GB300 NVL72 specifications, sparse 360,000 over 72
    _Row(r"\bB300\b", 2250.0, 1125.0, 75.0, 1.25),  # NVIDIA HGX B300 specifications, sparse 36,000 over 8
    _Row(r"\bMI210\b", 181.0, None, 45.3, 45.3),  # AMD Instinct MI210 datasheet
    _Row(r"\bMI250\b", 181.05, None, 45.25, 45.25),  # AMD Instinct MI250 datasheet, halved: a device is one GCD
    _Row(r"\bMI250X\b", 191.5, None, 47.85, 47.85),  # AMD Instinct MI250X datasheet, halved: a device is one GCD
    _Row(r"\bMI300A\b", 980.6, 490.3, 122.6, 122.6),  # AMD Instinct MI300A datasheet
    _Row(r"\bMI300X\b", 1307.4, 653.7, 163.4, 163.4),  # AMD Instinct MI300X datasheet
    _Row(r"\bMI325X\b", 1307.4, 653.7, 163.4, 163.4),  # AMD Instinct MI325X datasheet
    _Row(r"\bMI350X\b", 2306.9, None, 144.2, 72.1),  # AMD Instinct MI350X datasheet
    _Row(r"\bMI355X\b", 2516.6, None, 157.3, 78.6),  # AMD Instinct MI355X datasheet
)

# "A100-SXM4-80GB MIG 1g.10gb" is a slice, "A100-40C" and "A10-24Q" are vGPU profiles: none has the whole chip's peak.
_PART_OF_A_GPU = re.compile(r"\bMIG\b|-\d+[ABCQ]\b", re.IGNORECASE)

_MIN_REPEATS = 3
_MAX_REPEATS = 9


def datasheet_tflops(device_name: str, dtype: torch.dtype, *, tf32: bool = False) -> float | None:
    """Look up a device's dense peak in `dtype` by its driver's name; None where no vendor number is known.

    `tf32` says that fp32 products may use TF32 tensor cores; a chip without TF32 then has no listed fp32 peak.
    """
    if _PART_OF_A_GPU.search(device_name):
        return None
    row = next((row for row in _PEAKS if re.search(row.pattern, device_name, re.IGNORECASE)), None)
    if row is None:
        return None
    if dtype == torch.float32:
        return row.tf32 if tf32 and row.tf32 is not None else row.fp32
    return {
        torch.bfloat16: row.half if row.bf16 else None,
        torch.float16: row.half,
        torch.float64: row.fp64,
    }.get(dtype)


def device_name(device: torch.device) -> str:
    """Name a device as its driver does; a CPU as /proc/cpuinfo does."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(errors="replace"), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def choose_peak(configured_tflops: float, device: torch.device, dtype: torch.dtype, gemm_tflops: float) -> Peak:
    """Choose what MFU is measured against: metrics.peak_tflops, else the datasheet, else the measured GEMM rate."""
    name = device_name(device)
    if configured_tflops > 0:
        return Peak(tflops=configured_tflops, kind="configured", name=name)
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    known = datasheet_tflops(name, dtype, tf32=tf32) if device.type == "cuda" else None
    if known is not None:
        return Peak(tflops=known, kind="datasheet", name=name)
    return Peak(tflops=gemm_tflops, kind="measured", name=name)


def describe_peak(peak: Peak, gemm_tflops: float) -> str:
    """Say in one line what utilisation is measured against."""
    if peak.kind == "measured":
        return (
            f"{peak.name}: no vendor peak listed; MFU is against the GEMM rate measured here, {gemm_tflops:.4g} TFLOP/s"
        )
    source = "datasheet" if peak.kind == "datasheet" else "metrics.peak_tflops"
    return (
        f"{peak.name}: MFU against {peak.tflops:.5g} TFLOP/s ({source}); a GEMM reaches {gemm_tflops:.4g} TFLOP/s here"
    )


@torch.no_grad()
def measured_gemm_tflops(device: torch.device, dtype: torch.dtype, threads: int = 0, *, budget_s: float) -> float:
    """Measure the rate of one large x @ w.T on this device, in TFLOP/s; takes about `budget_s`.

    The product is 8192^3 on a GPU and 2048^3 on a CPU, smaller where that would outlast the budget. `threads` is the
    rank's share of the CPU (0: as torch has it). Ranks that share a machine must measure at the same time, after a
    barrier: what one rank reaches while the others idle is not what it has in a step.
    """
    before = torch.get_num_threads()
    if threads > 0:
        torch.set_num_threads(threads)
    try:
        size = 8192 if device.type == "cuda" else 2048
        # Reading one product's time at an eighth of the side costs 1/512 of the work and decides what fits.
        probe = size // 8
        expected_s = min(_gemm_seconds(probe, device, dtype, repeats=3, budget_s=budget_s / 8)) * 512
        while expected_s * (_MIN_REPEATS + 1) > budget_s and size > probe:
            size, expected_s = size // 2, expected_s / 8
        seconds = _gemm_seconds(size, device, dtype, repeats=_MAX_REPEATS, budget_s=budget_s)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / statistics.median(seconds) / 1e12


def _gemm_seconds(size: int, device: torch.device, dtype: torch.dtype, *, repeats: int, budget_s: float) -> list[float]:
    """Time size^3 products one by one, the first left out as warm-up; at least one, more while the budget lasts."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(size, size, device=device, dtype=dtype).normal_(generator=generator)
    w = torch.empty(size, size, device=device, dtype=dtype).normal_(generator=generator)
    seconds: list[float] = []
    started = time.perf_counter()
    for repeat in range(repeats + 1):
        begin = time.perf_counter()
        F.linear(x, w)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took = time.perf_counter() - begin
        if repeat > 0:
            seconds.append(took)
        if seconds and time.perf_counter() - started + took > budget_s:
            break
    return seconds
