"""Commands that the demo and the benchmarks run."""

import sys

import pytest

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.nnunet.experiment import Experiment, program


def test_commands_of_this_python(monkeypatch, tmp_path):
    """System interpreters keep their scripts elsewhere than beside themselves."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert program("nnUNetv2_train").endswith("nnUNetv2_train")
    with pytest.raises(InputError, match="command nnUNetv2_tram is neither next to .*python nor on the PATH: activate"):
        program("nnUNetv2_tram")


def test_variables_of_a_users_trainings_stay_out(monkeypatch, tmp_path):
    for name in ("fseft_train_minutes", "fseft_final_validation"):
        monkeypatch.setenv(name, "0")
    environment = Experiment(tmp_path, "Dataset901_Demo").environment()
    assert not {"fseft_train_minutes", "fseft_final_validation"} & set(environment)
