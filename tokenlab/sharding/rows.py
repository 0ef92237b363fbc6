"""Which rows of a global batch lie on the devices of this process, and how they get there.

Where a process's rows are is the mesh's business: along `tensor` several processes hold the same rows, and on a TPU the
order of the devices follows the torus, so that a process's rows need not be neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Rows of a batch over the devices.

    Attributes:
        sharding: of the first axis; whatever follows is whole on every device.
        batch_size: rows over all processes, a multiple of the devices that share them.
    """

    sharding: NamedSharding
    batch_size: int

    @cached_property
    def local(self) -> np.ndarray:
        """The rows that this process's devices hold, int64, ascending, each once."""
        if jax.process_count() == 1:
            return np.arange(self.batch_size)
        held = self.sharding.addressable_devices_indices_map((self.batch_size,)).values()
        return np.unique(np.concatenate([np.arange(*rows.indices(self.batch_size)) for (rows,) in held]))

    def put(self, batch: Mapping[str, np.ndarray]) -> dict[str, Array]:
        """Global arrays [batch_size, ...] of this process's rows, [len(local), ...]."""
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), self.sharding)
        with jax.transfer_guard("allow"):  # asked for, which the guard cannot know here
            return {key: self._global(array) for key, array in batch.items()}

    def _global(self, array: np.ndarray) -> Array:
        shape = (self.batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, self.sharding, partial(self._shard, array))

    def _shard(self, array: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.batch_size)
        first = int(np.searchsorted(self.local, start))  # a device's rows are neighbours
        return array[first : first + stop - start]
