"""The device that a row's GPU is: by the names of the catalogue, and what follows from which device it is.

A name of a table says more than the catalogue's ("H100-96GB (HBM2e 2.4TB/s, 500W)"), so words are left out at its end
until one device is meant; but never a word that names another device of the family. Refuses to know stacks and layouts.
"""

from __future__ import annotations

import functools

from shardwise.describe.catalogue import Entry, find_device
from shardwise.describe.cluster import Device
from shardwise.errors import ConfigError

__all__ = ["device_of", "dtype_of", "entry_of", "has_flash_attention"]

_OTHERS = frozenset({"pcie", "nvl", "cnx", "ti", "super", "max", "ada", "mobile"})  # words for another device
_MACHINES = ("dgx", "hgx")


@functools.cache
def entry_of(gpu: str) -> Entry | None:
    """Of the catalogue; None where it has no such device."""
    words = gpu.replace("(", " ").replace("-", " ").replace("_", " ").split()
    while words and words[0].lower() in _MACHINES:
        words = words[1:]
    for count in range(len(words), 0, -1):
        if _OTHERS & {word.lower() for word in words[count:]}:
            return None
        try:
            return find_device(" ".join(words[:count]))
        except ConfigError:
            continue
    return None


def device_of(gpu: str) -> Device | None:
    """Of the catalogue; None where it has no such device."""
    entry = entry_of(gpu)
    return None if entry is None else entry.device


def dtype_of(precision: str, gpu: str) -> str:
    """What products compute in: as the row says; of two that it names, or none, what the device has a rate for."""
    text, device = precision.lower(), device_of(gpu)
    both = ("bf16" in text, "fp16" in text.replace("bf16", ""))
    if both == (False, True):
        return "float16"
    if not any(both) and "tf32" in text:
        return "tf32"
    if not any(both) and text.startswith("fp32"):
        return "float32"
    if both != (True, False) and device is not None and "bfloat16" not in device.flops_per_s:
        return "float16"
    return "bfloat16"


def has_flash_attention(gpu: str) -> bool:
    """Whether attention's fused kernels run on it: FlashAttention 2 asks for Ampere or later, whose matrix units are
    the first with bfloat16 (of a device that nobody knows: yes)."""
    device = device_of(gpu)
    return device is None or "bfloat16" in device.flops_per_s
