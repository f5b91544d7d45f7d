"""One process at a time, on a disk and in an object store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from craft_ray import claim as module
from craft_ray.claim import claim
from craft_ray.errors import ConfigError
from craft_ray.places import ObjectPath, Place

REFUSAL = ConfigError("taken")


@pytest.fixture(params=["disk", "store"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    if request.param == "disk":
        return tmp_path / "folder" / ".lock"
    for name, seconds in {"BEAT_S": 0.2, "DEAD_S": 2.0, "SETTLE_S": 0.3, "POLL_S": 0.1}.items():
        monkeypatch.setattr(module, name, seconds)
    store: ObjectPath = request.getfixturevalue("object_store")
    return store / tmp_path.name / ".lock"


def test_a_second_one_is_refused_until_the_first_is_done(lock: Place) -> None:
    with claim(lock, REFUSAL), pytest.raises(ConfigError, match="taken"), claim(lock, REFUSAL):
        pass
    with claim(lock, REFUSAL):
        pass


def test_an_error_gives_it_back(lock: Place) -> None:
    with pytest.raises(ZeroDivisionError), claim(lock, REFUSAL):
        raise ZeroDivisionError
    with claim(lock, REFUSAL):
        pass


def test_who_waits_has_it_next(lock: Place) -> None:
    held, order = threading.Event(), []

    def first() -> None:
        with claim(lock, REFUSAL):
            held.set()
            time.sleep(1.5)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    with claim(lock, REFUSAL, wait_s=60):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_an_object_that_stands_still_is_of_a_lost_owner(
    object_store: ObjectPath, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEAD_S", 1.0)
    lock = object_store / tmp_path.name / ".lock"
    lock.write_bytes(b'{"owner": "lost", "beat": "1"}')
    started = time.monotonic()
    with claim(lock, REFUSAL):
        assert time.monotonic() - started >= 1.0
    assert not lock.exists()
