"""Whatever a value, a file or a folder is called, the processes get it as it is, and nothing else is run.

Each test launches in earnest with programs that record how they are called, and then does what the far side would do
with what they were given: read a script with bash, a manifest as YAML, and replace `$(NAME)` as Kubernetes does.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.launch.conftest import CHANGES, CONFIG, ENVIRONMENT, FOLDER, HOSTILE, TPU
from tokenlab.launch.job import one_line, shell

OVERRIDES = [f"--config.{key}={text}" for key, text in CHANGES.items()]
VARIABLES = {f"V{i}": text for i, text in enumerate(HOSTILE)}
IMAGE = "example.org/lab/tokenlab"


@pytest.fixture
def recipe(tmp_path):
    """A configuration with a name to match."""
    path = tmp_path / FOLDER / "- $(touch pwned) 'x\".py"
    path.parent.mkdir()
    path.write_text(CONFIG)
    return path


def check(call, recipe, code: str, workdir: str) -> None:
    """That the program was called as `tokenlab train` is to be."""
    _, words, environment, _ = call
    assert words[:4] == ["-P", "-m", "tokenlab.cli", "train"]
    assert words[4:6] == [f"--config={code}/config/{recipe.name}:a b", f"--workdir={workdir}"]
    assert words[6 : 6 + len(OVERRIDES)] == OVERRIDES
    assert environment == VARIABLES | {"PYTHONPATH": code}


def kubernetes(text: str, known: dict[str, str]) -> str:
    """What Kubernetes makes of text in `command` and `env`: $$ is one dollar, $(NAME) a variable where there is one."""
    return re.sub(
        r"\$\$|\$\(([^)]*)\)",
        lambda found: "$" if found[0] == "$$" else known.get(found[1], found[0]),
        text,
        flags=re.DOTALL,
    )


@pytest.mark.parametrize(
    "quoted", [shell, lambda words: " ".join(map(one_line, words))], ids=["shell", "one_line"]
)
def test_quoted_words_are_read_as_they_were(quoted, tmp_path):
    words = ["printf", r"%s\0", *HOSTILE]
    done = subprocess.run(
        ["bash", "-c", quoted(words)], capture_output=True, cwd=tmp_path, env={"LC_ALL": "C"}, check=True
    )
    assert done.stdout.decode().split("\0") == [*HOSTILE, ""]
    assert list(tmp_path.iterdir()) == []


def test_one_line_has_nothing_that_yaml_or_kubernetes_would_change():
    for text in HOSTILE:
        assert re.fullmatch(r"[\x20-\x7e]+", one_line(text))
        assert "$(" not in one_line(text) and "$$" not in one_line(text)


def test_local(go, programs, here, recipe):
    programs.add("python")
    workdir = here / FOLDER
    (code,) = [
        go(
            "local",
            workdir,
            file=f"{recipe}:a b",
            changes=CHANGES,
            python=programs.folder / "python",
            more=ENVIRONMENT,
        )
    ]
    snapshot = next(path for path in (workdir / "launch").iterdir() if path.name[0] != ".")
    (call,) = programs.calls()
    check(call, recipe, str(snapshot), str(workdir))
    assert code.commands[0][0] == "env"


def test_slurm(go, programs, here, recipe):
    programs.add("sbatch", "python")
    programs.add("srun", more="os.execvp(sys.argv[2], sys.argv[2:])")
    workdir = here / FOLDER
    go(
        "slurm",
        workdir,
        file=f"{recipe}:a b",
        changes=CHANGES,
        python=programs.folder / "python",
        more=ENVIRONMENT,
    )
    ((_, (script,), _, _),) = programs.calls("sbatch")
    subprocess.run(["bash", script], check=True, cwd="/")
    ((_, _, _, folder),) = programs.calls("srun")
    assert folder == str(here)
    (call,) = programs.calls("python")
    check(call, recipe, os.path.dirname(script), str(workdir))


def test_tpu_vm(go, programs, tpu, recipe):
    workdir = f"gs://bucket/{FOLDER}"
    go("tpu-vm", workdir, file=f"{recipe}:a b", changes=CHANGES, more=TPU | ENVIRONMENT)
    (call,) = programs.calls("python3")
    code = next((tpu / "tokenlab-launch").iterdir())
    check(call, recipe, f"tokenlab-launch/{code.name}", workdir)
    (copy,) = [words for _, words, _, _ in programs.calls("gcloud") if words[0] == "storage"]
    assert copy[-1] == f"{workdir}/launch/"


def test_gke(go, programs, tmp_path, recipe):
    programs.add("gcloud", "docker", "xpk", "python3")
    workdir = f"gs://bucket/{FOLDER}"
    settings = {"project": "p", "zone": "z", "cluster": "c", "topology": "v5e:4x4", "image": IMAGE}
    go("gke", workdir, file=f"{recipe}:a b", changes=CHANGES, more=settings | ENVIRONMENT)
    ((_, words, _, _),) = programs.calls("xpk")
    (command,) = [word.partition("=")[2] for word in words if word.startswith("--command=")]
    block = f"command:\n- bash\n- -c\n- |\n  echo Start; ({command})\n"  # where XPK puts it
    words = [kubernetes(word, {"HOME": "replaced"}) for word in yaml.safe_load(block)["command"]]
    subprocess.run(words, check=True, cwd=tmp_path)
    (call,) = programs.calls("python3")
    check(call, recipe, "/launch", workdir)


@pytest.mark.parametrize("workdir", [f"gs://bucket/{FOLDER}", f"/runs/{FOLDER}"])
def test_jobset(go, programs, tmp_path, recipe, workdir):
    programs.add("gcloud", "docker", "kubectl", "python3", "cp", "mkdir")
    settings = {"pods": "2", "claim": "runs", "image": IMAGE}
    go("jobset", workdir, file=f"{recipe}:a b", changes=CHANGES, more=settings | ENVIRONMENT)
    ((_, words, _, _),) = programs.calls("kubectl")
    manifest = yaml.safe_load(Path(words[-1].partition("=")[2]).read_text(encoding="utf-8"))
    pod = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    known = {"JOB_COMPLETION_INDEX": "1", "HOME": "replaced"}
    (container,) = pod["containers"]
    environment = {each["name"]: kubernetes(each["value"], known) for each in container["env"]}
    words = [kubernetes(word, known) for word in container["command"]]
    subprocess.run(words, check=True, cwd=tmp_path, env=os.environ | environment)
    (call,) = programs.calls("python3")
    check(call, recipe, "/launch", workdir)
    name = manifest["metadata"]["name"]
    place = [f"--coordinator={name}-workers-0-0.{name}:8476", "--num-processes=2", "--process-id=1"]
    assert call[1][-3:] == place
    for container in pod.get("initContainers", []):
        subprocess.run([kubernetes(word, known) for word in container["command"]], check=True, cwd=tmp_path)
        target = manifest["spec"], programs.calls("cp")[0][1][-1]
        assert re.fullmatch(re.escape(f"{workdir}/launch/") + r"0001-[0-9a-f]{8}", target[1])
    assert bool(programs.calls("cp")) == (not workdir.startswith("gs://"))
