"""The choice of classes from a source's labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fsefs_nnunet.datasets.tables import nearest, tables
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import normalised


class Pair(NamedTuple):
    """A label that names both organs of a pair: its values in the source, numbers of right and left in the dataset."""

    whole: str
    values: list[int]
    right: int
    left: int


@dataclass(frozen=True)
class Selection:
    """Which labels a conversion writes, with which numbers."""

    names: tuple[str, ...]  # label i + 1 of the dataset
    numbers: dict[int, int]  # value in the source -> number in the dataset, 0 for background
    pairs: list[Pair]

    @property
    def labels(self) -> dict[str, int]:
        return {"background": 0, **{name: i for i, name in enumerate(self.names, 1)}}

    @property
    def unchanged(self) -> bool:
        """Whether the source's label maps are those of the dataset."""
        return not self.pairs and all(value == number for value, number in self.numbers.items())


def split_by_default(table: dict[str, int], split: list[str]) -> list[str]:
    """Names of a table, with the sides of those in `split` in their place."""
    return [side for name in table for side in (tables()["sides"][name] if name in split else [name])]


def select(table: dict[str, int], wanted: list[str], split: list[str], groups: dict[str, list[str]]) -> Selection:
    """Classes that the user requested, in that order.

    table: the source's labels by name, `split`: those of them that stand for both sides and are split unless the
    whole is requested by name, `groups`: named lists of classes. `wanted`: names of classes, sides or groups, "all";
    empty for all. A lesion that is not requested counts as the organ around it.

    Raises:
        InputError: for names that the table does not have, and for an organ together with its own sides.
    """
    sides = {side: whole for whole in tables()["sides"] if whole in table for side in tables()["sides"][whole]}
    offered = {normalised(name): name for name in [*table, *sides]}
    names: list[str] = []
    for entry in wanted or ["all"]:
        if normalised(entry) in offered:
            names.append(offered[normalised(entry)])
        elif entry.lower() in groups:
            names += groups[entry.lower()]
        elif entry.lower() == "all":
            names += split_by_default(table, split)
        else:
            choice = [*offered.values(), *groups, "all"]
            raise InputError(
                f"No class {entry!r} here.{nearest(entry, choice)} There are: {', '.join(sorted(choice))}."
            )
    names = list(dict.fromkeys(names))
    missing = [name for name in names if name not in offered.values()]
    if missing:
        raise InputError(f"This release has no masks of {', '.join(missing)}: name its classes one by one.")
    both = [name for name in names if sides.get(name) in names]
    if both:
        raise InputError(f"{sides[both[0]]!r} and its part {both[0]!r} cannot both be a label: choose one.")
    number = {name: i for i, name in enumerate(names, 1)}
    owner = {name: name for name in table}
    for organ, lesions in tables()["lesions"].items():
        owner.update({lesion: organ for lesion in lesions if lesion in table and lesion not in number})
    pairs = []
    for whole in dict.fromkeys(sides.values()):
        right, left = (number.get(side, 0) for side in tables()["sides"][whole])
        if right or left:
            pairs.append(Pair(whole, [value for name, value in table.items() if owner[name] == whole], right, left))
    return Selection(tuple(names), {value: number.get(owner[name], 0) for name, value in table.items()}, pairs)
