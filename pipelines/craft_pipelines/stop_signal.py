"""A word between the process that watches a run and the run's workers: go on after this look, or end.

It is a file in the run folder, for the workers may be on another machine.
"""

from __future__ import annotations

import json
import time

from craft_ray.storage.files import write_atomically
from craft_ray.storage.paths import ObjectPath, StoragePath

POLL_S = 0.05
STORE_POLL_S = 0.5
"""In an object store, where each look is a request."""


class StopSignal:
    """The last word about a run."""

    def __init__(self, folder: StoragePath) -> None:
        self.path = folder / "word.json"
        self.poll_s = STORE_POLL_S if isinstance(folder, ObjectPath) else POLL_S

    def say(self, step: int, go_on: bool) -> None:
        write_atomically(self.path, json.dumps({"step": step, "go_on": go_on}))

    def wait(self, step: int) -> bool:
        """Whether the run goes on after the look at `step`.

        Where the process that watches is lost, nobody says anything: Ray ends these workers with their trainer.
        """
        while True:
            if self.path.exists():
                told = json.loads(self.path.read_text())
                if told["step"] >= step or not told["go_on"]:
                    return bool(told["go_on"])
            time.sleep(self.poll_s)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
