"""Datasheet peaks of accelerators, and a measurement of the machine at hand."""

from __future__ import annotations

import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from tokenlab.core.errors import CostError, suggest


@dataclasses.dataclass(frozen=True)
class Peaks:
    """What one device can do at best, by its datasheet or as measured.

    Attributes:
      name: of the device.
      flops: FLOP/s of matrix products in the dtype at hand.
      bandwidth: bytes/s between the device and its memory.
    """

    name: str
    flops: float
    bandwidth: float


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The peak figures of one chip, as its maker states them (GB = 1e9 bytes, GiB where the source says so).

    Attributes:
      name: common name.
      device_kinds: what `jax.Device.device_kind` says of it.
      bf16_flops: dense bfloat16 matrix FLOP/s (no structured sparsity).
      float32_flops: FLOP/s of float32 matrix products at JAX's default precision: TF32 on NVIDIA; on TPU their inputs
        are rounded to bfloat16, so it is the same peak.
      hbm_bytes: memory of the chip.
      hbm_bandwidth: bytes/s between the chip and that memory.
      link_bandwidth: bytes/s that the chip can send to the other chips of its slice or server, over all links at
        once: half of what a maker calls bidirectional. None where none is stated.
      source: where the figures are from.
      slice_chips: the most chips of one slice, joined by those links; None where it is not stated, or a server's.
      far_bandwidth: bytes/s that the chip can send to chips of other slices, over the data center's network. None
        where none is stated.
    """

    name: str
    device_kinds: tuple[str, ...]
    bf16_flops: float
    float32_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float | None
    source: str
    slice_chips: int | None = None
    far_bandwidth: float | None = None

    def peaks(self, dtype: str) -> Peaks:
        """The figures that bound a program in this compute dtype, "float32" or "bfloat16"."""
        flops = {"bfloat16": self.bf16_flops, "float32": self.float32_flops}
        if dtype not in flops:
            raise CostError(f"{self.name}: got dtype {dtype!r}, expected one of {', '.join(flops)}.")
        return Peaks(self.name, flops[dtype], self.hbm_bandwidth)


_TPU = "Google Cloud TPU documentation, page "
_A100 = "NVIDIA A100 Tensor Core GPU datasheet (1758950)"
_H100 = "NVIDIA H100 Tensor Core GPU datasheet (bfloat16 and TF32 there with sparsity; half of it)"
_H200 = "NVIDIA H200 Tensor Core GPU datasheet (bfloat16 and TF32 there with sparsity; half of it)"
_DGX = "; NVIDIA DGX H100/H200 datasheet for the network: one port of 400 Gbit/s a GPU"

HARDWARE = (
    Hardware("TPU v4", ("TPU v4",), 275e12, 275e12, 32 * 2**30, 1200e9, 300e9, _TPU + "v4"),
    # A pod of 256 chips of v5e has 6.4 Tbit/s to others. The largest slice of v5p is smaller than its pod of 8,960.
    Hardware(
        "TPU v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 197e12, 16e9, 819e9, 200e9, _TPU + "v5e", 256, 3.125e9
    ),
    Hardware(
        "TPU v5p", ("TPU v5", "TPU v5p"), 459e12, 459e12, 95e9, 2765e9, 600e9, _TPU + "v5p", 6144, 6.25e9
    ),
    Hardware("TPU v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 918e12, 32e9, 1638e9, 400e9, _TPU + "v6e"),
    Hardware("A100 SXM 40GB", ("NVIDIA A100-SXM4-40GB",), 312e12, 156e12, 40e9, 1555e9, 300e9, _A100),
    Hardware("A100 PCIe 40GB", ("NVIDIA A100-PCIE-40GB",), 312e12, 156e12, 40e9, 1555e9, None, _A100),
    Hardware("A100 SXM 80GB", ("NVIDIA A100-SXM4-80GB",), 312e12, 156e12, 80e9, 2039e9, 300e9, _A100),
    Hardware("A100 PCIe 80GB", ("NVIDIA A100 80GB PCIe",), 312e12, 156e12, 80e9, 1935e9, None, _A100),
    Hardware(
        "H100 SXM", ("NVIDIA H100 80GB HBM3",), 989.5e12, 494.7e12, 80e9, 3350e9, 450e9, _H100 + _DGX, 8, 50e9
    ),
    Hardware("H100 PCIe", ("NVIDIA H100 PCIe",), 756.5e12, 378e12, 80e9, 2000e9, None, _H100),
    Hardware("H200 SXM", ("NVIDIA H200",), 989.5e12, 494.7e12, 141e9, 4800e9, 450e9, _H200 + _DGX, 8, 50e9),
)


def lookup(device_kind: str) -> Hardware:
    """The datasheet of a device.

    Args:
      device_kind: `jax.devices()[0].device_kind`, or the `name` of an entry of HARDWARE.

    Raises:
      CostError: no datasheet is known, as for every CPU.
    """
    for hardware in HARDWARE:
        if device_kind == hardware.name or device_kind in hardware.device_kinds:
            return hardware
    raise CostError(
        f"no datasheet is known for device {device_kind!r}; measure its peak with measure_matmul_flops()."
        + suggest(device_kind, [hardware.name for hardware in HARDWARE])
    )


def measure_matmul_flops(dtype: str = "float32", size: int = 1024, repeats: int = 10) -> float:
    """The FLOP/s that a square matrix product reaches on the default device: the median of timed repeats.

    Take a size whose product lasts a millisecond or more, or the time to start it is measured with it (1024 on a CPU,
    8192 on an accelerator). Float32 products run at the default matmul precision, which on accelerators is lower.

    Args:
      dtype: a floating dtype, such as "float32" or "bfloat16".
      size: rows and columns of both matrices, at least 1.
      repeats: timed runs after one that warms up, at least 1.

    Raises:
      CostError: a size or number of repeats below 1, or a dtype that is not floating.
    """
    if size < 1 or repeats < 1:
        raise CostError(
            f"measure_matmul_flops: got size {size} and repeats {repeats}, expected both to be at least 1."
        )
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise CostError(
            f"measure_matmul_flops: got dtype {dtype!r}, expected a floating one such as 'bfloat16'."
        )
    values = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    left, right = (jnp.asarray(value, dtype) for value in values)
    multiply = jax.jit(jnp.matmul)
    multiply(left, right).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(left, right).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds)


def measure_memory_bandwidth(size: int = 2**28, repeats: int = 10) -> float:
    """The bytes/s that one pass over an array in place reaches on the default device: the median of timed repeats.

    The pass reads and writes every element, so it moves twice its size. Take a size well beyond the caches.

    Args:
      size: bytes of the array, at least 4.
      repeats: timed passes after one that warms up, at least 1.

    Raises:
      CostError: a size below 4 or a number of repeats below 1.
    """
    if size < 4 or repeats < 1:
        raise CostError(
            f"measure_memory_bandwidth: got size {size} and repeats {repeats}, expected at least 4 and 1."
        )
    negate = jax.jit(jnp.negative, donate_argnums=0)
    values = negate(jnp.ones(size // 4, jnp.float32)).block_until_ready()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = negate(values).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * values.nbytes / statistics.median(seconds)


def measure_peaks(dtype: str = "float32") -> Peaks:
    """What the default device reaches: `measure_matmul_flops` and `measure_memory_bandwidth` at sizes that fit it.

    On a CPU the matrices have 1,024 rows and the array 256 MiB; on an accelerator 8,192 and 2 GiB.

    Raises:
      CostError: a dtype that is not floating.
    """
    device = jax.devices()[0]
    rows, size = (1024, 2**28) if device.platform == "cpu" else (8192, 2**31)
    flops = measure_matmul_flops(dtype, rows)
    return Peaks(f"{device.device_kind}, measured", flops, measure_memory_bandwidth(size))
