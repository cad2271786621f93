"""What unlabelled volumes should look like, and the penalty for predictions that do not: one file per prior."""

from __future__ import annotations

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.priors.prior import Prior
from fsefs_nnunet.priors.size import SizePrior

PRIORS: dict[str, type[Prior]] = {"size": SizePrior}


def prior_named(name: str) -> type[Prior]:
    """The class of a prior. Raises InputError for an unknown one."""
    if name not in PRIORS:
        raise InputError(f"There is no prior {name!r}: choose one of {', '.join(PRIORS)}.")
    return PRIORS[name]
