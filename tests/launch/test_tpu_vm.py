"""The script that obtains TPUs, with a gcloud that says what it is told to say."""

from __future__ import annotations

import pytest

from tests.launch.conftest import TPU

ADDRESS = "gs://bucket/run"
TRAINING = ["ssh", "scp", "ssh"]


@pytest.fixture
def verbs(programs):
    """What gcloud was asked to do, but for what it was only asked to say."""

    def found() -> list[str]:
        words = [words for _, words, _, _ in programs.calls("gcloud") if words[0] == "compute"]
        return [words[3] for words in words if words[3] != "describe"]

    return found


def states(home, *said: str) -> None:
    """What `describe` says, one after the other; then ACTIVE. "-" stands for nothing: there is no such request."""
    (home / "states").write_text(" ".join(said))


def test_asked_for_waited_for_used_and_deleted(go, tpu, verbs, programs):
    states(tpu, "-", "WAITING_FOR_RESOURCES", "PROVISIONING")
    go("tpu-vm", ADDRESS, more=TPU)
    assert verbs() == ["create", *TRAINING, "delete"]
    (create,) = [words for _, words, _, _ in programs.calls("gcloud") if "create" in words]
    assert create[4:] == [
        "run",
        "--project=p",
        "--zone=z",
        "--node-id=run",
        "--accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite",
        "--spot",
    ]
    assert len(programs.calls("sleep")) == 2
    *_, train = [words for _, words, _, _ in programs.calls("gcloud") if "ssh" in words]
    assert {"--worker=all", "--node=all", "--batch-size=all"} <= set(train)


def test_what_is_there_is_used(go, tpu, verbs):
    go("tpu-vm", ADDRESS, more=TPU | {"keep": "True"})
    assert verbs() == TRAINING


def test_slices_that_are_taken_away_are_asked_for_again(go, tpu, verbs, programs):
    """The run fails because its machines go: the same again, in new ones, until it ends well."""
    counter = tpu / "attempts"
    programs.add(
        "python3",
        more=f"open({str(counter)!r}, 'a').write('x'); sys.exit(os.path.getsize({str(counter)!r}) < 2)",
    )
    states(tpu, "-", "ACTIVE", "SUSPENDING", "-")
    go("tpu-vm", ADDRESS, more=TPU)
    assert verbs() == ["create", *TRAINING, "delete", "create", *TRAINING, "delete"]


def test_slices_that_are_taken_away_while_waiting(go, tpu, verbs):
    states(tpu, "-", "PROVISIONING", "SUSPENDED", "-")
    go("tpu-vm", ADDRESS, more=TPU)
    assert verbs() == ["create", "delete", "create", *TRAINING, "delete"]


def test_no_more_often_than_asked(go, tpu, verbs):
    states(tpu, *["-", "SUSPENDED"] * 9)
    with pytest.raises(SystemExit) as raised:
        go("tpu-vm", ADDRESS, more=TPU | {"max_restarts": "2"})
    assert (raised.value.code, verbs()) == (1, ["create", "delete"] * 3)


def test_a_run_that_fails_by_itself_is_not_begun_again(go, tpu, verbs, programs):
    programs.add("python3", more="sys.exit(3)")
    with pytest.raises(SystemExit) as raised:
        go("tpu-vm", ADDRESS, more=TPU)
    assert (raised.value.code, verbs()) == (3, [*TRAINING, "delete"])


@pytest.mark.parametrize("state", ["FAILED", "-"])
def test_a_request_that_fails(go, tpu, verbs, state):
    states(tpu, "-", state)
    with pytest.raises(SystemExit) as raised:
        go("tpu-vm", ADDRESS, more=TPU)
    assert (raised.value.code, verbs()) == (1, ["create"])


def test_several_slices_and_other_settings(go):
    settings = TPU | {"slices": "2", "capacity": "reserved", "runtime": "mine", "valid_until": "6h"}
    text = go("tpu-vm", ADDRESS, dry_run=True, more=settings).files["launch.sh"]
    flags = (
        "--node-count=2 --node-prefix=run --accelerator-type=v5litepod-16 --runtime-version=mine --reserved"
    )
    assert f"{flags} --valid-until-duration=6h || exit" in text
    assert (
        "--spot"
        not in go("tpu-vm", ADDRESS, dry_run=True, more=TPU | {"capacity": "on-demand"}).files["launch.sh"]
    )


def test_one_machine_that_is_kept_may_have_a_path(go, tpu, programs):
    """The snapshot then goes into the run folder there."""
    go("tpu-vm", "runs/x y", more=TPU | {"topology": "v5e:2x4", "keep": "True"})
    (kept,) = (tpu / "runs" / "x y" / "launch").iterdir()
    assert (kept / "train.sh").is_file()
    assert not any(words[0] == "storage" for _, words, _, _ in programs.calls("gcloud"))
