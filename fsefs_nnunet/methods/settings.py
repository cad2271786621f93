"""The keys that FSEFTPlanner adds to a K-shot configuration: default, check and meaning of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any

from fsefs_nnunet.errors import InputError

PREFIX = "fseft_"


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


_Rule = tuple[Callable[[object], bool], str]
_TEXT: _Rule = (lambda value: isinstance(value, str) and bool(value), "a name")
_SHOTS: _Rule = (lambda value: value == "all" or _whole(value, 1), '"all" or a whole number of at least 1')
_SIZE: _Rule = (
    lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(_whole(n, 1) for n in value),
    "three whole numbers of at least 1",
)
_BLOCK: _Rule = (
    lambda value: _whole(value, 1) or _SIZE[0](value),
    "a whole number of at least 1, or three",
)
_FROM_ONE: _Rule = (lambda value: _whole(value, 1), "a whole number of at least 1")
_FROM_ZERO: _Rule = (lambda value: _whole(value, 0), "a whole number of at least 0")
_EPOCHS: _Rule = (lambda value: value is None or _whole(value, 1), "null or a whole number of at least 1")
_WEIGHT: _Rule = (lambda value: _number(value) and value >= 0, "a number of at least 0")
_RATE: _Rule = (lambda value: _number(value) and value > 0, "a number above 0")
_DEVIATION: _Rule = (lambda value: _number(value) and 0 <= value < 1, "a number of at least 0 and below 1")
_PROBABILITY: _Rule = (lambda value: _number(value) and 0 <= value <= 1, "a probability, from 0 to 1")
_GIGABYTES: _Rule = (lambda value: value is None or (_number(value) and value >= 0), "null or a number of at least 0")
_MINUTES: _Rule = (lambda value: value is None or (_number(value) and value > 0), "null or a number above 0")
_SWITCH: _Rule = (lambda value: isinstance(value, bool), "true or false")
_LOSS: _Rule = (lambda value: value in ("nnunet", "soft_dice"), '"nnunet" or "soft_dice"')


def _key(rule: _Rule, effect: str, default: Any = MISSING, shown: str = "") -> Any:
    """shown: the default in words, where the planner takes it from the data."""
    metadata = {"rule": rule, "effect": effect, "shown": shown or f"`{_json(default)}`"}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def _json(value: object) -> str:
    return {None: "null", True: "true", False: "false"}.get(value, str(value)) if not _number(value) else f"{value:g}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A field for each key; `fseft_<name>` is its name in the plans. Keys that the plans lack have their defaults.

    Many small steps teach more than a few large ones, and with few views the adapter memorises them; calibrated
    sizes of features pooled by 2 serve the prior as well as those of whole volumes (documentation/tuning.md).
    """

    backbone: str = _key(_TEXT, "marks a K-shot configuration", shown="the planned one")
    shots: int | str = _key(_SHOTS, "labelled support cases", shown="1, 5, 10, `all`")
    crop_size: tuple[int, int, int] = _key(
        _SIZE,
        "crops of the feature bank, no axis longer than `patch_size`; what the bank keeps depends on it",
        shown="half the window, 16^3 to 32^3",
    )
    crops_per_step: int = _key(_FROM_ONE, "crops per step; fewer if the GPU's memory target allows no more", 2)
    views: int = _key(
        _FROM_ZERO,
        "augmented views in the bank, of all support cases together, rounded down to the same number of each, at least "
        "one; 0: none. A window each, three of four around a labelled voxel, by nnU-Net's training transforms without "
        "mirroring",
        64,
    )
    cutmix: float = _key(
        _PROBABILITY, "probability that a view shows a box of another support case's view, labels included", 0.0
    )
    steps_per_epoch: int = _key(_FROM_ONE, "steps per epoch", 8)
    epochs: int | None = _key(_EPOCHS, "epochs of a training; `null`: those of the [method](methods.md)", None)
    loss: str = _key(
        _LOSS, "`nnunet`: Dice and cross-entropy; `soft_dice`: the published loss. Also of `fseft predict`", "nnunet"
    )
    lambda_: float = _key(_WEIGHT, "weight of the prior, averaged over the classes; published: 0.1", 0.3)
    gamma: float = _key(
        _DEVIATION,
        "smallest tolerated relative deviation from S; the support's sizes may ask for [more](size_prior.md); "
        "published: 0.3",
        0.1,
    )
    prior_from_epoch: int = _key(_FROM_ZERO, "epochs before the prior is used", 30)
    pool: tuple[int, int, int] = _key(
        _BLOCK,
        "blocks that a query's features are averaged over, voxels per axis: cubes of twice the finest spacing, of at "
        "least 4 mm if the median volume is longer than two windows, larger if, on a machine without a GPU, more than "
        "100,000 would be left; 1 keeps the features as they are",
        (2, 2, 2),
        shown="from the data",
    )
    predict_lambda: float = _key(_WEIGHT, "`fseft_lambda` in `fseft predict`", 0.3)
    predict_gamma: float = _key(
        _DEVIATION, "`fseft_gamma` in `fseft predict`, see [transductive inference](transductive_inference.md)", 0.15
    )
    predict_lr: float = _key(_RATE, "learning rate of `fseft predict`", 3e-5)
    predict_steps: int = _key(_FROM_ZERO, "maximum number of steps of `fseft predict` on a volume", 30)
    bank_gb: float | None = _key(
        _GIGABYTES,
        "GB that all feature banks of the dataset may take; the environment variable of this name takes precedence",
        None,
    )
    gpu_gb: float | None = _key(
        _GIGABYTES,
        "GB of GPU memory that stored features and label maps of the support may take, half of the memory target; "
        "larger ones are read ahead; `null`: no limit",
        4.0,
        shown="from the memory target",
    )
    minutes: float | None = _key(
        _MINUTES,
        "limit of a training and of its schedule, which trainings on patches use up; the environment variable "
        "`fseft_train_minutes` takes precedence",
        None,
    )
    stop_at_plateau: bool = _key(
        _SWITCH, "end when the loss's 10-epoch mean falls by less than 0.001 in 20 epochs", False
    )
    seed: int = _key(_FROM_ZERO, "of views, crops and queries", 12345)

    def __post_init__(self):
        if isinstance(self.pool, int):
            object.__setattr__(self, "pool", (self.pool,) * 3)

    @classmethod
    def read(cls, configuration: dict, name: str, plans_name: str) -> Settings:
        """The settings of configuration `name` of the plans `plans_name`.

        Raises:
            InputError: for a key that is unknown or missing, or has an invalid value.
        """
        where = f"{name!r} in {plans_name}.json"
        known = {key_of(f.name): f for f in fields(cls)}
        for key in configuration:
            if key.startswith(PREFIX) and key not in known:
                near = get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
                raise InputError(f"{key!r} of {where} is not a known key: {hint}")
        window = configuration.get("patch_size", (1, 1, 1))
        if not _SIZE[0](window):
            raise InputError(f"patch_size of {where} is {window!r}: make it {_SIZE[1]}.")
        values = {}
        for key, f in known.items():
            if key not in configuration and f.default is not MISSING:
                continue
            possible, expected = f.metadata["rule"]
            if key not in configuration:
                raise InputError(f"{key} of {where} is missing: make it {expected}, or plan again.")
            if not possible(configuration[key]):
                raise InputError(f"{key} of {where} is {configuration[key]!r}: make it {expected}.")
            value = configuration[key]
            values[f.name] = tuple(value) if isinstance(value, list) else value
        return cls(**values)

    def to_plans(self) -> dict:
        """The keys as a configuration of the plans holds them."""
        values = {key_of(f.name): getattr(self, f.name) for f in fields(self)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def key_of(name: str) -> str:
    """The key in the plans of a field of Settings."""
    return PREFIX + name.rstrip("_")


def is_k_shot(configuration: dict) -> bool:
    """Whether a configuration of the plans is for adapters; the baselines' have no backbone."""
    return key_of("backbone") in configuration


def settings_table() -> str:
    """The Markdown rows of documentation/plan_keys.md."""
    rows = ((key_of(f.name), f.metadata["shown"], f.metadata["effect"]) for f in fields(Settings))
    return "\n".join(f"| `{key}` | {default} | {effect} |" for key, default, effect in rows)
