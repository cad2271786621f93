"""`fseft_run.json` next to a training's checkpoints: the facts of the run, for reports, benchmarks and people."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import read_json, write_json

RUN_FILE = "fseft_run.json"
VALIDATION = "validation"


@dataclass
class RunFile:
    """What happened in a training, all runs of a continued one together.

    support: the labelled cases, all the labels that the training uses.
    pile: cases that a model has labelled.
    queries: cases of which the training uses the images alone.
    labelled_queries: those that the final validation segments; under a time limit `queries` may lack some.
    backbone: id, sha256 and the number of its frozen parameters; {} without one.
    trained_parameters: their number.
    head_rows: labels whose rows of the head started from the universal head's, with its names for them.
    prior: what is expected of each class, see Prior.report; {} if the prior has no effect.
    windows: number that went through the frozen backbone for the training; validation_windows: for the validation.
    feature_precisions: those that the backbone ran in for the stored features.
    seconds: wall time by stage: "start" until the training begins, "feature bank", "training", "validation".
    budget_seconds: that the training was limited to, None without a limit; budget_clock: "wall" time or "cpu" time.
    peak_memory_gb: "host" and "device", of the largest process of the runs.
    epochs: of each "epoch", its number, "loss", "pseudo_dice" (null for crops that show nothing) and "seconds"; while
        the prior counts, "penalty" and, by query and class, "sizes_ml" that its steps saw.
    sizes_ml: "before" and "after" the training, by query and class.
    missed: classes that a training on patches hardly found at its end, even on the support.
    gave_up: whether it ended early because of them.
    """

    trainer: str = ""
    configuration: str = ""
    fold: int | str = 0
    support: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    labelled_queries: list[str] = field(default_factory=list)
    pile: list[str] = field(default_factory=list)
    backbone: dict = field(default_factory=dict)
    trained_parameters: int = 0
    head_rows: dict[str, str] = field(default_factory=dict)
    prior: dict[str, dict | None] = field(default_factory=dict)
    windows: int = 0
    validation_windows: int = 0
    feature_precisions: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    budget_seconds: float | None = None
    budget_clock: str = "wall"
    peak_memory_gb: dict[str, float] = field(default_factory=dict)
    epochs: list[dict] = field(default_factory=list)
    sizes_ml: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    gave_up: bool = False

    @property
    def training_seconds(self) -> float:
        """Wall time of all but the validation: filling the bank included."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != VALIDATION)

    @property
    def peak_memory(self) -> float:
        """GB of the device if it is a GPU, else of main memory; NaN if the system does not say."""
        return self.peak_memory_gb.get("device", self.peak_memory_gb.get("host", float("nan")))

    def keep_peak(self, place: str, gigabytes: float | None) -> None:
        if gigabytes is not None:
            self.peak_memory_gb[place] = max(gigabytes, self.peak_memory_gb.get(place, 0.0))

    def save(self, fold_folder: str | Path) -> None:
        write_json(Path(fold_folder) / RUN_FILE, asdict(self))

    @classmethod
    def load(cls, fold_folder: str | Path) -> RunFile:
        """Raises InputError without the file, and for one that is damaged or was written by another version."""
        file = Path(fold_folder) / RUN_FILE
        if not file.exists():
            raise InputError(f"{file} is missing: train again, or restore the folder.")
        try:
            return cls(**read_json(file))
        except TypeError as error:
            raise InputError(
                f"{file} was written by another version of this software ({error}): train again."
            ) from error


class StageClock:
    """Adds the wall time between its calls to the stages of a run."""

    def __init__(self):
        self.last = monotonic()

    def lap(self, run: RunFile, stage: str) -> None:
        """What has passed since the last call belongs to `stage`."""
        now = monotonic()
        run.seconds[stage] = run.seconds.get(stage, 0.0) + now - self.last
        self.last = now
