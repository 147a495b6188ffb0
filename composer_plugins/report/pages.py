"""What all pages share: templates whose every value is escaped, and a missing one is an error."""

from __future__ import annotations

from typing import Any

from composer_plugins.report import charts, tokens


def environment(**filters: Any):
    """Return a Jinja environment of this package's templates, with the common filters and `filters`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Environment(
        loader=PackageLoader("composer_plugins.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters.update(num=charts.number, readable=tokens.readable, **filters)
    return found
