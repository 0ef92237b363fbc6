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


@pytest.fixture
def hooks(pytester: pytest.Pytester) -> None:
    """The same hooks, without the environment: jax is imported here already."""
    source = HOOKS.read_text().replace("\n_prepare_environment()\n", "\n")
    assert source != HOOKS.read_text()
    pytester.makeconftest(source)


def test_a_skip_for_want_of_devices_fails(hooks: None, pytester: pytest.Pytester) -> None:
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


def test_what_is_quick_for_some_parameters_is_slow_for_the_others(
    hooks: None, pytester: pytest.Pytester
) -> None:
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  quick\n  exact")
    pytester.makepyfile(
        test_inner="""
        import pytest

        @pytest.mark.quick("a-1", "b-2")
        @pytest.mark.parametrize("number", [1, 2])
        @pytest.mark.parametrize("letter", ["a", "b"])
        def test_letter(letter, number):
            pass

        def test_without():
            pass
        """
    )
    plain = ("-p", "no:xdist")
    pytester.runpytest_inprocess(*plain, "-m", "not slow").assert_outcomes(passed=3, deselected=2)
    pytester.runpytest_inprocess(*plain, "-m", "slow").assert_outcomes(passed=2, deselected=3)
    pytester.runpytest_inprocess(*plain, "test_inner.py::test_letter[b-2]").assert_outcomes(passed=1)
    path = pytester.path / "test_inner.py"
    path.write_text(path.read_text().replace("b-2", "b-3"))
    result = pytester.runpytest_inprocess(*plain)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*marked quick, but *test_letter has no parameters {'b-3'}"])


def test_what_takes_minutes_begins_before_the_others(hooks: None, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers =\n  first")
    pytester.makepyfile(
        test_inner="""
        import pytest

        def test_short():
            pass

        @pytest.mark.first
        def test_long():
            pass

        def test_other():
            pass
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:xdist", "-v")
    result.stdout.fnmatch_lines(["*::test_long PASSED*", "*::test_short PASSED*", "*::test_other PASSED*"])
