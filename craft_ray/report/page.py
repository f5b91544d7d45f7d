"""Templates of the pages: escaped, strict about names, with numbers formatted for a reader."""

from __future__ import annotations

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, Template

from craft_ray.report import wording


def template(name: str) -> Template:
    """A template of `craft_ray/report` or `craft_ray/sweep`. Both share the style of `style.css.j2`."""
    environment = Environment(
        loader=ChoiceLoader([PackageLoader("craft_ray", "report"), PackageLoader("craft_ray", "sweep")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=wording.percent,
        probability=wording.probability,
        number=wording.number,
        score_of=wording.score_of,
        percent_interval=lambda bounds: wording.interval(bounds, wording.percent),
        score_interval=lambda bounds, metric: wording.interval(bounds, lambda value: wording.score_of(value, metric)),
    )
    return environment.get_template(name)
