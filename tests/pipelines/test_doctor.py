"""What the doctor finds, with made-up facts and on real clusters; and that no stage starts if nodes do not share its
storage."""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from craft_pipelines import doctor, storage_check
from craft_pipelines.node_facts import PACKAGES, Facts, facts
from craft_pipelines.nodes import Answer, Node

from craft_ray.config import dump_config
from tests.support.clusters import Cluster, cluster
from tests.support.experiments import Digits

GIB = 2**30
NODE = Node("a" * 56, "10.0.0.1", {"CPU": 4.0, "object_store_memory": GIB})
OTHER = Node("b" * 56, "10.0.0.2", {"CPU": 4.0, "object_store_memory": GIB})
LOOPBACK = replace(NODE, address="127.0.0.1")


@pytest.fixture(scope="module")
def here() -> Facts:
    return replace(facts(), shared_memory=2 * GIB)


def with_packages(here: Facts, **versions: str | None) -> Facts:
    return replace(here, packages=here.packages | {name.replace("_", "-"): v for name, v in versions.items()})


def test_the_facts_of_this_machine(here: Facts) -> None:
    assert all(here.packages[name] for name in PACKAGES)
    assert doctor.requirements().keys() >= {"ray", "torch", "transformers", "pyarrow"}


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, "ok", "everywhere"),
        ({"transformers": "5.6.0"}, "warn", "10.0.0.2 (bbbbbb): transformers 5.6.0, here"),
        ({"ray": "2.60.1"}, "FAIL", "ray 2.60.1, here"),
        ({"torch": "2.4.0"}, "FAIL", "torch 2.4.0, craft-ray needs >=2.11"),
        ({"craft_ray": None}, "FAIL", "no craft-ray"),
    ],
)
def test_versions_of_a_node(changes: dict[str, str | None], state: str, words: str, here: Facts) -> None:
    (finding,) = doctor.versions(here, {NODE: here, OTHER: with_packages(here, **changes)})
    assert finding.state == state
    assert words in finding.found
    assert bool(finding.remedy) == (state != "ok")


def test_another_python(here: Facts) -> None:
    major, minor, patch = here.python.split(".")
    for version, state in ((f"{major}.{int(minor) + 1}.0", "FAIL"), (f"{major}.{minor}.{int(patch) + 1}", "warn")):
        (finding,) = doctor.versions(here, {NODE: replace(here, python=version)})
        assert (finding.state, f"Python {version}" in finding.found) == (state, True)


def test_a_node_that_cannot_run_our_code() -> None:
    silent = Answer(None, "ModuleNotFoundError: No module named 'pipelines'")
    (finding,) = doctor.reachable({NODE: Answer(1, None), OTHER: silent})
    assert finding.state == "FAIL"
    assert "1 of 2 node(s) answer; 10.0.0.2 (bbbbbb): ModuleNotFoundError" in finding.found
    assert doctor.reachable({NODE: Answer(1, None)})[0].state == "ok"


def test_resources_and_shared_memory(here: Facts) -> None:
    assert doctor.resources({NODE: here, OTHER: here}).found == "8 CPUs, 0 GPUs"
    hidden = doctor.resources({NODE: replace(here, gpus=2)})
    assert (hidden.state, "2 GPUs, 0 of them offered" in hidden.found) == ("warn", True)
    assert doctor.resources({replace(NODE, resources={"CPU": 0.0}): here}).state == "FAIL"
    assert doctor.shared_memory({NODE: here}).state == "ok"
    assert doctor.shared_memory({NODE: replace(here, shared_memory=64 * 2**20)}).state == "warn"


def test_clocks_authentication_and_dashboard() -> None:
    assert doctor.clocks({NODE: 0.2, OTHER: -0.3}).state == "ok"
    assert doctor.clocks({NODE: 0.2, OTHER: -30.0}).state == "warn"
    assert "10.0.0.2 (bbbbbb): -1000.0 s" in doctor.clocks({NODE: 0.2, OTHER: -1000.0}).found
    assert doctor.clocks({OTHER: -1000.0}).state == "FAIL"
    assert doctor.authentication([NODE], open_to_anyone=True).state == "warn"
    assert doctor.authentication([LOOPBACK], open_to_anyone=True).state == "ok"
    assert doctor.authentication([NODE], open_to_anyone=False).state == "ok"

    def silent(limit: int) -> None:
        raise RuntimeError("no dashboard\nmore")

    assert doctor.state_api(silent).found == "the State API does not answer (no dashboard)"
    assert doctor.state_api(lambda **_: []).state == "ok"


def test_a_table_names_only_the_first_few() -> None:
    nodes = {replace(NODE, id=f"{number:056d}"): "slow" for number in range(5)}
    assert doctor._some(nodes).endswith("; and 2 more")


def test_reading_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is missing, or has other content."""
    monkeypatch.setattr(storage_check, "TIMEOUT_S", 0.2)
    storage_check._write(tmp_path / "asked", "content")
    assert storage_check._missing(tmp_path / "asked", "content") is None
    assert storage_check._missing(tmp_path / "elsewhere" / "asked", "content") == "it is not there"
    assert storage_check._missing(tmp_path / "asked", "other") == "it sees other content"


@pytest.mark.slow
@pytest.mark.ray
def test_a_cluster_in_good_health(token_cluster: Cluster, tmp_path: Path) -> None:
    """As a process of the cluster and, over HTTP, as a job on it; exit code 1 if a folder is missing."""
    joined = token_cluster.command("doctor", "--storage", tmp_path, RAY_ADDRESS=token_cluster.address)
    job = token_cluster.command(
        "doctor", "--address", token_cluster.dashboard, "--storage", tmp_path, "--storage", "/nowhere"
    )
    out, err = joined.communicate(timeout=400)
    assert joined.returncode == 0, out + err
    assert err == ""
    for check, found in (
        ("nodes", "1 of 1 node"),
        ("versions", "ray 2.60"),
        ("storage", "written here and on 1 node"),
        ("authentication", "the cluster requires a token"),
        ("dashboard", "the State API answers"),
    ):
        assert re.search(rf"│ {check}.*│ ok +│ .*{found}", out), out
    assert "FAIL" not in out
    assert not list(tmp_path.iterdir())
    out, err = job.communicate(timeout=400)
    assert job.returncode == 1, out + err
    assert re.search(r"│ storage /nowhere +│ FAIL +│ /nowhere cannot be written to", out)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Cluster, Path]]:
    """A cluster of two nodes, and a path where the second node sees another folder, as if a mount were missing."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("another view of the disk needs the right to unshare")
    folder = tmp_path_factory.mktemp("apart")
    (folder / "hidden").mkdir()
    with cluster(folder, cpus=(1, 1), hidden={1: folder / "hidden"}) as found:
        yield found, folder / "hidden"


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_doctor_sees_a_mount_that_is_missing(apart: tuple[Cluster, Path], tmp_path: Path) -> None:
    found, hidden = apart
    process = found.command("doctor", "--storage", hidden, "--storage", tmp_path, RAY_ADDRESS=found.address)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 1, out + err
    assert re.search(r"│ nodes +│ ok +│ 2 of 2 node", out)
    flat = re.sub(r"\s+", " ", out.replace("│", " "))
    assert "FAIL 1 of 2 node(s) do not share it;" in flat
    assert "it is not there" in flat
    assert "written here and on 2 node(s)" in flat
    assert not list(hidden.iterdir())
    assert not list(tmp_path.iterdir())


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_no_stage_starts_if_nodes_do_not_share_its_storage(
    apart: tuple[Cluster, Path], digits: Digits, tmp_path: Path
) -> None:
    """A refused stage leaves nothing behind; in a folder that both nodes see, the same stages finish."""
    found, hidden = apart
    changes = {
        **digits.scored(), "workers.num_workers": 1, "train.steps": 4, "craft.epsilon_start": 10.0,
        "objective": {"maximize": "new/score", "subject_to": {"old/score": ">= 0.0"}},
        "validation": {"every": 2, **{k.partition(".")[2]: v for k, v in digits.scored(16).items()}},
    }  # fmt: skip

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        process = found.command(*arguments, RAY_ADDRESS=found.address)
        out, err = process.communicate(timeout=400)
        return process.returncode, out, err

    config = tmp_path / "run.yaml"
    config.write_text(dump_config(digits.experiment(tmp_path, changes)))
    refused = "and 1 of 2 nodes do not see what this one writes there"
    remedy = "mount the same storage at this path on every node, or use s3://BUCKET/FOLDER"

    code, _, err = run("anchors", "build", config, f"craft.anchor_cache_dir={hidden / 'anchors'}")
    assert code == 2, err
    assert f"craft-ray: craft.anchor_cache_dir is {hidden / 'anchors'}, {refused}" in err
    assert remedy in err
    code, out, err = run("anchors", "build", config)
    assert code == 0, out + err

    code, _, err = run("train", config, f"output_dir={hidden / 'runs'}")
    assert code == 2, err
    assert f"craft-ray: output_dir is {hidden / 'runs' / 'digits-hidden-seed0'}, {refused}" in err
    assert not list((hidden / "runs").iterdir())
    code, out, err = run("train", config)
    assert code == 0, out + err

    code, _, err = run("sweep", config, "--space", "smoke", "--samples", "2", "--out", hidden / "sweep")
    assert code == 2, err
    assert refused in err
    code, out, err = run("sweep", config, "--space", "smoke", "--samples", "2", "--out", tmp_path / "sweep")
    assert code == 0, out + err


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_the_check_is_quick_once_a_process_has_started(apart: tuple[Cluster, Path], tmp_path: Path) -> None:
    """Prints the seconds of the first and of later checks; a later one takes much less than starting a process."""
    found, _ = apart
    program = (
        "import pathlib, sys, time; from craft_pipelines.session import join\n"
        "from craft_pipelines.storage_check import check_shared\n"
        "join()\n"
        "for _ in range(5):\n"
        "    before = time.perf_counter()\n"
        "    check_shared(pathlib.Path(sys.argv[1]), 'x')\n"
        "    print(time.perf_counter() - before)\n"
    )
    before = time.monotonic()
    done = found.python(program, tmp_path)
    out, err = done.communicate(timeout=400)
    assert done.returncode == 0, err
    seconds = [float(line) for line in out.splitlines() if line.replace(".", "").isdigit()]  # not what Ray's start says
    assert len(seconds) == 5, out
    print(f"storage check: {seconds}, {time.monotonic() - before:.1f} s in total")
    assert min(seconds[1:]) < 1.0
