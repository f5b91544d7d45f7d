"""The environment of processes on a cluster: which variables of the process that starts them are forwarded.

Ray gives a process the environment of its node, and shows what a job adds to it to everyone who sees the dashboard. So
only names from a list are forwarded, and none of them is a secret: credentials belong in the environment or the files
of the nodes (docs/clusters.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray._private import services  # no public function returns the address behind "auto" or "localhost"

from craft_ray.errors import ConfigError

FORWARDED = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "HF_HUB_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "WANDB_MODE",
    "MUJOCO_GL",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Threads, what not to download, how to render, and where S3 is; never credentials."""

STOPPING = {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "30"}
"""`ray job stop` is an interruption like Ctrl-C: the command has time to print how to resume it."""

JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the process of a job's command."""


def of_job(folder: Path, excludes: Sequence[str], environ: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of a job whose command runs in a copy of `folder`.

    The address of the cluster is not part of it: Ray gives it to the job's command, and `of_driver` to the rest.
    """
    return {
        "working_dir": str(folder),
        "excludes": list(excludes),
        "env_vars": forwarded(environ) | STOPPING,
    }


def of_driver(address: str, environ: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment of a process that joins the cluster at `address` and starts others there.

    It contains the address of their cluster. Without it, Ray Train's clean-up takes the newest cluster of the machine,
    and ends the workers of a run that it does not find there. Ray itself forwards what a job adds.
    """
    env_vars = {} if JOB in environ else forwarded(environ)
    known = None if "://" in address else services.canonicalize_bootstrap_address(address)
    if known is not None:
        env_vars["RAY_ADDRESS"] = known
    return {"env_vars": env_vars} if env_vars else {}


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of `FORWARDED` that are set.

    Raises:
        ConfigError: one of them is a URL with a password.
    """
    found = {name: environ[name] for name in FORWARDED if environ.get(name)}
    for name, value in found.items():
        if "://" in value and "@" in urlsplit(value).netloc:
            raise ConfigError(
                f"{name} is a URL with a user name or password, which the cluster's dashboard would show: remove it"
            )
    return found
