"""The methods, a row each: shims, `fseft benchmark`, demo, test matrix and documentation/methods.md read them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Literal

from fsefs_nnunet.errors import InputError

BANK, PATCHES = "bank", "patches"
STOCK_PLANS = "nnUNetPlans"  # the name of nnU-Net's own plans
_INSIDE = "fsefs_nnunet.methods.inside"
_SCRATCH = "fsefs_nnunet.trainers.scratch.FSEFTTrainer_Scratch"


@dataclass(frozen=True)
class Method:
    """One way to use few labels. Nothing here is imported until it is needed.

    name: what `--methods` takes.
    title: in tables and figures.
    trains: what is trained, in words.
    sentence: what the documentation says about it.
    trainer: what nnUNetv2_train's -tr names, "FSEFT..." (`fseft link` looks for no other); None: nothing is trained.
    learns_from: "bank", crops of the feature bank, or "patches", nnU-Net's.
    trainer_class: where a class of its own lies; else the trainer is made of this row alone (trainers/by_name.py).
    adapter, maps: key of methods.adapters.ADAPTERS, stages of the backbone; None: what the plans say.
    inside: where the class of a method inside the backbone lies, see methods/inside/protocol.py.
    prior: key of priors.PRIORS, that of `fseft predict`; trains_with_prior: whether trainings use it, too.
    channel_dropout: probability that a step on the support does not see a channel of a crop.
    rate, weight_decay, epochs: of the training with AdamW.
    more_shapes: whether most patches are rotated, scaled and deformed, see trainers/augmentation.py.
    warmup: share of a training over which the rate rises, for head and decoder first; 0: the published schedule.
    transductive: the trained adapter adapts to every volume before it segments it (`fseft predict`).
    shares_features: predicts from the features of whole volumes, which all such methods get from one pass.
    by_default: whether `fseft benchmark` runs it without being asked.
    suffix: of the configurations trained from scratch, for the time that the longest of the other methods took.
    plans: name of the plans with its configurations; "": those for the backbone.
    """

    name: str
    title: str
    trains: str
    sentence: str
    trainer: str | None = None
    learns_from: Literal["bank", "patches"] | None = None
    trainer_class: str = ""
    adapter: str | None = None
    maps: str | None = None
    inside: str | None = None
    prior: str = "size"
    trains_with_prior: bool = False
    channel_dropout: float = 0.0
    rate: float = 2e-3
    weight_decay: float = 0.0
    epochs: int = 100
    warmup: float = 0.0
    more_shapes: bool = False
    transductive: bool = False
    shares_features: bool = False
    by_default: bool = True
    suffix: str = ""
    plans: str = ""

    def __post_init__(self):
        if self.trainer and not self.trainer.startswith("FSEFT"):
            raise ValueError(
                f"Method {self.name!r}: the name of a trainer must begin with FSEFT, not {self.trainer!r}."
            )
        if self.inside and self.learns_from != PATCHES:
            raise ValueError(
                f"Method {self.name!r} trains in the backbone: it learns from patches, not stored features."
            )
        heeds = self.trains_with_prior or self.channel_dropout or self.transductive or self.shares_features
        if self.more_shapes and self.learns_from != PATCHES:
            raise ValueError(f"Method {self.name!r}: only patches come in more shapes.")
        if heeds and self.learns_from != BANK:
            raise ValueError(f"Method {self.name!r}: priors, dropped and shared features need stored features.")

    @property
    def trains_on_backbone(self) -> bool:
        """Whether its network holds the backbone."""
        return self.trainer is not None and not self.suffix


_FSEFT = Method(
    "fseft",
    "spatial adapter + size prior",
    "spatial adapter, head",
    "The paper's method: its adapter, with the size prior on the queries.",
    "FSEFTTrainer",
    BANK,
    "fsefs_nnunet.trainers.fseft_trainer.FSEFTTrainer",
    trains_with_prior=True,
    shares_features=True,
)

# for trainings longer than the published few-shot recipes
_LONG = {
    "rate": 1e-3,
    "weight_decay": 1e-5,
    "epochs": 400,
    "warmup": 0.1,
    "more_shapes": True,
    "by_default": False,
}

_FINE_TUNING = [
    Method(
        "ft_last",
        "fine-tuning, last block",
        "last block of the decoder, head",
        "The workshop's recipe.",
        "FSEFTTrainer_FTLast",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.decoder_parts.LastBlock",
        rate=1e-2,
        weight_decay=1e-5,
    ),
    Method(
        "decoder",
        "fine-tuning, decoder",
        "decoder, head",
        "The journal's recipe.",
        "FSEFTTrainer_Decoder",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.decoder_parts.Decoder",
        rate=1e-4,
        epochs=200,
    ),
    Method(
        "ft",
        "fine-tuning, everything",
        "all of the backbone, head",
        "The workshop's recipe.",
        "FSEFTTrainer_FT",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.decoder_parts.Everything",
        rate=1e-4,
        weight_decay=1e-5,
        epochs=150,
    ),
]

_ROWS = [
    Method(
        "zero_shot",
        "zero-shot (universal head)",
        "nothing",
        "The backbone's own head, by `fseft zero_shot`.",
    ),
    Method(
        "probe",
        "linear probe",
        "head",
        "The head alone, on all of the backbone's features.",
        "FSEFTTrainer_LinearProbe",
        BANK,
        adapter="linear_probe",
        rate=1e-2,
        shares_features=True,
    ),
    Method(
        "adapter",
        "spatial adapter",
        "spatial adapter, head",
        "The paper's adapter without the size prior.",
        "FSEFTTrainer_Adapter",
        BANK,
        shares_features=True,
    ),
    Method(
        "adapter_in",
        "adapter with instance norm",
        "residual block with instance norm, head",
        "The workshop's adapter by its recipe, without the size prior.",
        "FSEFTTrainer_AdapterIN",
        BANK,
        adapter="spatial_in",
        rate=1e-2,
        weight_decay=1e-5,
    ),
    _FSEFT,
    replace(
        _FSEFT,
        name="transductive",
        title="spatial adapter + size prior, transductive",
        trains="spatial adapter, head, and again on each query",
        sentence="The paper's method, adapted to each query by `fseft predict`.",
        transductive=True,
    ),
    Method(
        "context",
        "context adapter + size prior",
        "context adapter, head",
        "Ours, not the paper's: an adapter that sees 13 voxels instead of 5, trained with channels left out.",
        "FSEFTTrainer_Context",
        BANK,
        adapter="context",
        trains_with_prior=True,
        channel_dropout=0.1,
        shares_features=True,
    ),
    *_FINE_TUNING,
    Method(
        "lora",
        "LoRA",
        "low-rank updates in every layer of the backbone, head",
        'Rank 4; the plans\' options may set another, `sites` "linear" or "convolutions", and `decoder` true.',
        "FSEFTTrainer_LoRA",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.lora.LoRA",
        rate=1e-3,
        epochs=200,
        by_default=False,
    ),
    Method(
        "norms",
        "fine-tuning, norms",
        "scales and shifts of the backbone's norms, head",
        "The journal's recipe; the plans' option `decoder` true trains the decoder, too.",
        "FSEFTTrainer_Norms",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.few_parameters.Norms",
        rate=1e-2,
        epochs=200,
        by_default=False,
    ),
    Method(
        "biases",
        "fine-tuning, biases",
        "biases of the backbone, head",
        "The journal's recipe; the plans' option `decoder` true trains the decoder, too.",
        "FSEFTTrainer_Biases",
        PATCHES,
        adapter="linear_probe",
        maps="last",
        inside=f"{_INSIDE}.few_parameters.Biases",
        rate=1e-2,
        epochs=200,
        by_default=False,
    ),
    *(
        replace(
            row,
            name=f"{row.name}_long",
            title=f"{row.title}, long",
            sentence="Linear warm-up over the first tenth of the training, then a cosine.",
            trainer=f"{row.trainer}Long",
            **_LONG,
        )
        for row in _FINE_TUNING
    ),
    Method(
        "unet",
        "U-Net on frozen features",
        "decoder of a small U-Net, head",
        "Image and features, each at its own stride; whole channels of the features are dropped in training.",
        "FSEFTTrainer_UNet",
        PATCHES,
        "fsefs_nnunet.trainers.feature_unet.FSEFTTrainer_UNet",
        adapter="unet",
        **_LONG,
    ),
    Method(
        "scratch",
        "from scratch, equal time",
        "the backbone's architecture, from random weights",
        "nnU-Net's trainer for a given time, `-c 3d_fullres_<K>shot_scratch`; what nnU-Net plans if the backbone is "
        "not one of its U-Nets.",
        "FSEFTTrainer_Scratch",
        PATCHES,
        _SCRATCH,
        suffix="_scratch",
    ),
    Method(
        "nnunet",
        "nnU-Net from scratch, equal time",
        "what nnU-Net plans for the data, from random weights",
        "nnU-Net's trainer for a given time on nnU-Net's own preprocessing, `-p nnUNetPlans -c "
        "3d_fullres_<K>shot_nnunet`.",
        "FSEFTTrainer_Scratch",
        PATCHES,
        _SCRATCH,
        suffix="_nnunet",
        plans=STOCK_PLANS,
    ),
]
METHODS = {row.name: row for row in _ROWS}


def method_of_trainer(trainer: str) -> Method | None:
    """The first row whose trainer has this name, None for a trainer that is not ours."""
    return next((row for row in METHODS.values() if row.trainer == trainer), None)


def configuration_of(shots: int | str, suffix: str = "") -> str:
    """The name of a configuration in our plans."""
    return f"3d_fullres_{shots}shot{suffix}"


def shots_in_words(shots: int | str) -> str:
    return "1 shot" if shots == 1 else f"{shots} shots"


def require_trainer(name: str) -> None:
    """Raises InputError for a name that is not one of our trainers', with the nearest one."""
    _require("trainer", name, [row.trainer for row in METHODS.values() if row.trainer])


def choose(names: list[str]) -> list[str]:
    """The `names` of METHODS, each once and in its order; those that run by default if none is given.

    Raises:
        InputError: for an unknown name, with the nearest known one.
    """
    for name in names:
        _require("method", name, [*METHODS])
    return [name for name, row in METHODS.items() if name in names or (not names and row.by_default)]


def _require(kind: str, name: str, known: list[str]) -> None:
    if name not in known:
        near = get_close_matches(name, known, 1, 0.4)
        hint = f": did you mean {near[0]!r}?" if near else "."
        raise InputError(f"There is no {kind} {name!r}{hint} There are {', '.join(dict.fromkeys(known))}.")


def methods_table() -> str:
    """The Markdown rows of documentation/methods.md."""
    sources = {BANK: "feature bank", PATCHES: "nnU-Net's patches", None: "-"}
    lines = []
    for row in METHODS.values():
        trainer = f"`{row.trainer}`" if row.trainer else "-"
        trains = f"{row.trains}; {row.prior} prior" if row.trains_with_prior else row.trains
        recipe = f"{row.rate:g}, {row.epochs}" if row.trains_on_backbone else "nnU-Net's, timed" if row.trainer else "-"
        lines.append(
            f"| {trainer} | `{row.name}` | {trains} | {sources[row.learns_from]} | {recipe} | {row.sentence} |"
        )
    return "\n".join(lines)
