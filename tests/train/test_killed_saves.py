"""Processes that end by SIGKILL while they save: in the middle of writing, and of removing what is old."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tokenlab.train.checkpoint import Checkpoints, load_params

CHILD = """
import os, shutil, signal, sys
import jax
import jax.numpy as jnp
from tokenlab.train import manifest, places
from tokenlab.train.checkpoint import Checkpoints

def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    checkpoints.save(1, {"w": jnp.ones((3,))}, {"a": 1})
    checkpoints.restore_latest({"w": jax.ShapeDtypeStruct((3,), jnp.float32)})
    if sys.argv[2] == "writing":
        manifest.seal = kill
    else:
        places.shutil.rmtree = kill
    checkpoints.save(2, {"w": 2 * jnp.ones((3,))}, {"a": 2})
"""


@pytest.mark.parametrize(
    ("moment", "step", "left"), [("writing", 1, "2.orbax"), ("removing", 2, "1.deleted")]
)
def test_a_killed_save_leaves_a_whole_checkpoint_and_no_rubbish(
    tmp_path: Path, moment: str, step: int, left: str
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CHILD, str(tmp_path), moment]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (result.stdout, result.stderr) == ("", "")  # Orbax, too, says nothing of a save and a restore
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 2 and str(step) in names and any(name.startswith(left) for name in names)
    # Reading leaves them alone: a run may be at work.
    assert load_params(tmp_path, part="w")[1] == {"a": step, "step": step}
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert [path.name for path in tmp_path.iterdir()] == [str(step)]
        state, meta, restored, notes = checkpoints.restore_latest(
            {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
        )
    assert (state["w"].tolist(), meta, restored, notes) == ([step] * 3, {"a": step}, step, [])
