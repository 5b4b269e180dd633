"""Seconds of kernels: what a device takes for products, attentions and passes over memory, by their shapes.

    products      tiles are dealt out to the processors in waves; a tile costs its depth and a start; a few tile shapes
                  are tried as a library would try them (Yan et al. 2020, arXiv:2003.05622, section 4; NVIDIA, Matrix
                  Multiplication Background, "Tile Quantization", "Wave Quantization")
    memory        bytes at the bandwidth that is reached (a roofline, Williams et al. 2009)
    all           never faster than their bytes, nor than the floor of one launch

Arrays in, arrays out: kernels of one unit or of thousands of rows at once. Refuses to know stages and exchanges.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shardwise.describe.cluster import Device
from shardwise.describe.kernels import Kernel, KernelKind

__all__ = ["KINDS_OF_KERNELS", "FloatArray", "KernelTable", "kernel_seconds"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

# (rows, columns, share of the processor's rate that a tile of that shape reaches): a tile of r by c reads r + c and
# computes r * c, so that small ones wait for their operands.
TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 0.94), (256, 64, 0.86), (128, 64, 0.8), (64, 64, 0.65))
SPLITS = (1, 2, 4)  # of the depth, where there are few tiles ("split-K")
START_DEPTH = 96  # of a tile: as long as so many steps of its depth pass before the first product and behind the last
ATTENTION_WIDTH = 64
ALIGNED_BYTES = 16  # matrix units load rows whose lengths are multiples of it (cuBLAS: "16 bytes" for tensor cores)
KINDS_OF_KERNELS = {kind: index for index, kind in enumerate(KernelKind)}
_BYTES = {"float32": 4, "tfloat32": 4, "float64": 8, "fp8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelTable:
    """Kernels by column; `dtypes[dtype[i]]` is the dtype of kernel i. Shapes are padded with ones to five dims."""

    kind: IntArray
    dtype: IntArray
    dtypes: tuple[str, ...]
    flops: FloatArray
    nbytes: FloatArray
    shape: FloatArray  # (kernels, 5)

    @classmethod
    def of(cls, kernels: Sequence[Kernel]) -> KernelTable:
        """The table of these kernels, in their order; counts are left to the reader."""
        dtypes = tuple(sorted({kernel.dtype for kernel in kernels}))
        place = {dtype: index for index, dtype in enumerate(dtypes)}
        shape = np.ones((len(kernels), 5))
        for index, kernel in enumerate(kernels):
            shape[index, : len(kernel.shape)] = kernel.shape
        return cls(
            kind=np.array([KINDS_OF_KERNELS[kernel.kind] for kernel in kernels], dtype=np.int64),
            dtype=np.array([place[kernel.dtype] for kernel in kernels], dtype=np.int64),
            dtypes=dtypes,
            flops=np.array([kernel.flops for kernel in kernels], dtype=np.float64),
            nbytes=np.array([kernel.nbytes for kernel in kernels], dtype=np.float64),
            shape=shape,
        )

    def __len__(self) -> int:
        return len(self.kind)


def kernel_seconds(table: KernelTable, device: Device) -> FloatArray:
    """[i]: the seconds that one kernel i takes on the device, alone. Shape (kernels,)."""
    reached = device.efficiency
    passes = (table.nbytes + reached.memory_half_bytes) / (device.bytes_per_s * reached.memory)
    seconds = np.where(table.nbytes > 0, passes, 0.0)
    if not len(table):
        return seconds
    rates = np.array([device.rate(dtype) for dtype in table.dtypes])[table.dtype]
    products = table.kind == KINDS_OF_KERNELS[KernelKind.MATMUL]
    if products.any():
        found = _product_seconds(table, products, rates[products], device)
        seconds[products] = np.maximum(seconds[products], found)
    attentions = table.kind == KINDS_OF_KERNELS[KernelKind.ATTENTION]
    if attentions.any():
        found = _attention_seconds(table, attentions, rates[attentions], device)
        seconds[attentions] = np.maximum(seconds[attentions], found)
    return np.where(
        table.kind == KINDS_OF_KERNELS[KernelKind.FUNCTION], reached.dealt_s, np.maximum(seconds, reached.launch_s)
    )


def _product_seconds(
    table: KernelTable, chosen: npt.NDArray[np.bool_], rates: FloatArray, device: Device
) -> FloatArray:
    """The best of the tile shapes; where rows are no multiple of 16 bytes, at the rate of float32 without them."""
    batch, m, n, k = table.shape[chosen, :4].T
    size = np.array([_BYTES.get(dtype, 2) for dtype in table.dtypes])[table.dtype[chosen]]
    rows = np.stack([np.where(dim > 1, dim, 0) for dim in (m, n, k)])
    aligned = np.all((rows * size) % ALIGNED_BYTES == 0, axis=0)
    rates = np.where(aligned | (size >= 4), rates, np.minimum(rates, device.rate("float32")))
    rate = rates * device.efficiency.matmul
    passes = device.bytes_per_s * device.efficiency.memory
    best = np.full(len(rate), np.inf)
    for (rows_of, columns_of, share), parts in itertools.product(TILES, SPLITS):
        tiles = batch * np.ceil(m / rows_of) * np.ceil(n / columns_of) * parts
        waves = np.ceil(tiles / device.processors)
        flops = 2.0 * rows_of * columns_of * (k / parts + START_DEPTH) * device.processors
        summed = 8.0 * parts * batch * m * n / passes if parts > 1 else 0.0  # float32 parts, written and read
        best = np.minimum(best, waves * flops / (rate * share) + summed)
    if device.processors == 1:  # nothing is known of how it divides a product
        best = 2.0 * batch * m * n * k / rate
        if device.efficiency.pack_bytes_per_s:
            best = best + batch * k * n * size / device.efficiency.pack_bytes_per_s
    return best + device.efficiency.matmul_half_flops / rate


def _attention_seconds(
    table: KernelTable, chosen: npt.NDArray[np.bool_], rates: FloatArray, device: Device
) -> FloatArray:
    """Blocks of 128 queries of a head are dealt out to the processors (Dao 2023, arXiv:2307.08691, section 3.2); heads
    are computed as wide as the next multiple of 64, but on one core."""
    batch, queries = table.shape[chosen, 0], table.shape[chosen, 1]
    blocks = batch * np.ceil(queries / 128)
    idle = np.ceil(blocks / device.processors) * device.processors / blocks
    width = table.shape[chosen, 3]
    padded = np.ceil(width / ATTENTION_WIDTH) * ATTENTION_WIDTH / width if device.processors > 1 else 1.0
    rate = rates * device.efficiency.attention
    return np.asarray(table.flops[chosen] * idle * padded / rate, dtype=np.float64)
