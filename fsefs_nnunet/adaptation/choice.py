"""Which method `fseft adapt` chooses: the best one of the most similar situation that was measured."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import log2

STUDENT = "student"  # not a row of the registry: `fseft student`, taught by the context adapter
STUDENT_AHEAD = 0.01
GPU_MINUTE = 20.0  # minutes of a CPU core that a GPU minute counts as, between devices


@dataclass(frozen=True)
class Situation:
    """
    shots: labelled cases.
    minutes: for everything, of one core or one GPU.
    device: as in `-device`.
    voxels: of the median volume, after preprocessing.
    pile: cases without labels that a student could learn from.
    """

    shots: int
    minutes: float
    device: str
    voxels: int
    pile: int

    def distance(self, other: Situation) -> float:
        """Doublings and halvings between two situations; a volume's size counts half as much as shots and minutes."""
        own, others = self.minutes, other.minutes
        if self.device != other.device:
            own, others = (s.minutes * (1 if s.device == "cpu" else GPU_MINUTE) for s in (self, other))
        ratios = self.shots / other.shots, own / others, (self.voxels / other.voxels) ** 0.5
        return sum(abs(log2(ratio)) for ratio in ratios)


@dataclass(frozen=True)
class Measured:
    """A cell of `benchmarks/equal_time.py`: Dice of the labelled queries by method."""

    data: str
    situation: Situation
    dice: dict[str, float]

    def describe(self) -> str:
        s = self.situation
        cases = "1 labelled case" if s.shots == 1 else f"{s.shots} labelled cases"
        return f"{self.data} ({cases}, {s.minutes:g} {s.device.upper()} minutes, {s.voxels:,} voxels)"


@cache
def measured() -> tuple[Measured, ...]:
    """The cells that came with this version."""
    content = json.loads(files(__package__).joinpath("measured.json").read_text("utf-8"))
    return tuple(Measured(c["data"], Situation(**c["situation"]), c["dice"]) for c in content)


def nearest(situation: Situation, cells: tuple[Measured, ...], possible: set[str]) -> Measured | None:
    """The most similar cell that lists a method that is `possible`; None if no cell does."""
    suitable = (cell for cell in cells if ranking(cell, possible))
    return min(suitable, key=lambda cell: situation.distance(cell.situation), default=None)


def ranking(cell: Measured, possible: set[str]) -> list[tuple[str, float]]:
    """The methods of a cell that are `possible`, the best first, with their Dice there.

    A student, which needs a teacher and a dataset of its own, comes first only if it is ahead by STUDENT_AHEAD.
    """

    def worth(item: tuple[str, float]) -> float:
        return item[1] - (STUDENT_AHEAD if item[0] == STUDENT else 0)

    return sorted(((name, dice) for name, dice in cell.dice.items() if name in possible), key=worth, reverse=True)
