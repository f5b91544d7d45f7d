"""What an experiment is about, in the user's words."""

from __future__ import annotations

from craft_ray.config.types import Section


class AboutConfig(Section):
    """What the skills are, in words, for the report. Without them it describes the data that they are scored on."""

    old: str | None = None
    """E.g. `answering questions about invoices`."""
    new: str | None = None
