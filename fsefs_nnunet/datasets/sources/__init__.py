"""All converters by name: each is one file in this folder, and one row in labels.json."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from fsefs_nnunet.datasets.source import Source
from fsefs_nnunet.datasets.tables import nearest
from fsefs_nnunet.errors import InputError

_MODULES = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
SOURCES: dict[str, type[Source]] = {
    source.name: source
    for module in _MODULES
    for source in vars(module).values()
    if isinstance(source, type) and issubclass(source, Source) and source is not Source
}


def find_source(name: str) -> Source:
    """The converter called `name`, ignoring case. Raises InputError for an unknown one and names the nearest."""
    for known, source in SOURCES.items():
        if known.lower() == name.lower():
            return source()
    raise InputError(f"No converter {name!r}.{nearest(name, list(SOURCES))} There are: {', '.join(SOURCES)}.")
