"""deploy/kuberay: what Kubernetes would refuse, and what the project would, is none of it."""

import copy
import json
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from samebit.recipes import submit
from samebit.recipes.cli.compose import resolve

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Draft202012Validator(
    json.loads(Path(__file__).with_name("kuberay.schema.json").read_text())
)


def manifest(name):
    return yaml.safe_load((ROOT / "deploy" / "kuberay" / f"{name}.yaml").read_text())


def clusters():
    return manifest("raycluster")["spec"], manifest("rayjob")["spec"]["rayClusterSpec"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_manifests_are_of_the_published_schema(name):
    assert not [f"{e.json_path}: {e.message}" for e in SCHEMA.iter_errors(manifest(name))]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda spec: spec.pop("headGroupSpec"),
        lambda spec: spec.update(workerGroups=[]),
        lambda spec: spec["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}),
        lambda spec: spec["workerGroupSpecs"][0].pop("groupName"),
        lambda spec: spec["workerGroupSpecs"][0].update(replicas="1"),
        lambda spec: spec["workerGroupSpecs"][0]["template"]["spec"].update(containers=[]),
        lambda spec: spec["headGroupSpec"]["template"]["spec"]["volumes"][0].update(name="a_b"),
    ],
)
def test_the_schema_sees_mistakes(spoil):
    """Else it would say nothing of the manifests."""
    spoiled = copy.deepcopy(manifest("rayjob"))
    spoil(spoiled["spec"]["rayClusterSpec"])
    assert list(SCHEMA.iter_errors(spoiled))


def test_both_make_the_same_cluster_of_one_image():
    cluster, of_job = clusters()
    assert cluster == of_job
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[2:]
    )
    assert cluster["rayVersion"] == pins["ray"]
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"-t samebit:{version} " in (ROOT / "deploy" / "Dockerfile").read_text()
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == f"samebit:{version}"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_the_job_is_a_run_that_fits_its_cluster():
    """Its command composes as one of a Ray job, goes on after a failure, and finds its GPUs."""
    spec = manifest("rayjob")["spec"]
    program, *words = shlex.split(spec["entrypoint"])
    assert program == "samebit"
    assert "entrypointNumGpus" not in spec
    job = resolve("submit", ["address=http://h:1", "command=[grpo]"])
    job.command = words
    run = submit.require_command(job)
    assert run.resume
    assert spec["backoffLimit"] > 0
    [workers] = spec["rayClusterSpec"]["workerGroupSpecs"]
    [container] = workers["template"]["spec"]["containers"]
    there = workers["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert run.launcher == "ray"
    assert run.num_processes + run.placement.replicas == there
    for path in (run.model.path, run.data.path, run.output_dir):
        assert path.startswith(container["volumeMounts"][0]["mountPath"])
