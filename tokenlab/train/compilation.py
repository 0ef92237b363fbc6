"""The persistent compilation cache: a run that is started again begins without compiling."""

from __future__ import annotations

import os
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

# Programs that compile faster than this (seconds) are not worth a file.
SHORTEST = 0.1


def cache_folder() -> Path:
    """Where the cache is by default: $XDG_CACHE_HOME/tokenlab/xla, or ~/.cache/tokenlab/xla."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenlab" / "xla"


def use_cache(setting: bool | str) -> Path | None:
    """Turns the cache on or off for this process.

    Args:
        setting: `config.compilation_cache`: True = the folder jax is set to already (JAX_COMPILATION_CACHE_DIR), else
            `cache_folder()`; a text = that folder; False = off.

    Returns:
        The folder in use, or None.
    """
    current = jax.config.jax_compilation_cache_dir
    folder = setting if isinstance(setting, str) else current or str(cache_folder())
    if bool(setting) != jax.config.jax_enable_compilation_cache or (setting and folder != current):
        compilation_cache.reset_cache()  # jax looks at the setting only once
    jax.config.update("jax_enable_compilation_cache", bool(setting))
    if not setting:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
    if folder != current:
        compilation_cache.set_cache_dir(folder)
    return Path(folder)
