"""Weights from outside: from the files of other libraries into workdirs of this one."""

from tokenlab.interop.workdir import import_weights

__all__ = ["import_weights"]
