"""Manifests are what Kubernetes and JobSet take: their own models and fields, nothing misspelt.

The Job in a manifest, with its pods, is checked against the models of lightkube-models, which are made from Kubernetes'
OpenAPI description. JobSet's own fields are checked against jobset_schema.json, written from its documentation.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from pathlib import Path

import pytest
import yaml

from tests.launch.recipes import GOLDEN

SCHEMA = Path(__file__).parent / "jobset_schema.json"
IMAGE = {"image": "example.org/lab/tokenlab"}
ADDRESS = "gs://bucket/run"
HINT = "a package of the dev extra is missing: pip install -e '.[dev]'"


def wrong(value: object, kind: object, where: str = "") -> list[str]:
    """What of a value is not as the models of lightkube-models say: unknown and missing fields, other types."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        found = [wrong(value, option, where) for option in inner if option is not type(None)]
        return [] if [] in found else found[0]
    if origin is list:
        if not isinstance(value, list):
            return [f"{where} is no list"]
        return [line for i, item in enumerate(value) for line in wrong(item, inner[0], f"{where}[{i}]")]
    if kind is dict:  # labels, annotations, amounts: the description says no more, and all of them hold text
        texts = isinstance(value, dict) and all(
            type(item) is str for item in [*value.keys(), *value.values()]
        )
        return [] if texts else [f"{where} is not of text"]
    if not hasattr(kind, "__dataclass_fields__"):
        return [] if type(value) is kind else [f"{where} is {value!r}, no {kind}"]
    if not isinstance(value, dict):
        return [f"{where} is no group"]
    hints = typing.get_type_hints(kind)
    found = [f"{where} has an unknown field {name}" for name in value if name not in hints]
    for name, hint in hints.items():
        if name in value:
            found += wrong(value[name], hint, f"{where}.{name}")
        elif type(None) not in typing.get_args(hint):
            found.append(f"{where}.{name} is missing")
    return found


@pytest.fixture(scope="module")
def check():
    """Raises when a manifest is not what JobSet and Kubernetes take."""
    pytest.importorskip("lightkube", reason=HINT)
    # The models take three names from lightkube, a client that is not needed to read them.
    names = {"dataclass": dataclasses.dataclass, "field": dataclasses.field, "DictMixin": object}
    for name in ("lightkube.core", "lightkube.core.schema"):
        sys.modules.setdefault(name, types.ModuleType(name))
    for name, value in names.items():
        if not hasattr(sys.modules["lightkube.core.schema"], name):
            setattr(sys.modules["lightkube.core.schema"], name, value)
    models = pytest.importorskip("lightkube.models.batch_v1", reason=HINT)
    meta = pytest.importorskip("lightkube.models.meta_v1", reason=HINT)
    validate = pytest.importorskip("fastjsonschema", reason=HINT).compile(json.loads(SCHEMA.read_text()))

    def checked(text: str) -> dict:
        manifest = yaml.safe_load(text)
        validate(manifest)
        found = wrong(manifest["metadata"], meta.ObjectMeta, "metadata")
        for group in manifest["spec"]["replicatedJobs"]:
            found += wrong(group["template"], models.JobTemplateSpec, group["name"])
        assert found == []
        return manifest

    return checked


def manifest(plan) -> str:
    return plan.files["jobset.yaml"]


@pytest.mark.parametrize(
    ("workdir", "settings"),
    [
        (ADDRESS, {}),
        (
            ADDRESS,
            {"topology": "v5p:4x4x4", "slices": "2", "queue": "q", "service_account": "s", "memory": "4Gi"},
        ),
        (
            ADDRESS,
            {
                "pods": "4",
                "gpus": "8",
                "cpus": "500m",
                "node_selector.example.org/gpu": "yes",
                "env.A": "1e3",
            },
        ),
        ("/runs/x", {"pods": "4", "claim": "runs", "namespace": "lab", "max_restarts": "0"}),
    ],
)
def test_a_manifest_is_valid(go, check, workdir, settings):
    check(manifest(go("jobset", workdir, dry_run=True, more=IMAGE | settings)))


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("jobset*.txt")))
def test_a_manifest_of_the_page_is_valid(check, name):
    text = (GOLDEN / f"{name}.txt").read_text(encoding="utf-8")
    _, _, behind = text.partition("/jobset.yaml\n")
    check(behind.partition("\n# run\n")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": {"replicatedJob": []}}, "replicatedJob"),
        ({"kind": "Jobset"}, "kind"),
        ({"metadata": {"name": "Upper"}}, "name"),
    ],
)
def test_a_wrong_jobset_is_noticed(go, check, change, message):
    found = yaml.safe_load(manifest(go("jobset", ADDRESS, dry_run=True, more=IMAGE)))
    for key, value in change.items():
        found[key] = found[key] | value if isinstance(value, dict) else value
    with pytest.raises(Exception, match=message):
        check(yaml.safe_dump(found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"imagee": "x"}, "unknown field imagee"),
        ({"env": [{"name": "A", "value": 1}]}, "env.0..value is 1"),
        ({"ports": [{"name": "A"}]}, "containerPort is missing"),
        ({"command": "python3"}, "command is no list"),
        ({"resources": {"limits": {"nvidia.com/gpu": 8}}}, "limits is not of text"),
    ],
)
def test_a_wrong_pod_is_noticed(go, check, change, message):
    found = yaml.safe_load(manifest(go("jobset", ADDRESS, dry_run=True, more=IMAGE)))
    work = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    work["template"]["spec"]["containers"][0] |= change
    with pytest.raises(AssertionError, match=message):
        check(yaml.safe_dump(found))


def test_pods_and_chips_of_a_slice(go):
    """v5e:4x8 is 32 chips on 8 machines of four; two of them are two groups, each in a node pool of its own."""
    settings = IMAGE | {"topology": "v5e:4x8", "slices": "2"}
    found = yaml.safe_load(manifest(go("jobset", ADDRESS, dry_run=True, more=settings)))
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    (group,) = found["spec"]["replicatedJobs"]
    work = group["template"]["spec"]
    pod = work["template"]["spec"]
    assert (group["replicas"], work["parallelism"], work["completions"], work["completionMode"]) == (
        2,
        8,
        8,
        "Indexed",
    )
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert (work["backoffLimit"], pod["restartPolicy"]) == (0, "Never"), "all begin again together, or none"
