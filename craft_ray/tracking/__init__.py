"""Where numbers go beside the run folder."""

from craft_ray.tracking.tracker import *  # noqa: F403
