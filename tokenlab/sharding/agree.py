"""What the processes of a job tell each other beside the devices: through jax's coordination service, nothing compiled.

Each function is called by every process, in the same order; with one process it answers at once. That another process
never comes is the business of `tokenlab.sharding.watch`.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import jax

from tokenlab.sharding import runtime

_PATIENCE = 7 * 24 * 3600 * 1000
"""Milliseconds to wait for others: until the watch ends this process."""

_calls = itertools.count()


def meet() -> None:
    """Returns when every process has called this.

    Compiling takes one process a second, with a cache, and another a minute; gloo, which connects CPU devices when they
    first compute together, waits half of one.
    """
    if jax.process_count() > 1:
        runtime.client().wait_at_barrier(f"tokenlab/meet/{next(_calls)}", _PATIENCE)


def from_primary(value: Any) -> Any:
    """The value, of JSON types, that process 0 has, in every process."""
    if jax.process_count() == 1:
        return value
    key = f"tokenlab/primary/{next(_calls)}"
    if jax.process_index() == 0:
        runtime.client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(runtime.client().blocking_key_value_get(key, _PATIENCE))


def gather(value: Any) -> list[Any]:
    """The values, of JSON types, of all processes, by process."""
    if jax.process_count() == 1:
        return [value]
    folder = f"tokenlab/gather/{next(_calls)}"
    runtime.client().key_value_set(f"{folder}/{jax.process_index()}", json.dumps(value))
    keys = (f"{folder}/{number}" for number in range(jax.process_count()))
    return [json.loads(runtime.client().blocking_key_value_get(key, _PATIENCE)) for key in keys]
