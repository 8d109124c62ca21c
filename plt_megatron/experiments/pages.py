"""HTML pages out of the templates beside this file: everything inside them, no script, nothing fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from plt_megatron.experiments.figures import svg
from plt_megatron.extras import require

TEMPLATES = Path(__file__).with_name("templates")


def check_packages() -> None:
    """`UserError` if the extra `report` is not installed: before a measurement, not after it."""
    require("a report", "jinja2", "scipy")


def render(template: str, **values: Any) -> str:
    """The page of a template. All values are escaped; figures (`Named`) become `<svg>` by the filter `svg`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["svg"] = lambda named: Markup(svg(named))
    return environment.get_template(template).render(values)
