"""dataset.json of a dataset in nnU-Net's layout: the one place where it is read and checked."""

from __future__ import annotations

import json
import locale
from collections.abc import Iterator
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import foreground, label_values, without_text


def channel_names(dataset_json: dict) -> dict[str, str]:
    """By position. nnU-Net reads the older name of the key, too."""
    return dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"]


def shows_ct(dataset_json: dict) -> bool:
    """Whether the first channel is CT, by the name that makes nnU-Net normalise it as one."""
    return next(iter(channel_names(dataset_json).values())).casefold() == "ct"


def read_dataset_json(file: Path) -> dict:
    """The content of `file`, with `channel_names` whatever the file calls them, and labels as numbers.

    Raises:
        InputError: if it cannot be read, or holds what nnU-Net or the 3D adapters cannot take. The text says what each
            wrong line should be.
    """
    content = _content(Path(file))
    if problems := list(_problems(content)):
        raise InputError(f"{file}: {' '.join(problems)}")
    labels = without_text(content["labels"])
    try:
        LabelManager(labels, content.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # what nnU-Net has learnt to refuse since
        raise InputError(f"{file}: nnU-Net refuses its labels: {error}") from error
    return {**content, "channel_names": channel_names(content), "labels": labels}


def _content(file: Path) -> dict:
    try:
        raw = file.read_bytes()
        text = raw.decode("utf-8")
        content = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no dataset.json of nnU-Net's ({error}): repair or replace it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is no dataset.json of nnU-Net's (it holds no object): repair or replace it.")
    # nnU-Net opens it in the encoding of the locale
    if not text.isascii() and "utf" not in locale.getpreferredencoding(False).lower():
        odd = next(c for c in text if not c.isascii())
        raise InputError(
            f"{file} holds letters like {ascii(odd)}, which nnU-Net cannot read in this locale "
            f"({locale.getpreferredencoding(False)}): export PYTHONUTF8=1, or spell the names in plain letters."
        )
    return content


def _line(key: str, value: object) -> str:
    return f'"{key}": {json.dumps(value, ensure_ascii=False)}'


def _problems(content: dict) -> Iterator[str]:
    """What is wrong, one sentence each."""
    yield from _of_channels(content)
    yield from _of_ending(content)
    if isinstance(content.get("labels"), dict) and content["labels"]:
        yield from _of_labels(content["labels"])
        yield from _of_regions(content)
    else:
        yield f"it has no labels: add {_line('labels', {'background': 0, 'NAME': 1})}."
    if not isinstance(content.get("numTraining", 0), (int, str)) or not str(content.get("numTraining", 0)).isdecimal():
        yield f"numTraining is {content['numTraining']!r}: give the number of training cases, or leave it out."


def _of_channels(content: dict) -> Iterator[str]:
    key = "modality" if "modality" in content else "channel_names"
    names = content.get(key)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        names_line = _line(key, {str(i): name for i, name in enumerate(names)})
        yield f"{key} is a list: write {names_line}."
    elif not isinstance(names, dict) or not names:
        yield f"it does not say channel_names: add {_line('channel_names', {'0': 'CT'})}, or what the images are."
    elif all(str(value).isdecimal() for value in names.values()) and not any(n.isdecimal() for n in names):
        turned = {str(value): name for name, value in sorted(names.items(), key=lambda item: int(item[1]))}
        yield f"{key} has names and numbers the wrong way round: write {_line(key, turned)}."
    elif not all(isinstance(name, str) for name in names.values()):
        yield f"{key} holds something else than names: write {_line(key, {str(i): 'NAME' for i in range(len(names))})}."
    elif [str(number) for number in names] != [str(i) for i in range(len(names))]:
        counted = {str(i): name for i, name in enumerate(names.values())}
        yield f"{key} is not numbered 0, 1, 2, ... in this order: write {_line(key, counted)}, or what is meant."


def _of_ending(content: dict) -> Iterator[str]:
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.strip("."):
        yield f"it does not say file_ending: add {_line('file_ending', '.nii.gz')}, or what the files end with."
    elif not ending.startswith("."):
        yield f"file_ending {ending!r} has no dot: write {_line('file_ending', f'.{ending}')}."


def _of_labels(labels: dict) -> Iterator[str]:
    if all(name.isdecimal() for name in labels) and all(isinstance(value, str) for value in labels.values()):
        turned = {name: int(value) for value, name in sorted(labels.items(), key=lambda item: int(item[0]))}
        yield f"labels has names and values the wrong way round: write {_line('labels', turned)}."
        return
    bad = [name for name, value in labels.items() if not _is_value(value)]
    if bad:
        yield (
            f"label {bad[0]!r} has the value {labels[bad[0]]!r}: write a whole number from 0 on, or a list of them for "
            "a region."
        )
        return
    labels = without_text(labels)
    if labels.get("background") != 0:
        found = f"background is {labels['background']}" if "background" in labels else "labels has no background"
        yield f"{found}: it must be {_line('background', 0)}, in the label maps as well."
        return
    if not foreground(labels):
        yield "labels names nothing but background: add what is to be segmented."
        return
    single = {name: value for name, value in labels.items() if not isinstance(value, list)}
    by_value: dict[int, str] = {}
    for name, value in single.items():
        if value in by_value:
            yield f"labels {by_value[value]!r} and {name!r} have the same value {value}: give each its own."
            return
        by_value[value] = name
    yield from _of_order(labels)


def _of_order(labels: dict) -> Iterator[str]:
    known = {name: value for name, value in labels.items() if name != "ignore"}
    values = sorted(label_values(known))
    gaps = [value for before, value in zip(values, values[1:]) if value != before + 1]
    number = {value: i for i, value in enumerate(values)}
    renumbered = {
        name: [number[one] for one in value] if isinstance(value, list) else number[value]
        for name, value in known.items()
    }
    if "ignore" in labels:
        renumbered["ignore"] = len(values)
    if isinstance(labels.get("ignore"), list):
        yield f"the ignore label must be one number: write {_line('ignore', len(values))}."
    elif labels.get("ignore", max(values) + 1) <= max(values):
        yield (
            f"the ignore label is {labels['ignore']}, it must be the highest value: write "
            f"{_line('labels', renumbered)} and renumber the label maps."
        )
    elif gaps or labels.get("ignore", len(values)) != len(values):
        gaps = gaps or [labels["ignore"]]
        yield (
            f"labels must be in consecutive order (0, 1, 2, ...), {', '.join(map(str, gaps))} do not satisfy this: "
            f"write {_line('labels', renumbered)} and renumber the label maps."
        )


def _of_regions(content: dict) -> Iterator[str]:
    if not all(_is_value(value) for value in content["labels"].values()):
        return
    labels = foreground(without_text(content["labels"]))
    if not any(isinstance(value, list) for value in labels.values()):
        return  # nnU-Net ignores the order then
    order, names = content.get("regions_class_order"), [name for name, value in labels.items() if value != [0]]
    if not isinstance(order, list) or len(order) != len(names) or not all(type(value) is int for value in order):
        proposed = [value[0] if isinstance(value, list) else value for value in (labels[name] for name in names)]
        found = "regions need regions_class_order" if order is None else f"regions_class_order is {order}"
        yield (
            f"{found}: it must have one value for each of {', '.join(names)}, which a prediction writes for it, the "
            f"innermost last; {_line('regions_class_order', proposed)}, perhaps."
        )


def _is_value(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        # nnU-Net turns numbers in quotes into numbers, but not within regions
        return bool(value) and all(type(one) is int and one >= 0 for one in value)
    if isinstance(value, str):
        return value.isdecimal()
    return type(value) in (int, float) and value >= 0 and value == int(value)
