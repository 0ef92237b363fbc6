"""Huge pages for a program's memory, on Linux with glibc.

XLA:CPU takes the temporary memory of a step from malloc at its begin and gives it back at its end, and glibc hands so
large a block to the kernel and back each time. So every step touches every page anew: for the ViT of
`configs/fashion_mnist.py` 75,600 page faults of 4 KiB a step, 0.13 CPU seconds in the kernel. In pages of 2 MiB they
are 520, and a step took 12 to 30 % less time. Where memory is in pieces the kernel first has to make room,
which may cost what was won. Measured with `experiments/cpu_step/run.py`; docs/architecture.md has the figures.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb=1"
"""malloc asks the kernel for huge pages (madvise) where a block is large enough; since glibc 2.35."""

OLDEST = (2, 35)
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def useful() -> bool:
    """Whether TUNABLE would change anything here: glibc reads it, the kernel waits to be asked, nobody set VARIABLE.

    A VARIABLE that is set, to anything or to nothing, is the user's own word.
    """
    library, version = platform.libc_ver()
    if VARIABLE in os.environ or not sys.platform.startswith("linux") or library != "glibc":
        return False
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) < OLDEST:
        return False
    try:
        return "[madvise]" in SETTING.read_text()
    except OSError:
        return False


def ensure() -> None:
    """Start this program again with TUNABLE, where that is useful: glibc reads it only when a process starts.

    The process keeps its number, its arguments and its open files; what it has computed is lost, so this is the first
    thing a program does. Does nothing where the interpreter does not know its own command line.
    """
    if useful() and sys.executable and len(sys.orig_argv) > 1:
        os.environ[VARIABLE] = TUNABLE
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
