"""`craft-ray submit`: a command as a job on a cluster, with its log here and its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import cast

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from craft_pipelines.authentication import refused
from craft_pipelines.runtime_env import of_job
from craft_pipelines.shadowed import shadowed
from craft_pipelines.submitted import check_outputs
from craft_pipelines.submitted_inputs import check_inputs
from craft_pipelines.working_dir import check_size, contents, excludes
from craft_ray.errors import ConfigError, CraftError, Interrupted, first_line
from craft_ray.storage.files import readable_bytes

DASHBOARD = "http://127.0.0.1:8265"
TIMEOUT_S = 60.0
"""How long a cluster that no longer answers is tried again while its job is followed."""

POLL_S = 0.2

VERBOSE_LOGGERS = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env")
"""Loggers of Ray that report each step of an upload."""

NOT_FOUND = 127
"""Exit code of a shell if it does not find the command."""


def submit(command: Sequence[str], address: str | None, folder: Path, wait: bool) -> int:
    """Run `command` in a copy of `folder` on the cluster.

    Args:
        command: its words; a single one is a command line for the shell of the cluster.

    Returns:
        The exit code of the command; 0 if not `wait`.

    Raises:
        ConfigError: no cluster answers, it refuses us, or it does not take the folder; or the command names a config
            that is not in the folder's copy, or one with a path that is not.
        CraftError: the job did not start, or the cluster no longer answers.
        Interrupted: the job was stopped, or following it was; then the job keeps running.
    """
    for name in VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = folder.absolute()
    check_outputs(command, folder)
    patterns = excludes(folder)
    size = check_size(folder, patterns)
    check_inputs(command, folder, patterns)
    if names := shadowed(folder, contents(folder, patterns)):
        print(
            f"warning: the working directory has {', '.join(names)}, which Ray imports in place of the installed "
            f"modules of those names: rename them, or exclude them in a .rayignore",
            flush=True,
        )
    address = dashboard(address)
    client = connect(address)
    entrypoint = command[0] if len(command) == 1 else shlex.join(command)
    try:
        job = client.submit_job(entrypoint=entrypoint, runtime_env=of_job(folder, patterns, os.environ))
    except (RayError, RuntimeError, requests.RequestException) as error:
        raise CraftError(f"the cluster at {address} does not take the job ({first_line(error)})") from None
    print(f"job {job} on {address}, working directory {folder} ({readable_bytes(size)})", flush=True)
    if not wait:
        for line in hints(address, job):
            print(line)
        return 0
    try:
        info = Log(client, job).follow()
    except KeyboardInterrupt:
        raise Interrupted("; ".join([f"interrupted: the job {job} keeps running", *hints(address, job)])) from None
    except ConnectionError:
        remedies = "; ".join(hints(address, job))
        raise CraftError(
            f"the cluster at {address} no longer answers; the job {job} may still run; {remedies}"
        ) from None
    return outcome(info, entrypoint)


def dashboard(address: str | None) -> str:
    """The address to which jobs are submitted: `address`, or the one in the environment, or this machine."""
    named = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if named:
        return named.rstrip("/") if "://" in named else f"http://{named}"
    joined = os.environ.get("RAY_ADDRESS")
    if not joined:
        return DASHBOARD
    if not joined.startswith(("http://", "https://")):
        raise ConfigError(
            f"RAY_ADDRESS is {joined}, the address for processes of the cluster; jobs go to its dashboard: give that, "
            f"e.g. --address {DASHBOARD}, or set RAY_API_SERVER_ADDRESS"
        )
    return joined


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's dashboard.

    Raises:
        ConfigError: no dashboard answers at `address`, or it refuses us.
    """
    before = os.environ.get("RAY_API_SERVER_ADDRESS")
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # the client prefers the environment to its argument
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise refused(address) from None
    except (ConnectionError, RuntimeError, ValueError, AssertionError, requests.RequestException) as error:
        raise ConfigError(
            f"no dashboard of a Ray cluster answers at {address} ({first_line(error)}): start the cluster, or give its "
            f"dashboard, --address http://HOST:8265"
        ) from None
    finally:
        del os.environ["RAY_API_SERVER_ADDRESS"]
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before


class Log:
    """The log of a job, printed as it grows."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client = client
        self._job = job
        self._shown = 0
        """Characters printed so far."""

    def follow(self) -> JobDetails:
        """Print until the job has ended. A broken connection is opened again.

        Raises:
            ConnectionError: the cluster does not answer for `TIMEOUT_S`.
        """
        answered = time.monotonic()
        while True:
            try:
                asyncio.run(self._print())
                info = self._client.get_job_info(self._job)
            except (aiohttp.ClientError, requests.RequestException, RayError, RuntimeError, OSError) as error:
                if time.monotonic() - answered > TIMEOUT_S:
                    raise ConnectionError(str(error)) from None
                time.sleep(10 * POLL_S)
                continue
            if JobStatus(info.status).is_terminal():
                return info
            answered = time.monotonic()
            time.sleep(POLL_S)  # the log ends a moment before the job does

    async def _print(self) -> None:
        """Print as long as the connection lasts. A new connection starts from the first line again."""
        position = 0
        # Closed here and not when it is collected: Ctrl-C between two texts would leave that to a loop that has ended.
        log = cast(AsyncGenerator[str], self._client.tail_job_logs(self._job))
        async with aclosing(log) as texts:
            async for text in texts:
                position += len(text)
                if position > self._shown:
                    sys.stdout.write(text[-(position - self._shown) :])
                    sys.stdout.flush()
                    self._shown = position


def outcome(info: JobDetails, entrypoint: str) -> int:
    """The exit code of a job that has ended, as a shell would report it.

    Raises:
        CraftError: the job never started, or was lost.
        Interrupted: the job was stopped.
    """
    status, code = JobStatus(info.status), info.driver_exit_code
    if status == JobStatus.SUCCEEDED:
        return 0
    if status == JobStatus.STOPPED:
        raise Interrupted(f"the job {info.submission_id} was stopped")
    if code is None:
        raise CraftError(f"the job {info.submission_id} failed: {first_line(info.message)}")
    if code == NOT_FOUND:
        raise CraftError.from_message(
            f"the cluster does not find the command ({entrypoint}): it is looked for on the PATH of the head's "
            f"`ray start`; install craft-ray there, or start Ray with its environment activated",
            NOT_FOUND,
        )
    return code if code >= 0 else 128 - code


def hints(address: str, job: str) -> list[str]:
    at = f"--address {address}"
    return [
        f"follow it: ray job logs {at} --follow {job}",
        f"its state: ray job status {at} {job}",
        f"stop it: ray job stop {at} {job}",
    ]
