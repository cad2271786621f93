"""K-shot folds, stored as `splits_fseft.json` next to nnU-Net's own splits_final.json, never inside it.

A file holds {"seed", "num_folds", "queries", "unlabelled_queries", "folds"}. The queries are the same for all folds and
numbers of shots. A fold is the rest of the labelled cases in random order; its first K are the support of K shots, so
the support of 1 shot is contained in that of 5. Fold 'all' is nnU-Net's: every labelled case is support.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import write_atomically

SPLITS_FILE = "splits_fseft.json"
NUM_QUERIES, NUM_FOLDS, SEED = 20, 5, 12345
DEFAULT_SHOTS = (1, 5, 10, "all")


def make_splits(
    labelled: list[str],
    unlabelled: list[str],
    shots: list[int],
    num_queries: int = NUM_QUERIES,
    num_folds: int = NUM_FOLDS,
    seed: int = SEED,
) -> dict:
    """Draw queries and folds; the order of the given cases does not matter, and adding folds keeps the first ones.

    Args:
        shots: the numbers K that are needed; max(shots) labelled cases are never queries.
        num_queries: at most this many labelled cases become queries, fewer if the support needs them.

    Raises:
        InputError: for a case given twice, too few labelled cases, or a number out of range.
    """
    twice = [case for case, count in Counter([*labelled, *unlabelled]).items() if count > 1]
    if twice:
        raise InputError(f"{len(twice)} cases are given twice, e.g. {twice[0]!r}: give every case once.")
    if not shots or min(shots) < 1:
        raise InputError(f"The numbers of shots are {shots}: give at least one, each 1 or more.")
    if max(shots) > len(labelled):
        raise InputError(
            f"{max(shots)} shots need as many labelled cases, but there are {len(labelled)}: "
            "label more or ask for fewer shots."
        )
    if num_queries < 0 or num_folds < 1:
        raise InputError(f"{num_queries} queries and {num_folds} folds: give at least 0 queries and 1 fold.")
    rng = random.Random(seed)
    queries = set(rng.sample(sorted(labelled), min(num_queries, len(labelled) - max(shots))))
    pool = sorted(set(labelled) - queries)
    return {
        "seed": seed,
        "num_folds": num_folds,
        "queries": sorted(queries),
        "unlabelled_queries": sorted(unlabelled),
        "folds": [rng.sample(pool, len(pool)) for _ in range(num_folds)],
    }


def fitting_shots(requested: Sequence[int | str], num_labelled: int) -> Sequence[int | str]:
    """The requested shots; of the default ones, those that `num_labelled` cases allow.

    Raises:
        InputError: for more shots than labelled cases.
    """
    if requested:
        too_many = [k for k in requested if k != "all" and k > num_labelled]
        if too_many:
            raise InputError(f"{max(too_many)} shots need as many labelled cases, but the dataset has {num_labelled}.")
        return requested
    return [k for k in DEFAULT_SHOTS if k == "all" or k <= num_labelled]


def extended(splits: dict, num_folds: int, unlabelled: list[str]) -> dict:
    """The same draws with other unlabelled queries and this many folds: existing folds are kept, further ones are those
    that `make_splits` would have drawn.
    """
    folds, queries = splits["folds"], splits["queries"]
    more = make_splits([*folds[0], *queries], unlabelled, [len(folds[0])], len(queries), num_folds, splits["seed"])
    if more["queries"] != queries:  # edited by hand
        rng = random.Random(splits["seed"])
        more["folds"] = [rng.sample(sorted(folds[0]), len(folds[0])) for _ in range(num_folds)]
    return {**more, "queries": queries, "folds": [*folds, *more["folds"][len(folds) :]][:num_folds]}


def _pool(splits: dict, fold: int) -> list[str]:
    if fold not in range(len(splits["folds"])):
        raise InputError(
            f"Fold {fold} does not exist: there are {len(splits['folds'])} folds, counted from 0; "
            "make more with `fseft splits -d ID --folds N`."
        )
    return splits["folds"][fold]


def support_cases(splits: dict, shots: int | str, fold: int | str) -> list[str]:
    """The cases to adapt to: the first `shots` of the fold's pool, the whole pool for shots 'all'.

    For fold 'all' it is every labelled case, whatever the shots.

    Raises:
        InputError: if there is no such fold, or the pool has fewer cases than shots.
    """
    if fold == "all":
        return sorted([*splits["folds"][0], *splits["queries"]])
    pool = _pool(splits, fold)
    if shots == "all":
        return list(pool)
    if shots not in range(1, len(pool) + 1):
        raise InputError(
            f"{shots} shots from a pool of {len(pool)} cases: ask for 1 to {len(pool)} or 'all', "
            "or make a larger pool with `fseft splits -d ID --shots K`."
        )
    return pool[:shots]


def fold_seed(fold: int | str) -> int:
    """A number for every fold, 'all' too, that seeds what differs between folds."""
    return 2**16 if fold == "all" else int(fold)


def query_cases(splits: dict, fold: int | str) -> tuple[list[str], list[str]]:
    """The labelled and the unlabelled queries; with fold 'all' the labelled ones are support.

    Raises:
        InputError: if there is no such fold.
    """
    if fold == "all":
        return [], list(splits["unlabelled_queries"])
    _pool(splits, fold)
    return list(splits["queries"]), list(splits["unlabelled_queries"])


def save_splits(splits: dict, file: str | Path) -> None:
    write_atomically(file, json.dumps(splits, indent=2))


def load_splits(file: str | Path) -> dict:
    """Read what save_splits wrote.

    Raises:
        InputError: if there is no such file, or it holds something else; after edits by hand, the folds must still be
            permutations of one pool without queries.
    """
    file = Path(file)
    if not file.is_file():
        raise InputError(f"There are no K-shot folds at {file}: make them with `fseft splits -d ID`.")
    try:
        splits = json.loads(file.read_text("utf-8"))
        problem = _problem(splits)
    except json.JSONDecodeError as error:
        problem = f"it is not JSON ({error})"
    if problem:
        raise InputError(f"{file} does not hold K-shot folds, {problem}: make it again with `fseft splits -d ID`.")
    return splits


def _problem(splits: object) -> str | None:
    """What is wrong with the content of a file, None if nothing is."""
    keys = {"seed", "num_folds", "queries", "unlabelled_queries", "folds"}
    if not isinstance(splits, dict) or set(splits) != keys:
        return f"its keys are not {sorted(keys)}"
    folds, queries = splits["folds"], [splits["queries"], splits["unlabelled_queries"]]
    if not isinstance(folds, list) or not folds or splits["num_folds"] != len(folds):
        return f'"folds" is not a list of {splits["num_folds"]} folds'
    if not all(isinstance(part, list) and all(isinstance(case, str) for case in part) for part in [*folds, *queries]):
        return "folds and queries are not lists of case names"
    if any(sorted(fold) != sorted(folds[0]) for fold in folds):
        return "the folds are not permutations of one pool"
    cases = [*folds[0], *queries[0], *queries[1]]
    if not folds[0] or len(set(cases)) < len(cases):
        return "a fold is empty or a case occurs twice"
    return None
