"""One process at a time, on a disk and in an object store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from craft_ray.errors import ConfigError
from craft_ray.storage import lock as module
from craft_ray.storage.lock import exclusive_lock
from craft_ray.storage.paths import ObjectPath, StoragePath

REFUSAL = ConfigError("taken")


@pytest.fixture(params=["disk", "store"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoragePath:
    if request.param == "disk":
        return tmp_path / "folder" / ".lock"
    for name, seconds in {"RENEW_S": 0.2, "EXPIRE_S": 2.0, "SETTLE_S": 0.3, "POLL_S": 0.1}.items():
        monkeypatch.setattr(module, name, seconds)
    store: ObjectPath = request.getfixturevalue("object_store")
    return store / tmp_path.name / ".lock"


def test_a_second_process_is_refused_until_the_first_is_done(lock: StoragePath) -> None:
    with exclusive_lock(lock, REFUSAL), pytest.raises(ConfigError, match="taken"), exclusive_lock(lock, REFUSAL):
        pass
    with exclusive_lock(lock, REFUSAL):
        pass


def test_an_error_releases_the_lock(lock: StoragePath) -> None:
    with pytest.raises(ZeroDivisionError), exclusive_lock(lock, REFUSAL):
        raise ZeroDivisionError
    with exclusive_lock(lock, REFUSAL):
        pass


def test_a_waiting_process_gets_the_lock_next(lock: StoragePath) -> None:
    held, order = threading.Event(), []

    def first() -> None:
        with exclusive_lock(lock, REFUSAL):
            held.set()
            time.sleep(1.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with exclusive_lock(lock, REFUSAL, wait_s=60):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_an_object_that_is_not_renewed_belongs_to_a_lost_owner(
    object_store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "EXPIRE_S", 1.0)
    lock = object_store / tmp_path.name / ".lock"
    lock.write_bytes(b'{"owner": "lost", "beat": "1"}')
    started = time.monotonic()
    with exclusive_lock(lock, REFUSAL):
        assert time.monotonic() - started >= 1.0
    assert not lock.exists()
