"""Arguments that several verbs share."""

from __future__ import annotations

import argparse
import math


def add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-d", required=True, metavar="DATASET", help="id or name of a nnU-Net raw dataset")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-device", choices=["cpu", "cuda", "mps"], help="default: cuda if there is one, else cpu")


def minutes_argument(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number of minutes")
    return value


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
