"""Commands that the demo and the benchmarks run, and what they read in logs."""

import sys

import pytest

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.evaluation.training_logs import logged_support
from fsefs_nnunet.nnunet.experiment import Experiment, program, training_seconds

TRAINING = """\
2026-01-01 10:00:00.0: 3 labelled support cases (all the labels that this training uses): {}; 2 queries, 1 of them
2026-01-01 10:00:30.5: Epoch 0
2026-01-01 10:01:00.0: Training done.
2026-01-01 10:09:00.0: predicting case_4
"""
VALIDATION = """\
2026-01-02 10:00:00.0: Using splits from existing split file
2026-01-02 10:00:02.0: predicting case_4
2026-01-02 10:40:00.0: Validation complete
"""


def test_seconds_are_those_of_the_training(tmp_path):
    (tmp_path / "training_log_1.txt").write_text(TRAINING.format(["a"]))
    assert training_seconds(tmp_path) == 60
    (tmp_path / "training_log_2.txt").write_text(VALIDATION)  # nnUNetv2_train --val
    assert training_seconds(tmp_path) == 62


@pytest.mark.parametrize("end", ["; 2 queries, 1 of them", "."])
def test_support_cases_of_any_name(tmp_path, end):
    cases = ["O'Neil_1", "b [x]", 'c "d"']
    (tmp_path / "training_log_1.txt").write_text(TRAINING.replace("; 2 queries, 1 of them", end).format(cases))
    assert logged_support(tmp_path) == [cases]


def test_commands_of_this_python(monkeypatch, tmp_path):
    """System interpreters keep their scripts elsewhere than beside themselves."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert program("nnUNetv2_train").endswith("nnUNetv2_train")
    with pytest.raises(InputError, match="command nnUNetv2_tram is neither beside .*python nor on the PATH: activate"):
        program("nnUNetv2_tram")


def test_variables_of_a_users_trainings_stay_out(monkeypatch, tmp_path):
    for name in ("fseft_train_minutes", "fseft_final_validation"):
        monkeypatch.setenv(name, "0")
    environment = Experiment(tmp_path, "Dataset901_Demo").environment()
    assert not {"fseft_train_minutes", "fseft_final_validation"} & set(environment)
