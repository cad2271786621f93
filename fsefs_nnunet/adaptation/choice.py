"""Which method `fseft adapt` takes: the best one of the nearest situation that was measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.resources import files
from math import log2

STUDENT = "student"  # beside the methods of the registry: one of `fseft student` after the context adapter
GPU_MINUTE = 20.0  # minutes of a CPU's core that a GPU's stands for, where no cell was measured on one


@dataclass(frozen=True)
class Situation:
    """
    shots: labelled cases.
    minutes: for everything, of one core or one GPU.
    device: "cpu" or "cuda".
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
        return f"{self.data}, {s.shots} labelled case(s), {s.minutes:g} minutes of a {s.device}, {s.voxels:,} voxels"


@lru_cache(maxsize=1)
def measured() -> tuple[Measured, ...]:
    """The cells that came with this version."""
    content = json.loads(files(__package__).joinpath("measured.json").read_text("utf-8"))
    return tuple(Measured(c["data"], Situation(**c["situation"]), c["dice"]) for c in content)


def nearest(situation: Situation, cells: tuple[Measured, ...] | None = None) -> Measured:
    return min(measured() if cells is None else cells, key=lambda cell: situation.distance(cell.situation))


def ranking(situation: Situation, cell: Measured) -> list[tuple[str, float]]:
    """Methods that are possible in a situation, the best of the measured cell first, with their Dice there."""
    possible = {name: dice for name, dice in cell.dice.items() if name != STUDENT or situation.pile}
    return sorted(possible.items(), key=lambda item: -item[1])


def as_json(situation: Situation) -> dict:
    return asdict(situation)
