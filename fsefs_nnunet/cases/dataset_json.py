"""dataset.json of a dataset in nnU-Net's layout: the one place where it is read and checked."""

from __future__ import annotations

import json
import locale
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path

from nnunetv2.utilities.label_handling.label_handling import LabelManager

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import as_numbers, foreground, label_values

MOST_TRIED = 6  # up to this many regions, every order is tried


def channel_names(dataset_json: dict) -> dict[str, str]:
    """The names by position. Like nnU-Net, this also reads the older name of the key."""
    return dataset_json["modality"] if "modality" in dataset_json else dataset_json["channel_names"]


def shows_ct(dataset_json: dict) -> bool:
    """Whether the first channel is CT, by the name that makes nnU-Net normalise it as one."""
    return next(iter(channel_names(dataset_json).values())).casefold() == "ct"


def read_dataset_json(file: Path) -> dict:
    """The content of `file`, with the key `channel_names` whatever the file calls it, and labels as numbers.

    Raises:
        InputError: if it cannot be read, or contains something that nnU-Net or the 3D adapters do not support. The
            message says what each wrong line should be.
    """
    content = _content(Path(file))
    if problems := list(_problems(content)):
        raise InputError(f"{file}: {' '.join(problems)}")
    try:
        LabelManager(content["labels"], content.get("regions_class_order"))
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:  # rules of newer versions of nnU-Net
        raise InputError(f"{file}: nnU-Net rejects its labels: {error}") from error
    return {**content, "channel_names": channel_names(content), "labels": as_numbers(content["labels"])}


def order_warnings(dataset_json: dict) -> list[str]:
    """At most one sentence, about regions that hide each other: nnU-Net paints them one after the other."""
    regions, order = _regions(dataset_json["labels"]), dataset_json.get("regions_class_order")
    if not any(isinstance(value, list) for value in dataset_json["labels"].values()) or not order:
        return []
    wrong = _hidden(regions, order)
    if not wrong:
        return []
    changes = ", ".join(f"{value} becomes {made}" for value, made in wrong.items())
    return [
        f"With regions_class_order {order}, a correct segmentation has other values than the label map: {changes}. "
        f"{_order_remedy(dataset_json['labels'])}"
    ]


def _regions(labels: dict) -> dict[str, list[int]]:
    """The regions that nnU-Net paints: all but those that are only background."""
    values = {name: value if isinstance(value, list) else [value] for name, value in foreground(labels).items()}
    return {name: value for name, value in values.items() if set(value) != {0}}


def _hidden(regions: dict[str, list[int]], order: list[int]) -> dict[int, int]:
    """Values that nnU-Net paints as other values even if all regions are predicted correctly, and what they become.

    Values that lie in the same regions cannot be told apart, whatever the order: they may become each other.
    """
    of_value = {v: tuple(v in region for region in regions.values()) for region in regions.values() for v in region}
    hidden = {}
    for value, inside in sorted(of_value.items()):
        made = [paint for paint, is_in in zip(order, inside) if is_in][-1]
        if value and of_value.get(made) != inside:
            hidden[value] = made
    return hidden


def _order_remedy(labels: dict) -> str:
    """The lines of dataset.json with which every value is painted as itself, if there are such lines."""
    regions = _regions(labels)
    outer_first = sorted(regions, key=lambda name: -len(set(regions[name])))
    for names in permutations(outer_first) if len(outer_first) <= MOST_TRIED else [outer_first]:
        order = []
        for i, name in enumerate(names):
            later = {value for other in names[i + 1 :] for value in regions[other]}
            order.append(next((value for value in regions[name] if value and value not in later), regions[name][0]))
        if not _hidden({name: regions[name] for name in names}, order):
            others = {name: value for name, value in labels.items() if name not in regions and name != "ignore"}
            ignore = {"ignore": labels["ignore"]} if "ignore" in labels else {}
            ordered = {**others, **{name: labels[name] for name in names}, **ignore}
            return f"Outer regions come first: write {_line('labels', ordered)}, {_line('regions_class_order', order)}."
    return "Each region needs a value that no region after it has."


def _content(file: Path) -> dict:
    try:
        raw = file.read_bytes()
        if raw.startswith(BOM_UTF8):
            raise InputError(f"{file} starts with a byte order mark: save it as UTF-8 without BOM.")
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=partial(_named_once, file))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not an nnU-Net dataset.json ({error}): repair or replace it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} is not an nnU-Net dataset.json (it is not an object): repair or replace it.")
    # nnU-Net opens it in the encoding of the locale
    encoding = locale.getpreferredencoding(False)
    try:
        seen = json.loads(raw.decode(encoding))
    except ValueError:
        seen = None
    if seen is None or any(
        seen.get(key) != content.get(key) for key in ("labels", "channel_names", "modality", "dataset")
    ):
        raise InputError(
            f"{file} has non-ASCII names, which nnU-Net reads wrongly in this locale ({encoding}): set PYTHONUTF8=1, "
            "or use plain letters."
        )
    return content


def _named_once(file: Path, pairs: list[tuple[str, object]]) -> dict:
    """JSON silently keeps the last of several entries with the same name."""
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise InputError(f"{file} names {twice[0]!r} twice: give each its own name.")
    return dict(pairs)


def _line(key: str, value: object) -> str:
    return f'"{key}": {json.dumps(value, ensure_ascii=False)}'


def _problems(content: dict) -> Iterator[str]:
    """What is wrong, one sentence each."""
    yield from _of_channels(content)
    yield from _of_ending(content)
    labels = content.get("labels")
    if isinstance(labels, dict) and labels:
        problems = list(_of_labels(labels))
        yield from problems or _of_regions(content)
    elif isinstance(labels, list) and labels and all(isinstance(name, str) for name in labels):
        yield f"labels is a list: write {_line('labels', {name: i for i, name in enumerate(labels)})}."
    else:
        yield f"labels is missing: add {_line('labels', {'background': 0, 'NAME': 1})}."
    stated = content.get("numTraining")
    if stated is not None and not (_is_value(stated) and not isinstance(stated, list)):
        yield f"numTraining is {stated!r}: give the number of training cases, or leave it out."


def _of_channels(content: dict) -> Iterator[str]:
    key = "modality" if "modality" in content else "channel_names"
    names = content.get(key)
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        names_line = _line(key, {str(i): name for i, name in enumerate(names)})
        yield f"{key} is a list: write {names_line}."
    elif not isinstance(names, dict) or not names:
        yield f"channel_names is missing: add {_line('channel_names', {'0': 'CT'})}, or what the images are."
    elif all(str(value).isdecimal() for value in names.values()) and not any(n.isdecimal() for n in names):
        turned = {str(value): name for name, value in sorted(names.items(), key=lambda item: int(item[1]))}
        yield f"{key} has names and numbers swapped: write {_line(key, turned)}."
    elif not all(isinstance(name, str) for name in names.values()):
        yield f"{key} must map numbers to names: write {_line(key, {str(i): 'NAME' for i in range(len(names))})}."
    elif all(n.isdecimal() for n in names) and list(names) != sorted(names, key=int):
        ordered = {str(i): names[n] for i, n in enumerate(sorted(names, key=int))}
        yield f"{key} is out of order, and nnU-Net relies on the order: write {_line(key, ordered)}."


def _of_ending(content: dict) -> Iterator[str]:
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.strip("."):
        yield f"file_ending is missing: add {_line('file_ending', '.nii.gz')}, or what the files end with."
    elif ending != ending.strip(" *") or ending.lower() == ".gz":
        right = ".nii.gz" if "gz" in ending else ending.strip(" *")
        yield f"file_ending is {ending!r}: write {_line('file_ending', right)}."
    elif not ending.startswith("."):
        yield f"file_ending {ending!r} has no dot: write {_line('file_ending', f'.{ending}')}."


def _of_labels(labels: dict) -> Iterator[str]:
    if all(name.isdecimal() for name in labels) and all(isinstance(value, str) for value in labels.values()):
        turned = {name: int(value) for value, name in sorted(labels.items(), key=lambda item: int(item[0]))}
        yield f"labels has names and values swapped: write {_line('labels', turned)}."
        return
    bad = [name for name, value in labels.items() if not _is_value(value)]
    if bad:
        yield (
            f"label {bad[0]!r} has the value {labels[bad[0]]!r}: write an integer from 0 upwards, or a list of "
            "integers for a region."
        )
        return
    if "ignore" in labels and type(labels["ignore"]) is not int:
        highest = max(label_values(as_numbers({n: v for n, v in labels.items() if n != "ignore"})), default=0)
        yield f"ignore is {labels['ignore']!r}: it must be one number, write {_line('ignore', highest + 1)}."
        return
    if isinstance(labels.get("background"), list):
        yield f"background is {labels['background']}: it must be {_line('background', 0)}."
        return
    labels = as_numbers(labels)
    spelled = [name for name in labels if name != name.lower() and name.lower() in ("background", "ignore")]
    if spelled:
        right = spelled[0].lower()
        yield f"nnU-Net only recognises {right!r} in lower case: write {_line(right, labels[spelled[0]])}."
        return
    if labels.get("background") != 0:
        found = f"background is {labels['background']}" if "background" in labels else "labels has no background"
        yield f"{found}: it must be {_line('background', 0)}, in the label maps as well."
        return
    if not foreground(labels):
        yield "labels names nothing but background: add the structures to segment."
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
    if labels.get("ignore", max(values) + 1) <= max(values):
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
    labels = as_numbers(content["labels"])
    if not any(isinstance(value, list) for value in labels.values()):
        return  # nnU-Net ignores the order then
    order, names = content.get("regions_class_order"), list(_regions(labels))
    if not isinstance(order, list) or len(order) != len(names) or not all(type(value) is int for value in order):
        found = "regions need regions_class_order" if order is None else f"regions_class_order is {order}"
        yield (
            f"{found}: it must have one value for each of {', '.join(names)}, which a prediction writes for it. "
            f"{_order_remedy(labels)}"
        )
    elif unknown := [value for value in order if value not in {0, *label_values(labels)}]:
        yield f"regions_class_order has {unknown[0]}, which is not a value in labels. {_order_remedy(labels)}"


def _is_value(value: object) -> bool:
    if isinstance(value, list):
        # nnU-Net turns numbers in quotes into numbers, but not within regions
        return bool(value) and all(type(one) is int and one >= 0 for one in value)
    if isinstance(value, str):
        return value.isdecimal()
    return type(value) in (int, float) and value >= 0 and value == int(value)
