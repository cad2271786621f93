"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import math


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of an nnU-Net raw dataset")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one, else cpu")


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-np", type=positive_int, default=4, metavar="N", help="processes, as in nnU-Net; default: 4")


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return value


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def name_argument(text: str) -> str:
    if not text or set(text) & set("/\\"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name: it becomes part of file names")
    return text


def fold_argument(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a fold nor 'all'")
    return text if text == "all" else int(text)


def shots_argument(text: str) -> int | str:
    if text == "all":
        return text
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor 'all'")
    return value
