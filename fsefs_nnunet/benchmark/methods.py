"""The methods of the table, by the names that `--methods` takes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from fsefs_nnunet.errors import InputError


@dataclass(frozen=True)
class Method:
    """
    title: in tables and figures.
    trainer: what nnUNetv2_train's -tr names; None: nothing is trained.
    transductive: the trained adapter adapts to every volume before it segments it (`fseft predict`).
    shares_features: predicts from the frozen backbone's features, which all such methods get from one pass.
    suffix: of the configurations trained from scratch, for the time that the longest of the other methods took.
    """

    title: str
    trainer: str | None
    transductive: bool = False
    shares_features: bool = False
    suffix: str = ""


METHODS = {
    "zero_shot": Method("zero-shot (universal head)", None),
    "probe": Method("linear probe", "FSEFTTrainer_LinearProbe", shares_features=True),
    "adapter": Method("spatial adapter", "FSEFTTrainer_Adapter", shares_features=True),
    "adapter_in": Method("adapter with instance norm", "FSEFTTrainer_AdapterIN"),
    "fseft": Method("spatial adapter + size prior", "FSEFTTrainer", shares_features=True),
    "transductive": Method("spatial adapter + size prior, transductive", "FSEFTTrainer", True, True),
    "context": Method("context adapter + size prior", "FSEFTTrainer_Context", shares_features=True),
    "ft_last": Method("fine-tuning, last block", "FSEFTTrainer_FTLast"),
    "decoder": Method("fine-tuning, decoder", "FSEFTTrainer_Decoder"),
    "ft": Method("fine-tuning, everything", "FSEFTTrainer_FT"),
    "scratch": Method("from scratch, equal time", "FSEFTTrainer_Scratch", suffix="_scratch"),
    "nnunet": Method("nnU-Net from scratch, equal time", "FSEFTTrainer_Scratch", suffix="_nnunet"),
}


def choose(names: list[str]) -> list[str]:
    """The `names` of METHODS, each once and in its order; all of them if none is given.

    Raises:
        InputError: for a name that is none, with the nearest that is one.
    """
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, 1, 0.4)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise InputError(f"There is no method {name!r}{hint} There are {', '.join(METHODS)}.")
    return [name for name in METHODS if name in names or not names]
