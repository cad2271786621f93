"""Matching of the dataset's label names with the backbone's classes."""

from __future__ import annotations

import re

from fsefs_nnunet.errors import InputError

# Spellings of one structure; names are compared in the form that `normalised` gives.
_ALIASES = {
    "kidney_right": ["right_kidney", "rkidney", "kidney_r"],
    "kidney_left": ["left_kidney", "lkidney", "kidney_l"],
    "kidneys": ["kidney"],
    "inferior_vena_cava": ["postcava", "ivc", "cava", "postcava_ivc"],
    "gallbladder": ["gall_bladder"],
    "esophagus": ["oesophagus"],
    "spleen": ["spl"],
    "vertebrae": ["spine", "vertebral_column"],
}
_CANONICAL = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def normalised(name: str) -> str:
    """Lower case, words joined by '_', aliases replaced: 'Left Kidney' -> 'kidney_left'."""
    name = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return _CANONICAL.get(name, name)


def match_labels(names: list[str], classes: tuple[str, ...]) -> dict[str, str]:
    """Which of the dataset's label `names` the backbone knows, and as which of its `classes`.

    Raises:
        InputError: if two of the backbone's classes, or two labels, are the same structure.
    """
    matches: dict[str, str] = {}
    for name in names:
        known = [c for c in classes if normalised(c) == normalised(name)]
        if len(known) > 1:
            raise InputError(f"Label {name!r} matches the backbone's classes {known}: rename it in dataset.json.")
        if known and known[0] in matches.values():
            raise InputError(f"Two labels match the backbone's class {known[0]!r}: rename one of them in dataset.json.")
        if known:
            matches[name] = known[0]
    return matches


def foreground_names(labels: dict, has_regions: bool) -> list[str]:
    """Names of the network's foreground outputs in their order: regions as listed in dataset.json, labels by value."""
    names = [name for name in labels if name not in ("background", "ignore")]
    return names if has_regions else sorted(names, key=lambda name: labels[name])
