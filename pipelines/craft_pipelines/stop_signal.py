"""A signal from the process that watches a run to the run's workers: continue after this validation, or stop.

It is a file in the run folder, because the workers may be on another machine.
"""

from __future__ import annotations

import json
import time

from craft_ray.storage.files import write_atomically
from craft_ray.storage.paths import ObjectPath, StoragePath

POLL_S = 0.05
STORE_POLL_S = 0.5
"""In an object store, where each poll is a request."""


class StopSignal:
    """The latest signal to a run."""

    def __init__(self, folder: StoragePath) -> None:
        self.path = folder / "stop_signal.json"
        self.poll_s = STORE_POLL_S if isinstance(folder, ObjectPath) else POLL_S

    def send(self, step: int, proceed: bool) -> None:
        """Let the run continue after its validation at `step`, or stop."""
        write_atomically(self.path, json.dumps({"step": step, "proceed": proceed}))

    def wait(self, step: int) -> bool:
        """Wait for the signal; returns whether the run continues after its validation at `step`.

        If the watching process is lost, no signal comes: Ray ends these workers with their trainer.
        """
        while True:
            if self.path.exists():
                signal = json.loads(self.path.read_text())
                if signal["step"] >= step or not signal["proceed"]:
                    return bool(signal["proceed"])
            time.sleep(self.poll_s)

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
