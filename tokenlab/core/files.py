"""Files that a command is asked to write."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from tokenlab.core.errors import ConfigError


def check_writable(path: str | os.PathLike[str], flag: str) -> None:
    """Raise a ConfigError when no file can be written at `path`, so that it is known before the work is done.

    Args:
      path: what was given with the flag; nothing stays there.
      flag: its name, for the message.
    """
    folder, why = Path(path).absolute().parent, ""
    if folder.is_dir() and not Path(path).is_dir():
        try:
            # Permissions do not tell everything, of /proc for one: so a file is made, and is gone again.
            with tempfile.NamedTemporaryFile(dir=folder):
                return
        except OSError as error:
            why = f" and takes files ({folder}: {error.strerror})"
    raise ConfigError(f"{flag}={path} cannot be written: expected a file in a folder that exists{why}.")
