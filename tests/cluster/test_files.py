"""What can be checked of cluster/ without a cluster: schemas, one Ray version, no secrets, no pitfalls in the shell."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError
from ray._private.services import determine_plasma_store_config
from ray._private.utils import resolve_object_store_memory

from tests.support.kuberay import ClusterSpec, RayCluster, RayJob

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
JOBS = ("anchors", "train", "sweep")
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file() and path.suffix != ".pyc")
SCRIPTS = [path for path in FILES if path.suffix in {".sh", ".sbatch"}]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def ray_version() -> str:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned
    return pinned[1]


@cache
def options_of(command: str) -> set[str]:
    """The options of `ray COMMAND`."""
    asked = [sys.executable, "-m", "ray.scripts.scripts", command, "--help"]
    return set(re.findall(r"--[a-z-]+", subprocess.run(asked, capture_output=True, text=True, check=True).stdout))


def manifest(name: str, s3: bool = False) -> Any:
    path = CLUSTER / "kuberay" / f"{name}.yaml"
    if not s3:
        return yaml.safe_load(path.read_text())
    script = CLUSTER / "kuberay" / "s3.sh"
    return yaml.safe_load(subprocess.run(["bash", script, path], capture_output=True, text=True, check=True).stdout)


def specs(s3: bool = False) -> dict[str, ClusterSpec]:
    found = {name: RayJob.model_validate(manifest(name, s3)).spec.rayClusterSpec for name in JOBS}
    return {"cluster": RayCluster.model_validate(manifest("cluster", s3)).spec, **found}


# --------------------------------------------------------------------------------------------------------- KubeRay


@pytest.mark.parametrize("s3", [False, True], ids=["volume", "s3"])
def test_the_manifests_have_the_fields_that_kuberay_needs(s3: bool) -> None:
    every = specs(s3)
    first = every["cluster"]
    assert all(spec == first for spec in every.values()), "the same cluster for every stage"
    head = first.headGroupSpec
    assert head.rayStartParams["num-cpus"] == "0"
    worker = first.workerGroupSpecs[0].template.spec.containers[0]
    assert worker.resources.limits["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in head.template.spec.containers[0].resources.limits
    for pod in (head.template.spec, first.workerGroupSpecs[0].template.spec):
        volumes = {volume.name: volume for volume in pod.volumes}
        paths = {mount.name: mount.mountPath for mount in pod.containers[0].volumeMounts}
        assert paths["shm"] == "/dev/shm"
        assert volumes["shm"].emptyDir is not None
        assert volumes["shm"].emptyDir.medium == "Memory"
        assert ("shared" in volumes) is not s3
        from_secret = {variable.name for variable in pod.containers[0].env if variable.valueFrom}
        assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN"} <= from_secret


def test_the_object_store_stays_in_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By Ray's own reckoning, for the memory that each pod has; a part of it is left for PyTorch's workers."""
    spec = specs()["cluster"]
    for group in (spec.headGroupSpec, spec.workerGroupSpecs[0]):
        pod = group.template.spec
        memory = pod.containers[0].resources.limits["memory"]
        shm = next(volume.emptyDir.sizeLimit for volume in pod.volumes if volume.name == "shm" and volume.emptyDir)
        held, total = (int(str(size).removesuffix("Gi")) * 2**30 for size in (shm, memory))
        monkeypatch.setattr(ray._private.utils, "get_shared_memory_bytes", lambda held=held: held)
        monkeypatch.setattr(ray._common.utils, "get_system_memory", lambda *_, total=total: total)
        asked = group.rayStartParams.get("object-store-memory")
        store = resolve_object_store_memory(total, None if asked is None else int(asked))
        assert determine_plasma_store_config(store, str(tmp_path))[0] == "/dev/shm"
        assert store < 0.75 * held


def test_a_cluster_that_stays_needs_no_config() -> None:
    volumes = {volume.name: volume for volume in specs()["cluster"].headGroupSpec.template.spec.volumes}
    assert volumes["config"].configMap is not None
    assert volumes["config"].configMap.optional, "pods would wait for a ConfigMap that only the other manifests use"


def test_the_volume_of_the_manifests_is_the_one_of_storage() -> None:
    claim = yaml.safe_load((CLUSTER / "kuberay" / "storage.yaml").read_text())
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume.name: volume for volume in specs()["train"].headGroupSpec.template.spec.volumes}
    assert volumes["shared"].persistentVolumeClaim is not None
    assert volumes["shared"].persistentVolumeClaim.claimName == claim["metadata"]["name"]


def test_on_s3_nothing_uses_the_volume_and_the_same_commands_run() -> None:
    for name in (*JOBS, "cluster"):
        assert "/shared" not in json.dumps(manifest(name, s3=True))
    for name in JOBS:
        there, here = (manifest(name, s3)["spec"].pop("entrypoint") for s3 in (True, False))
        assert there == here.replace("/shared", "s3://YOUR-BUCKET")


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("spec", "shutdownAfterJobFinish"), True, "Extra inputs"),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "disabled", "'token'"),
        (("spec", "entrypoint"), "bash -c 'craft-ray train'", "craft-ray train"),
        (("metadata", "name"), "Craft_Train", "pattern"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), 3, "not in order"),
    ],
)
def test_a_wrong_manifest_is_refused(path: tuple[str | int, ...], value: object, says: str) -> None:
    tree = manifest("train")
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ValidationError, match=re.escape(says)):
        RayJob.model_validate(tree)


def test_a_secret_in_a_manifest_is_refused() -> None:
    tree = manifest("cluster")
    tree["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"].append({"name": "HF_TOKEN", "value": "x"})
    with pytest.raises(ValidationError, match="HF_TOKEN is in the manifest"):
        RayCluster.model_validate(tree)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_reads_the_manifests(tmp_path: Path) -> None:
    """As kustomize reads them, without a cluster."""
    names = [f"{name}.yaml" for name in (*JOBS, "cluster", "storage")]
    for name in names:
        shutil.copy(CLUSTER / "kuberay" / name, tmp_path)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump({"resources": names}))
    done = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = [document["kind"] for document in yaml.safe_load_all(done.stdout)]
    assert sorted(kinds) == ["PersistentVolumeClaim", "RayCluster", "RayJob", "RayJob", "RayJob"]


# ---------------------------------------------------------------------------------------------------------- ray up


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_ray_up_accepts_the_files(cloud: str) -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    tree = yaml.safe_load((CLUSTER / "ray-up" / f"{cloud}.yaml").read_text())
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**tree, "max_worker": 2}, schema)
    assert tree["provider"]["type"] == cloud
    assert tree["head_node_type"] in tree["available_node_types"]
    assert "--env RAY_AUTH_MODE=token" in tree["docker"]["run_options"]
    assert tree["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/craft-ray-token"}
    assert "--dashboard-host=127.0.0.1" in tree["head_start_ray_commands"][-1]
    assert "$RAY_HEAD_IP" in tree["worker_start_ray_commands"][-1]
    for command in tree["head_start_ray_commands"][-1:] + tree["worker_start_ray_commands"][-1:]:
        assert set(re.findall(r"--[a-z-]+", command.partition("ray start")[2])) <= options_of("start")


# ------------------------------------------------------------------------------------------------ versions and image


def test_one_version_of_ray_everywhere() -> None:
    version = ray_version()
    assert ray.__version__ == version
    wanted = next(requirement for requirement in PROJECT["dependencies"] if requirement.startswith("ray["))
    allowed = SpecifierSet(wanted.partition("]")[2])
    assert version in allowed
    major, minor, _ = version.split(".")
    assert f"{major}.{int(minor) + 1}.0" not in allowed, "a later Ray needs other cluster files"

    image = f"craft-ray:{PROJECT['version']}-ray{version}-py311-gpu"
    for spec in specs().values():
        assert spec.rayVersion == version
        for pod in (spec.headGroupSpec.template.spec, spec.workerGroupSpecs[0].template.spec):
            assert pod.containers[0].image.endswith(f"/{image}")
    for cloud in ("aws", "gcp"):
        tree = yaml.safe_load((CLUSTER / "ray-up" / f"{cloud}.yaml").read_text())
        assert tree["docker"]["image"].endswith(f"/{image}")
    docker = (CLUSTER / "Dockerfile").read_text()
    assert re.search(r"^ARG RAY_VERSION=(\S+)$", docker, re.MULTILINE)[1] == version  # type: ignore[index]
    assert "FROM rayproject/ray:${RAY_VERSION}-py311-${VARIANT}" in docker

    named = {version: 0}
    for path in FILES:
        for found in re.findall(r"(?<![\d.])2\.\d+\.\d+", path.read_text()):
            assert found == version, f"{path} names Ray {found}"
            named[found] += 1
    assert named[version] >= 10


def test_the_image_gets_all_files_of_the_package() -> None:
    """Copied files exist, and neither the Dockerfile nor the ignore file omits what the wheel needs."""
    docker = (CLUSTER / "Dockerfile").read_text()
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", docker, re.MULTILINE) for word in line.split()]
    ignored = (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines()
    kept = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    assert ignored[1] == "*"
    assert sorted(copied) == sorted(kept)
    assert all((ROOT / name).exists() for name in copied)
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = tree["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], PROJECT["readme"], "LICENSE"]
    assert {name.partition("/")[0] for name in needed} <= set(copied)
    entry = [word for name in JOBS for word in manifest(name)["spec"]["entrypoint"].split() if word.startswith("/opt")]
    assert {word.removeprefix("/opt/craft-ray/") for word in entry} <= set(copied)


# ----------------------------------------------------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_scripts_have_no_pitfalls(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    checker = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([checker, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_command_that_names_the_registry_takes_one_with_a_path(tmp_path: Path) -> None:
    (command,) = re.findall(r"^sed .*$", (CLUSTER / "README.md").read_text(), re.MULTILINE)
    shutil.copytree(CLUSTER, tmp_path / "cluster")
    command = command.replace("YOUR-REGISTRY", "registry.io:5000/team")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for path in tmp_path.rglob("*.yaml") for line in path.read_text().splitlines()]
    images = [line for line in lines if "/craft-ray:" in line]
    assert len(images) >= 6
    assert all("registry.io:5000/team/craft-ray:" in line for line in images)


def test_every_script_is_checked() -> None:
    names = {path.name for path in SCRIPTS}
    assert {"resume.sh", "s3.sh", "ray.sbatch"} <= names
    for path in FILES:
        assert not path.read_text().startswith("#!/usr/bin/env bash") or path.name in names


def test_no_file_holds_a_secret() -> None:
    secret = re.compile(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20,}|BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{32,}\b")
    for path in FILES:
        assert not secret.search(path.read_text()), path


def test_resume_sh_starts_a_new_run_and_resumes_a_started_one(tmp_path: Path) -> None:
    """With a `craft-ray` that prints its arguments."""
    script = tmp_path / "bin" / "craft-ray"
    script.parent.mkdir()
    script.write_text('#!/usr/bin/env bash\necho "$@"\nexit 3\n')
    script.chmod(0o755)
    path = os.pathsep.join([str(script.parent), str(Path(sys.executable).parent), os.environ["PATH"]])

    def resume(*words: str, **settings: str) -> tuple[int, str]:
        done = subprocess.run(
            ["bash", CLUSTER / "resume.sh", *words], capture_output=True, text=True, check=False, cwd=tmp_path,
            env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **settings},
        )  # fmt: skip
        return done.returncode, (done.stdout + done.stderr).strip()

    task = {"path": "task.jsonl", "columns": {"prompt": "prompt", "response": "response"}}
    config = {"name": "a", "output_dir": "runs", "model": {"path": "model"}, "task": task, "train": {"steps": 1}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config | {"craft": {"enabled": False}}))
    anew, lora = ("run.yaml", "seed=1"), ("run.yaml", "adapter.r=4")
    assert resume("sweep", "s", "run.yaml", "--space", "craft") == (3, "sweep run.yaml --space craft --out s")
    run, adapted = tmp_path / "runs/a-baseline-seed1", tmp_path / "runs/a-baseline-lora-seed0"
    run.mkdir(parents=True)
    assert resume("train", *anew) == (3, "train run.yaml seed=1"), "no run in an empty folder"
    (run / "config.yaml").touch()
    assert resume("train", *anew) == (3, f"train --resume {run}")
    adapted.mkdir()
    (adapted / "config.yaml").touch()
    assert resume("train", *lora) == (3, f"train --resume {adapted}")
    for result, code in (('{"feasible": true}', 0), ('{"feasible": false, "multiplier": "adaptive"}', 3)):
        (run / "result.json").write_text(result)
        ended = (code, f"resume.sh: the run {run} is finished")
        assert resume("train", *anew) == ended, "a finished run has the exit code that it had"
    (tmp_path / "s").mkdir()
    (tmp_path / "s/sweep.yaml").touch()
    assert resume("sweep", "s", "run.yaml", "--space", "craft") == (3, "sweep --resume s")
    for wrong in ((), ("train",), ("sweep", "s"), ("anchors", "run.yaml")):
        usage = "usage: resume.sh train CONFIG [...], or resume.sh sweep FOLDER CONFIG [...]"
        assert resume(*wrong) == (2, usage)
    code, said = resume("train", "run.yaml", "seed=x")
    assert (code, said.count("\n")) == (2, 0)
    assert said.startswith("resume.sh: ")

    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_REGION": "nowhere"}
    there = ("run.yaml", "output_dir=s3://bucket")
    code, said = resume("train", *there, **keys, AWS_ENDPOINT_URL="http://127.0.0.1:9")
    assert code == 1, "a store that does not answer does not mean a new run"
    assert said.startswith("resume.sh: s3://bucket/a-baseline-seed0/config.yaml could not be accessed")
    assert said.count("\n") == 0


def test_the_readme_of_each_folder_names_its_files() -> None:
    for folder in ("local", "kuberay", "slurm", "ray-up"):
        text = (CLUSTER / folder / "README.md").read_text()
        files = [path.name for path in (CLUSTER / folder).iterdir() if path.is_file() and path.name != "README.md"]
        assert files
        assert all(name in text for name in files), folder
        assert f"({folder}/README.md)" in (CLUSTER / "README.md").read_text()
