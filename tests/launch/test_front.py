"""The front: settings, what is refused and why, and that a launch runs what a dry run prints."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from tests.launch.conftest import TPU
from tokenlab import cli, launch
from tokenlab.core import names
from tokenlab.core.errors import ConfigError, NameLookupError
from tokenlab.launch import front, snapshot

ADDRESS = "gs://bucket/run"
GKE = {
    "project": "p",
    "zone": "z",
    "cluster": "c",
    "topology": "v5e:4x4",
    "image": "example.org/lab/tokenlab",
}
JOBSET = {"image": "example.org/lab/tokenlab"}


class TestRefused:
    """Nothing is written and nothing run."""

    @pytest.fixture(autouse=True)
    def nothing_is_written(self, here, programs):
        programs.add("gcloud", "docker", "kubectl", "xpk", "sbatch", "env")
        yield
        assert list(here.iterdir()) == []
        assert programs.calls() == []

    def refused(self, go, message: str, target: str, workdir: str = ADDRESS, **given) -> None:
        for dry_run in (True, False):
            with pytest.raises((ConfigError, NameLookupError), match=re.escape(message)):
                go(target, workdir, dry_run=dry_run, **given)

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ("slrum", "--target=slrum: there is no such target. Did you mean 'slurm'?"),
            ("tpu_vm", "--target=tpu_vm: there is no such target. Did you mean 'tpu-vm'?"),
            ("front", "--target=front: there is no such target. Known: gke, jobset, local, slurm, tpu-vm."),
        ],
    )
    def test_an_unknown_target(self, go, target, message):
        self.refused(go, message, target)

    @pytest.mark.parametrize(
        ("target", "settings", "message"),
        [
            ("local", {"proceses": "2"}, "launch has no setting 'proceses'. Did you mean 'processes'?"),
            ("local", {"processes": "two"}, "--launch.processes is 'two' (str): expected int."),
            ("local", {"processes": "0"}, "--launch.processes=0: expected a whole number >= 1."),
            ("local", {"devices": "-1"}, "--launch.devices=-1: expected a whole number >= 0."),
            ("local", {"devices": "2"}, "--launch.devices=2 of what? Give --launch.platform=cpu or cuda too."),
            ("local", {"platform": "tpu"}, "launch.platform is 'tpu'"),
            ("local", {"platform": "cuda", "processes": "2"}, "give --launch.devices=N, GPUs of each."),
            ("local", {"port": "70000"}, "--launch.port=70000: expected a port, 1 to 65535."),
            ("local", {"python": "a=b"}, "--launch.python=a=b: expected a path without '='"),
            ("local", {"env": "x"}, "--launch.env=x: expected --launch.env.NAME=TEXT."),
            ("local", {"processes.x": "2"}, "--launch.processes.x=2: expected --launch.processes=VALUE."),
            ("local", {"env.a-b": "x"}, "--launch.env.a-b: expected the name of an environment variable."),
            ("local", {"name": "Über"}, "--launch.name='Über': expected at most 40 lower-case letters"),
            ("gke", GKE | {"name": "x" * 40}, "expected at most 39 lower-case letters"),
            ("slurm", {"nodes": "0"}, "--launch.nodes=0: expected a whole number >= 1."),
            ("slurm", {"tasks_per_node": "0"}, "--launch.tasks_per_node=0: expected a whole number >= 1."),
            ("slurm", {"gpus_per_task": "-1"}, "--launch.gpus_per_task=-1: expected a whole number >= 0."),
            ("slurm", {"signal_seconds": "0"}, "--launch.signal_seconds=0: expected 1 to 65535 seconds."),
            ("slurm", {"partition": "a\n#SBATCH --x"}, r"--launch.partition='a\n#SBATCH --x': expected text of one"),
            ("slurm", {"sbatch.comment": "a\nb"}, r"--launch.sbatch.comment='a\nb': expected text of one line"),
            ("slurm", {"sbatch.J": "x"}, "--launch.sbatch.J: expected a field of sbatch by its long name"),
            ("slurm", {"sbatch.time": "1"}, "--launch.sbatch.time=1: that field has a setting, or follows from one"),
            ("tpu-vm", {}, "--launch.project=PROJECT is missing (of Google Cloud)."),
            ("tpu-vm", {"project": "p"}, "--launch.zone=ZONE is missing (where the TPUs are, such as us-west4-a)."),
            ("tpu-vm", {"project": "p", "zone": "z"}, "--launch.topology=TOPOLOGY is missing (kind and shape of a "),
            ("tpu-vm", TPU | {"topology": "v5e"}, "--launch.topology=v5e: expected the kind of TPU and the shape"),
            ("tpu-vm", TPU | {"topology": "v5:4x4"}, "there is no TPU 'v5'. Did you mean 'v5"),
            ("tpu-vm", TPU | {"topology": "v5p:4x4"}, "slices of v5p have 3 dimensions: expected one such as v5p:4"),
            ("tpu-vm", TPU | {"topology": "v5e:4x4x4"}, "slices of v5e have 2 dimensions: expected one such as v5e"),
            ("tpu-vm", TPU | {"topology": "v5e:3x4"}, "no slice of v5e has that shape. Known: 1x1, 2x2, 2x4, 4x4"),
            ("tpu-vm", TPU | {"topology": "v5p:3x4x4"}, "no slice of v5p has that shape: expected 2x2x1, 2x2x2"),
            ("tpu-vm", TPU | {"topology": "v4:64x64x64"}, "with at most 4096 chips in all"),
            ("tpu-vm", TPU | {"slices": "0"}, "--launch.slices=0: expected a whole number >= 1."),
            ("tpu-vm", TPU | {"capacity": "cheap"}, "--launch.capacity=cheap: expected one of spot, on-demand, res"),
            ("gke", {"project": "p", "zone": "z"}, "--launch.image=IMAGE is missing"),
            ("gke", GKE | {"priority": "urgent"}, "--launch.priority=urgent: expected one of very-low, low, medium"),
            ("gke", GKE | {"image": "example.org/x:tag"}, "--launch.image=example.org/x:tag: expected a repository"),
            ("gke", GKE | {"base_image": "a b"}, "--launch.base_image=a b: expected the name of an image."),
            ("jobset", JOBSET | {"topology": "v5e:4x4", "gpus": "1"}, "leave out pods and gpus."),
            ("jobset", JOBSET | {"slices": "2"}, "--launch.slices=2 of what? Give --launch.topology too"),
            ("jobset", JOBSET | {"cpus": "many"}, "--launch.cpus=many: expected a quantity such as 16, 500m or 64G"),
            ("jobset", JOBSET | {"namespace": "A b"}, "--launch.namespace=A b: expected the name of a Kubernetes o"),
            ("jobset", JOBSET | {"pods": "0"}, "--launch.pods=0: expected a whole number >= 1."),
        ],
    )  # fmt: skip
    def test_settings(self, go, target, settings, message):
        self.refused(go, message, target, more=settings)

    @pytest.mark.parametrize(
        ("target", "settings", "reason"),
        [
            ("tpu-vm", TPU, "1 x v5e:4x4 is 4 machines, each with a disk of its own"),
            ("tpu-vm", TPU | {"keep": "True", "slices": "2"}, "2 x v5e:4x4 is 8 machines, each with a disk of its "),
            ("tpu-vm", TPU | {"topology": "v5e:2x4"}, "the TPU's disk is deleted with it when the run has ended"),
            ("gke", GKE, "what a pod writes to its own disk is gone when it restarts"),
            ("jobset", JOBSET, "what a pod writes to its own disk is gone when it restarts (or give --launch.claim"),
            ("jobset", JOBSET | {"claim": "c", "mount": "/other"}, "what a pod writes to its own disk is gone when"),
        ],
    )  # fmt: skip
    def test_a_path_where_machines_share_no_disk(self, go, target, settings, reason):
        self.refused(go, f"--workdir=/runs/x is a path, and {reason}", target, "/runs/x", more=settings)
        self.refused(go, "expected gs://BUCKET/FOLDER.", target, "/runs/x", more=settings)

    @pytest.mark.parametrize(
        ("target", "settings", "changes", "message"),
        [
            ("local", {"processes": "3"}, {}, "config.batch_size is 64, which does not divide over the 3 processes"),
            ("local", {"processes": "2", "platform": "cpu", "devices": "3"}, {"mesh.fsdp": "4"}, "cannot be split "),
            ("slurm", {"tasks_per_node": "2", "gpus_per_task": "1"}, {"mesh.data": "4"}, "needs 4 devices, and 1 x"),
            ("tpu-vm", TPU, {"mesh.data": "8"}, "config.mesh data=8 needs 8 devices, and 1 x v5e:4x4 has 16"),
            ("tpu-vm", TPU | {"slices": "2"}, {"mesh.fsdp": "3"}, "the 32 devices of 2 x v5e:4x4 cannot be split b"),
            ("tpu-vm", TPU | {"topology": "v5e:16x16"}, {"batch_size": "32"}, "does not divide over the 64 process"),
            ("gke", GKE, {"mesh.fsdp": "5"}, "config.mesh data=-1 x fsdp=5: the 16 devices of 1 x v5e:4x4 cannot be"),
            ("jobset", JOBSET | {"pods": "2", "gpus": "4"}, {"mesh.data": "1"}, "config.mesh of one device needs 1"),
        ],
    )  # fmt: skip
    def test_sizes_that_do_not_fit(self, go, target, settings, changes, message):
        workdir = "runs/x" if target in ("local", "slurm") else ADDRESS
        self.refused(go, message, target, workdir, more=settings, changes=changes)

    def test_a_mistake_in_the_configuration(self, go, config):
        self.refused(
            go,
            "config has no key 'batchsize'. Did you mean 'batch_size'?",
            "local",
            changes={"batchsize": "1"},
        )
        self.refused(go, "does not exist", "local", file=config.with_name("other.py"))

    def test_a_folder_that_cannot_be_named_in_PYTHONPATH(self, go, here):
        self.refused(go, "a folder of code cannot have ':' in its path", "local", here / "a:b")

    def test_a_log_with_a_line_break(self, go, here):
        self.refused(go, "the path of the log=", "slurm", here / "a\nb")

    def test_on_the_command_line(self, config, here, capsys):
        words = [
            f"--config={config}",
            "--workdir=gs://b/x",
            "--target=tpu-vm",
            "--launch.zone=z",
            "--dry-run",
        ]
        assert cli.main(["launch", *words]) == 2
        assert capsys.readouterr().err.startswith("tokenlab: error: --launch.project=PROJECT is missing")
        assert cli.main(["launch", "--lunch.zone=z", *words]) == 2
        assert "Did you mean --launch.zone?" in capsys.readouterr().err


class TestText:
    def test_a_launch_runs_what_a_dry_run_prints(self, go, programs, here, capsys):
        """File for file and word for word; and the text stays in the snapshot."""
        programs.add("gcloud", "docker", "kubectl")
        given = {"workdir": ADDRESS, "more": JOBSET | {"topology": "v5e:4x4"}}
        go("jobset", dry_run=True, **given)
        dry = capsys.readouterr().out
        assert list(here.iterdir()) == [] and programs.calls() == []
        go("jobset", **given)
        assert capsys.readouterr().out == dry
        (made,) = (path for path in (here / "runs/launches/run").iterdir() if path.is_dir())
        assert (made / "launch.txt").read_text() == dry
        files, _, commands = dry.partition("\n# run\n")
        for name, text in re.findall(r"^# file (.*)\n((?:(?!\n# file )[\s\S])*)", files, flags=re.MULTILINE):
            assert Path(name).read_text().rstrip() == text.rstrip()
        lines = commands.partition("\n\n#")[0].replace("\\\n", "").splitlines()
        assert [[name, *words] for name, words, _, _ in programs.calls()] == [
            shlex.split(line) for line in lines
        ]

    def test_the_first_command_that_fails_ends_it(self, go, programs, here):
        programs.add("gcloud", "kubectl")
        programs.add("docker", more="sys.exit(7)")
        with pytest.raises(SystemExit) as raised:
            go("jobset", ADDRESS, more=JOBSET)
        assert raised.value.code == 7
        assert [name for name, *_ in programs.calls()] == ["gcloud", "docker"]

    def test_a_program_that_is_missing(self, go, here, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(
            ConfigError, match="sbatch cannot be run: No such file .*; install it, or take what --dry-run"
        ):
            go("slurm", here / "run")

    def test_everything_goes_on_with_the_same_command(self, go, programs, here):
        programs.add("sbatch")
        for number in (1, 2):
            plan = go("slurm", here / "run")
            assert Path(plan.commands[0][1]).parent.name.startswith(f"{number:04d}-")

    def test_targets_are_listed(self, capsys):
        assert cli.main(["list", "targets"]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[0] for line in lines if line] == ["gke", "jobset", "local", "slurm", "tpu-vm"]
        assert not any(line.split()[1].endswith(":") for line in lines if line), "the name stands there once"
        assert [module.name for module in launch.targets()] == ["gke", "jobset", "local", "slurm", "tpu-vm"]

    @pytest.mark.parametrize("target", [module.name for module in launch.targets()])
    def test_every_setting_is_described(self, target):
        cls = names.find("tokenlab.launch", target.replace("-", "_")).Config
        assert set(cls.__dataclass_fields__) <= set(front.descriptions(cls))


class TestNames:
    @pytest.mark.parametrize(
        ("workdir", "name"),
        [
            ("runs/soft_moe", "soft-moe"),
            ("gs://bucket/A Run/", "a-run"),
            ("runs/2026-01-01", "run-2026-01-01"),
            ("runs/..", "run"),
            ("runs/é世", "run"),
            ("runs/" + "x" * 60, "x" * 40),
        ],
    )
    def test_of_the_workdir(self, go, workdir, name):
        assert f" --job-name={name}" in go("slurm", workdir, dry_run=True).files["job.sh"].replace(
            "#SBATCH", ""
        )


class TestSnapshot:
    @pytest.fixture
    def contents(self, config):
        return snapshot.collect(str(config), {"a": "é\n"}, "w")

    def test_code_configuration_and_commit(self, contents, config, tmp_path):
        (config.parent / "other.py").write_text("x = 1\n")
        contents = snapshot.collect(f"{config}:arg", {"a": "1"}, "w")
        made = snapshot.write(tmp_path / "s", "0001-00000000", contents, {"job.sh": "é\n"})
        package = snapshot.PACKAGE
        for file in ("cli.py", "core/config.py", "data/assets/emoji/NOTICE.md"):
            assert (made / "tokenlab" / file).read_bytes() == (package / file).read_bytes()
        assert not list(made.rglob("__pycache__"))
        assert (made / "config" / "some.py").read_text() == config.read_text()
        assert (made / "config" / "other.py").read_text() == "x = 1\n"
        assert (made / "job.sh").read_text() == "é\n"
        assert any(line.startswith("jax==") for line in (made / "requirements.txt").read_text().splitlines())

    def test_a_workdir_in_a_bucket_needs_the_extra(self, config, monkeypatch):
        lines = ["jax>=0.10", "google-cloud-storage>=3; extra == 'gcs'", "torch; extra == 'parity'"]
        monkeypatch.setattr(snapshot.importlib.metadata, "requires", lambda name: lines)
        for workdir, more in (("w", []), ("gs://b/w", ["google-cloud-storage>=3"])):
            found = snapshot.collect(str(config), {}, workdir).files["requirements.txt"].decode().splitlines()
            assert found[0].startswith("jax==") and found[1:] == more

    def test_the_difference_to_the_commit(self, tmp_path):
        def git(*words):
            front.subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)

        (tmp_path / "c.py").write_text("a = 1\n")
        git("init")
        git("add", "c.py")
        git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-m", "first")
        (tmp_path / "c.py").write_text("a = 2\n")
        (tmp_path / "d.py").write_text("")
        about, difference = snapshot._checkout(tmp_path / "c.py")
        assert re.fullmatch(r"[0-9a-f]{40}", about["commit"])
        assert about["status"] == [" M c.py", "?? d.py"]
        assert b"-a = 1\n+a = 2\n" in difference
        assert snapshot._checkout(tmp_path / "d.py") is None, "no commit holds it"

    def test_the_digest_changes_with_anything(self, contents):
        one = snapshot.Contents(contents.files | {"config/x.py": b"1"}, 0)
        other = snapshot.Contents(contents.files | {"config/x.py": b"2"}, 0)
        moved = snapshot.Contents({"a": b"1", "b": b""}, 0), snapshot.Contents({"a": b"", "b": b"1"}, 0)
        assert len({contents.digest, one.digest, other.digest, moved[0].digest, moved[1].digest}) == 5

    def test_numbers_go_on_and_nothing_is_overwritten(self, contents, tmp_path):
        small = snapshot.Contents({"a": b"1"}, 0)
        names = []
        for _ in range(3):
            names.append(snapshot.next_name(tmp_path / "s", small))
            snapshot.write(tmp_path / "s", names[-1], small, {})
        assert [name[:5] for name in names] == ["0001-", "0002-", "0003-"]
        with pytest.raises(
            ConfigError, match="cannot be written: Directory not empty|cannot be written: File exists"
        ):
            snapshot.write(tmp_path / "s", names[0], snapshot.Contents({"a": b"2"}, 0), {})
        assert (tmp_path / "s" / names[0] / "a").read_bytes() == b"1"
        assert sorted(path.name for path in (tmp_path / "s").iterdir()) == names

    def test_it_is_whole_or_not_there(self, tmp_path):
        broken = snapshot.Contents({"a": b"1", "a/b": b"2"}, 0)  # a file cannot be a folder
        with pytest.raises(ConfigError, match="cannot be written"):
            snapshot.write(tmp_path / "s", "0001-00000000", broken, {})
        assert list((tmp_path / "s").iterdir()) == []

    def test_methods_of_ones_own_go_along(self, go, programs, here, tmp_path, monkeypatch):
        (tmp_path / "mine").mkdir()
        programs.add("python")
        monkeypatch.setenv("TOKENLAB_METHODS", str(tmp_path / "mine"))
        go("local", here / "run", python=programs.folder / "python")
        ((_, _, environment, _),) = programs.calls()
        assert environment["TOKENLAB_METHODS"] == f"{environment['PYTHONPATH']}/methods/0"
        assert os.path.isdir(environment["TOKENLAB_METHODS"])

    def test_a_folder_that_cannot_be_written_to(self, go, here):
        (here / "run").write_text("a file")
        with pytest.raises(ConfigError, match="run/launch cannot be written to: Not a directory"):
            go("local", here / "run")
