"""Studies of `fseft benchmark` and results of their cells."""

from fsefs_nnunet.benchmark.evaluation import METRICS
from fsefs_nnunet.benchmark.result import Result
from fsefs_nnunet.benchmark.study import open_study
from fsefs_nnunet.methods.registry import METHODS

NAN = float("nan")


def result(method="fseft", shots=5, fold=0, dice=((0.5, 0.7), (0.9, NAN)), parameters=100) -> Result:
    """Two classes; surface Dice is 0.1 less, the distance 10 (1 - Dice), the size error 1 - Dice."""
    cases = {
        f"case_{i}": {
            name: dict(zip(METRICS, (d, d - 0.1, 10 * (1 - d), 1 - d))) for name, d in zip(("liver", "spleen"), row)
        }
        for i, row in enumerate(dice)
    }
    support = [f"s{i}" for i in range(shots)] if METHODS[method].trainer else []
    return Result(method, shots, fold, support, "abc", "def", "ghi", parameters, 12.4, 0.0, 0.0, 1.5, 20.0, 30, cases)


def study_of(folders, plans="FSEFTPlans", test=None, device="cpu"):
    return open_study("77", plans, test, folders[1], device)
