"""One label table for several sources: classes, values, regions, and which source annotates what."""

from __future__ import annotations

from dataclasses import dataclass

from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.errors import InputError

ALL = "all_classes"


@dataclass(frozen=True)
class CommonLabels:
    """labels: nnU-Net's, background included, wholes before their parts so that the parts are painted over them.

    values: source -> its label -> value in the assembly, 0 if the template has no place for it.
    annotated: source -> classes it annotates, the mask w of Eq. (1).
    """

    labels: dict[str, int | list[int]]
    regions_class_order: list[int]
    values: dict[str, dict[str, int]]
    annotated: dict[str, list[str]]


def annotates(names: set[str], structure: str) -> bool:
    """Whether a source with labels `names` annotates `structure`: by its own label, or by all of its parts."""
    parts = tables()["unions"].get(structure)
    return structure in names or bool(parts and all(annotates(names, part) for part in parts))


def target_class(names: set[str], name: str, classes: list[str]) -> str | None:
    """Class to which voxels of label `name` belong: itself, the organ around a lesion, the whole of all its parts."""
    if name in classes:
        return name
    for organ, lesions in tables()["lesions"].items():
        if name in lesions and annotates(names, organ):
            return target_class(names, organ, classes)
    for whole, parts in tables()["unions"].items():
        if name in parts and annotates(names, whole):
            return target_class(names, whole, classes)
    return None


def common_labels(sources: dict[str, list[str]], template: list[str] | None) -> CommonLabels:
    """The table of an assembly.

    sources: source -> its labels' canonical names. template: classes in their order, None for all labels of all
    sources. A class that no source annotates is left out; wholes of which the template has all parts ("kidneys") are
    added, so that a source that does not separate the sides counts too. Sigmoid outputs need at least one region of
    several values: if no class is one, `all_classes` is added.

    Raises:
        InputError: for a source with no label in the template, and if only one class remains.
    """
    have = {source: set(names) for source, names in sources.items()}
    goal = list(template or dict.fromkeys(name for names in sources.values() for name in names))
    for whole, parts in reversed(tables()["unions"].items()):
        if whole not in goal and set(parts) <= set(goal):
            goal.append(whole)
    classes = [name for name in goal if any(annotates(names, name) for names in have.values())]
    holders = {
        source: {name: target_class(have[source], name, classes) for name in sources[source]} for source in sources
    }
    outside = [source for source in sources if not any(holders[source].values())]
    if outside:
        raise InputError(f"No label of {outside[0]} is in the template: leave it out, or use --template union.")
    filled = {name for mapped in holders.values() for name in mapped.values()}
    value = {name: i for i, name in enumerate((name for name in classes if name in filled), 1)}
    if len(value) < 2:
        raise InputError(f"The sources have only one class in all, {classes[0]}: there is nothing to mask.")
    regions = {name: _region(name, value, classes) for name in classes}
    if all(len(region) == 1 for region in regions.values()):
        regions[ALL] = list(value.values())
    order = sorted(regions, key=lambda name: -len(regions[name]))
    told = {
        source: [
            name
            for name in order
            if annotates(names, name) or (name == ALL and all(annotates(names, one) for one in classes))
        ]
        for source, names in have.items()
    }
    return CommonLabels(
        {"background": 0, **{n: regions[n] if len(regions[n]) > 1 else regions[n][0] for n in order}},
        # what stock prediction paints: for ALL, which may be untrained, the background
        [0 if name == ALL else value.get(name, regions[name][0]) for name in order],
        {s: {name: value.get(to, 0) for name, to in mapped.items()} for s, mapped in holders.items()},
        told,
    )


def _region(name: str, value: dict[str, int], classes: list[str]) -> list[int]:
    """Values of a class, of its parts and of the lesions in it, its own first."""
    inside = [*tables()["unions"].get(name, []), *tables()["lesions"].get(name, [])]
    values = [value[name]] if name in value else []
    for part in inside:
        values += _region(part, value, classes) if part in classes else []
    return list(dict.fromkeys(values))
