"""The manifest for Kubernetes has the application of deploy/ray_serve.yaml, on machines that can run it."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from script_project import ROOT

from residency.launch.docker import IMAGE_USER
from residency.launch.settings import parse

ALONE: Any = yaml.safe_load((ROOT / "deploy/ray_serve.yaml").read_text(encoding="utf-8"))
SERVICE, VOLUME = yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text(encoding="utf-8"))
SERVE: Any = yaml.safe_load(SERVICE["spec"]["serveConfigV2"])
CLUSTER = SERVICE["spec"]["rayClusterConfig"]
HEAD, (WORKERS,) = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"]
PODS = [group["template"]["spec"] for group in (HEAD, WORKERS)]


def deployments(config: Any) -> dict[str, dict[str, Any]]:
    (application,) = config["applications"]
    return {each["name"]: each for each in application["deployments"]}


def without_places(config: Any) -> Any:
    """Without flags, and the resources of each deployment."""
    (application,) = config["applications"]
    plain = [{k: v for k, v in each.items() if k != "ray_actor_options"} for each in application["deployments"]]
    return {**config, "applications": [{**application, "args": sorted(application["args"]), "deployments": plain}]}


def test_its_application_is_that_of_the_config_for_serve_deploy() -> None:
    assert without_places(SERVE) == without_places(ALONE)
    for name, its in deployments(SERVE).items():
        options, alone = its["ray_actor_options"], deployments(ALONE)[name]["ray_actor_options"]
        assert options | {"num_gpus": 0} == alone | {"num_gpus": 0} | {k: options[k] for k in options.keys() - alone}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module deploy.ray_serve, with stand-ins for Ray; scripts/test_cluster runs it with the real one."""
    for name in ("ray", "ray.serve", "ray.serve.handle"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    module = importlib.import_module("deploy.ray_serve")
    yield module
    del sys.modules["deploy.ray_serve"]


@pytest.mark.parametrize("config", [ALONE, SERVE], ids=["serve deploy", "KubeRay"])
def test_the_program_takes_its_arguments_and_has_its_deployments(config: Any, program: Any) -> None:
    (application,) = config["applications"]
    module, function = application["import_path"].split(":")
    assert module == program.__name__
    assert all(hasattr(program, name) for name in deployments(config))
    getattr(program, function)(application["args"])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"modles": {}}, "modles"),
        ({"models": {}}, "models"),
        ({"api": "--auth me:and-my-word"}, "--auth"),
        ({"engine": "--gpu-keep-wram 30s"}, "--gpu-keep-wram"),
        ({"models": {"tts": "--modle-path /models"}}, "models: tts"),
    ],
)
def test_wrong_arguments_fail_at_serve_deploy(wrong: dict[str, Any], named: str, program: Any) -> None:
    with pytest.raises(Exception, match=named):
        program.build(wrong)


def test_machines_with_a_gpu_come_and_go_and_replicas_fit_on_them() -> None:
    assert CLUSTER["enableInTreeAutoscaling"]
    assert WORKERS["minReplicas"] == WORKERS["replicas"] == 0
    engine = deployments(SERVE)["Engine"]
    (container,) = PODS[1]["containers"]
    gpus = int(container["resources"]["limits"]["nvidia.com/gpu"])
    per_machine = int(gpus / engine["ray_actor_options"]["num_gpus"])
    assert per_machine * engine["ray_actor_options"]["num_cpus"] <= int(container["resources"]["limits"]["cpu"])
    assert per_machine * WORKERS["maxReplicas"] == engine["autoscaling_config"]["max_replicas"]
    assert per_machine == 1 or "--gpu-share-dir" in SERVE["applications"][0]["args"]["engine"]


def test_the_api_stays_on_the_machine_without_a_gpu() -> None:
    needed = deployments(SERVE)["Api"]["ray_actor_options"]["resources"]
    assert needed.keys() <= json.loads(*shlex.split(HEAD["rayStartParams"]["resources"])).keys()
    assert "resources" not in WORKERS["rayStartParams"]
    assert "nvidia.com/gpu" not in PODS[0]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("pod", PODS, ids=["head", "worker"])
def test_pods_have_few_rights_time_to_drain_and_the_voices(pod: Any) -> None:
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == IMAGE_USER
    assert pod["terminationGracePeriodSeconds"] > deployments(SERVE)["Engine"]["graceful_shutdown_timeout_s"]
    (container,) = pod["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    (volume,), (mount,) = pod["volumes"], container["volumeMounts"]
    assert volume["persistentVolumeClaim"]["claimName"] == VOLUME["metadata"]["name"]
    assert volume["name"] == mount["name"]
    voices = str(parse(shlex.split(SERVE["applications"][0]["args"]["api"])).voices_dir)
    assert voices.startswith(f"{mount['mountPath']}/")
    assert VOLUME["spec"]["accessModes"] == ["ReadWriteMany"]


def test_the_api_has_keys_or_does_not_start() -> None:
    """And no other pod has them."""
    (container,), (worker,) = (pod["containers"] for pod in PODS)
    secrets = [each["valueFrom"]["secretKeyRef"] for each in container["env"] if each["name"] == "GPU_TTS_API_KEYS"]
    assert secrets == [{"name": "tts", "key": "api-keys"}]
    text = (ROOT / "deploy/kuberay.yaml").read_text(encoding="utf-8")
    assert "kubectl create secret generic tts --from-literal=api-keys=" in text
    assert not any("valueFrom" in each for each in worker["env"])


def test_the_image_has_the_ray_of_the_manifest_and_of_the_tests() -> None:
    dockerfile = (ROOT / "deploy/Dockerfile").read_text(encoding="utf-8")
    versions = re.findall(r"ray\[serve\]==([\d.]+)", dockerfile + (ROOT / "scripts/test_cluster").read_text())
    assert versions == [CLUSTER["rayVersion"]] * 2
    built = re.findall(r"^# +docker build --tag (\S+)", dockerfile, re.MULTILINE)
    (base,) = re.findall(r"^ARG BASE_IMAGE=(\S+)", dockerfile, re.MULTILINE)
    assert built == [base, PODS[0]["containers"][0]["image"]]
    assert PODS[1]["containers"][0]["image"] == built[1]
    assert re.findall(r"^USER (\S+)", dockerfile, re.MULTILINE)[-1] == "app"
