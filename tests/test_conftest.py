from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax
import pytest

pytest_plugins = ["pytester"]

HOOKS = Path(__file__).with_name("conftest.py")


def test_eight_cpu_devices() -> None:
    assert jax.device_count() == 8
    assert {d.platform for d in jax.devices()} == {"cpu"}


def test_compilation_cache_is_on() -> None:
    assert jax.config.jax_compilation_cache_dir == os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning):
        warnings.warn("not listed in pyproject.toml", UserWarning, stacklevel=1)


def test_a_skip_for_want_of_devices_fails(pytester: pytest.Pytester) -> None:
    # The same hooks, without the environment: jax is imported here already.
    source = HOOKS.read_text().replace("\n_prepare_environment()\n", "\n")
    assert source != HOOKS.read_text()
    pytester.makeconftest(source)
    pytester.makepyfile(
        test_inner="""
        import pytest

        def test_imperative():
            pytest.skip("needs 16 devices")

        @pytest.mark.skipif(True, reason="no GPU Device here")
        def test_mark():
            pass

        def test_other():
            pytest.skip("data set not prepared")
        """,
        test_module="""
        import pytest
        pytest.skip("only one device", allow_module_level=True)
        """,
    )
    result = pytester.runpytest_inprocess("-p", "no:xdist", "--continue-on-collection-errors")
    result.assert_outcomes(failed=1, skipped=1, errors=2)
    result.stdout.fnmatch_lines(["*skip for want of devices is a failure*needs 16 devices*"])
