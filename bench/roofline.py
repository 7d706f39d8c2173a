"""The roofline: the least time of a call by the data sheet of its device.

A call cannot take less than its floating point operations at the peak of the tensor cores, nor
less than the bytes that it must move at the peak of the memory; `roofline` of a row is that time
over the measured one. Both peaks are those that the vendor promises at full clocks. Under load a
GPU is slower than that: an H200 at its power limit runs `wgmma` at 70 to 80 % of its peak.
Source: NVIDIA H100 and H200 Tensor Core GPU data sheets (dense bfloat16, SXM).
"""

from __future__ import annotations

from typing import NamedTuple


class Peak(NamedTuple):
    """Operations a second of 16-bit products, and bytes a second of the memory."""

    flops: float
    bytes: float


PEAKS = {"NVIDIA H100 80GB HBM3": Peak(989.4e12, 3.35e12), "NVIDIA H200": Peak(989.4e12, 4.8e12)}


def least_ms(device: str, flops: float, nbytes: float) -> float | None:
    """The least milliseconds of a call; None for a device whose peaks are not known here."""
    peak = PEAKS.get(device)
    return peak and 1e3 * max(flops / peak.flops, nbytes / peak.bytes)


def share(device: str, flops: float, nbytes: float, ms: float) -> float | None:
    """The least time of a call over its time, from 0 to 1."""
    least = least_ms(device, flops, nbytes)
    return least and least / ms
