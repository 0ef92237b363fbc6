"""What every test runs under: eight CPU devices, a compilation cache kept in the checkout, no skip for want of devices.

The environment is set here, before jax is imported by anything (pytest reads this file first, in each xdist worker
too), and processes that a test starts inherit it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path

import pytest

NUM_DEVICES = 8
ROOT = Path(__file__).resolve().parent.parent

OPTIMISED = ("cost", "sharding")
"""Folders whose tests read compiled programs. There, and in tests that are marked `exact`, XLA optimises machine code.
`@pytest.mark.optimised(True or False)` says otherwise of a test, or of a file.

Nearly all of the time of the others is compiling. Where nothing is optimised and kernels are made by the older of XLA's
two ways, where it has both, a third of it is left for small programs and a seventh for a train step.
JAX_DISABLE_MOST_OPTIMIZATIONS=0 in the environment is for the code that users run, everywhere: `make test-exact` does
that for what compares numbers.
"""


def _prepare_environment() -> None:
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before tests/conftest.py could ask for 8 CPU devices")
    flag = "--xla_force_host_platform_device_count"
    others = re.sub(rf"{flag}=\S*", "", os.environ.get("XLA_FLAGS", ""))
    # Programs are small: a single piece of machine code is made sooner than many that are made side by side.
    others += " --xla_cpu_parallel_codegen_split_count=1"
    as_users = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS", "1").lower() in ("0", "false")
    # An unknown flag ends the process, and this one was in jaxlib for a while only.
    if not as_users and "fusion_emitters" not in others and version("jaxlib").startswith("0.10."):
        others += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{others} {flag}={NUM_DEVICES}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Most of a test's time is compiling, so even the smallest program is kept.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    # Workers run side by side: the thread pools of BLAS and OpenMP would only get in each other's way.
    for pool in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(pool, "1")


_prepare_environment()


def pytest_configure(config: pytest.Config) -> None:
    """Stop at once where the eight devices are missing: the sharding tests would prove nothing.

    The controller of xdist runs no test, so it is spared the import of jax.
    """
    if getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput"):
        return
    import jax

    if jax.device_count() != NUM_DEVICES:
        raise pytest.UsageError(f"the tests need {NUM_DEVICES} CPU devices, jax shows {jax.devices()}")


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks as slow what is marked `quick` for other parameters alone, and puts first what is marked `first`."""
    items.sort(key=lambda item: item.get_closest_marker("first") is None)
    not_there: dict[str, set[str]] = {}
    for item in items:
        mark = item.get_closest_marker("quick")
        if mark is not None:
            not_there.setdefault(item.nodeid.partition("[")[0], set(mark.args)).discard(item.callspec.id)
            if item.callspec.id not in mark.args:
                item.add_marker(pytest.mark.slow)
    wrong = [f"{test} has no parameters {ids}" for test, ids in not_there.items() if ids]
    if wrong and not any("::" in asked for asked in config.args):
        raise pytest.UsageError(f"marked quick, but {'; '.join(wrong)}")


def _is_optimised(item: pytest.Item) -> bool:
    """Whether XLA optimises the machine code of what this test compiles."""
    if item.get_closest_marker("exact"):
        return True
    mark = item.get_closest_marker("optimised")
    if mark is not None:
        (wanted,) = mark.args
        return wanted
    try:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
    except ValueError:  # a test from elsewhere, such as that of somebody's own method
        return True
    return folder in OPTIMISED


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    import jax

    flag = "jax_disable_most_optimizations"
    quick = not _is_optimised(item)
    if flag.upper() not in os.environ and jax.config.values[flag] != quick:
        jax.config.update(flag, quick)
        jax.clear_caches()  # what was compiled the other way
    try:
        return (yield)
    finally:
        _turn_cache_on()


def _turn_cache_on() -> None:
    """A test that runs something without the compilation cache would leave all that follow in its process without."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # jax looks at the settings only once


def _forbid_device_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip for want of devices into a failure: such a skip hides that sharding was never tested."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        path, line, reason = report.longrepr
        if "device" in reason.lower():
            report.outcome = "failed"
            report.longrepr = f"{path}:{line}: a skip for want of devices is a failure here. {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _forbid_device_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _forbid_device_skip(report)
    return report
