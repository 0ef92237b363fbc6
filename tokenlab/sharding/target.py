"""What kind of device a program is traced for: that of the mesh around, which need not be there."""

from __future__ import annotations

import jax
from jax.sharding import get_abstract_mesh


def target_platform() -> str:
    """ "cpu", "gpu" or "tpu": of the devices of the surrounding `jax.set_mesh`, else of those of this process.

    What has more than one implementation asks this, so that a step that is compiled on a laptop for a TPU is the step
    that the TPU would run.
    """
    device = get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
