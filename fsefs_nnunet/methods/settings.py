"""What the keys of a K-shot configuration may hold; a misspelt value must not train something else in silence."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from math import isfinite

from fsefs_nnunet.errors import InputError


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


_Rule = tuple[Callable[[object], bool], str]
_FROM_ONE: _Rule = (lambda value: _whole(value, 1), "a whole number from 1 on")
_FROM_ZERO: _Rule = (lambda value: _whole(value, 0), "a whole number from 0 on")
_DEVIATION: _Rule = (lambda value: _number(value) and 0 <= value < 1, "a number from 0 on, below 1")

# checked where backbones, splits and disk are known
_CHECKED_ELSEWHERE = ("fseft_backbone", "fseft_shots", "fseft_bank_gb")
_KEYS: dict[str, _Rule] = {
    "fseft_crop_size": (
        lambda value: isinstance(value, (list, tuple)) and len(value) == 3 and all(_whole(n, 1) for n in value),
        "three whole numbers from 1 on",
    ),
    "fseft_crops_per_step": _FROM_ONE,
    "fseft_views": _FROM_ZERO,
    "fseft_steps_per_epoch": _FROM_ONE,
    "fseft_loss": (lambda value: value in ("nnunet", "soft_dice"), '"nnunet" or "soft_dice"'),
    "fseft_lambda": (lambda value: _number(value) and value >= 0, "a number from 0 on"),
    "fseft_gamma": _DEVIATION,
    "fseft_predict_gamma": _DEVIATION,
    "fseft_prior_from_epoch": _FROM_ZERO,
    "fseft_pool": _FROM_ONE,
    "fseft_stop_at_plateau": (lambda value: isinstance(value, bool), "true or false"),
    "fseft_seed": _FROM_ZERO,
}


def check_plan_keys(settings: dict, configuration: str, plans_name: str) -> None:
    """Raises InputError for a key of `settings`, the configuration, that is unknown, missing or holds no such value."""
    known = [*_KEYS, *_CHECKED_ELSEWHERE]
    for key in settings:
        if key.startswith("fseft_") and key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise InputError(f"{key!r} of {configuration!r} in {plans_name}.json is no key of ours: {hint}")
    for key, (possible, wanted) in _KEYS.items():
        if not possible(settings.get(key)):
            raise InputError(
                f"{key} of {configuration!r} in {plans_name}.json is {settings.get(key)!r}: make it {wanted}."
            )
