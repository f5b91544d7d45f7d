"""What a library prints is dropped, and only that."""

from __future__ import annotations

import threading

import pytest

from craft_ray.quiet import without_prints


def test_only_the_own_thread_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with without_prints():
        print("a library's notice")
        other = threading.Thread(target=print, args=("a step of a run that is followed",))
        other.start()
        other.join()
    print("afterwards")
    assert capsys.readouterr().out == "a step of a run that is followed\nafterwards\n"
