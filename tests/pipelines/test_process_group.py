"""What a run on Ray Train starts beside its workers: a light controller, and no process without a task."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from craft_pipelines import session
from craft_pipelines.process_group import ProcessGroupConfig
from craft_pipelines.train import _Trainer
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.util import TrainingFramework


def test_what_the_controller_reads_imports_no_torch() -> None:
    program = (
        "import pickle, sys\n"
        "pickle.loads(sys.stdin.buffer.read()).backend_cls()\n"
        "print('torch' in sys.modules, 'ray.train' in sys.modules)"
    )
    sent = pickle.dumps(ProcessGroupConfig("gloo"))
    done = subprocess.run([sys.executable, "-c", program], input=sent, capture_output=True, check=False)
    assert done.stdout.decode().split() == ["False", "True"], done.stderr.decode()


def test_workers_are_set_up_as_by_rays_own_configuration() -> None:
    ours, theirs = ProcessGroupConfig("nccl"), TorchConfig("nccl")
    assert ours.framework == theirs.framework == TrainingFramework.TORCH
    assert ours.train_func_context is theirs.train_func_context
    assert ours.backend_cls.share_cuda_visible_devices == theirs.backend_cls.share_cuda_visible_devices
    assert ours.backend_cls.has_replica_groups == theirs.backend_cls.has_replica_groups
    assert ours.to_dict().items() <= theirs.to_dict().items()


@pytest.mark.parametrize(("dashboard", "watched"), [(None, True), (True, True), (False, False)])
def test_a_run_is_watched_unless_it_is_certain_that_there_is_no_dashboard(
    dashboard: bool | None, watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever frees a lost run's resources asks the dashboard; in a trial's process it is not known if there is one."""
    monkeypatch.setattr(session, "_dashboard", dashboard)
    trainer = _Trainer(
        lambda: None,
        torch_config=ProcessGroupConfig("gloo"),  # type: ignore[arg-type]
        scaling_config=ScalingConfig(num_workers=1),
    )
    started = [type(callback) for callback in trainer._create_default_callbacks()]
    assert (PlacementGroupCleanerCallback in started) == watched
