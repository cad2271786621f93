"""fseft_run.json, the facts of a training."""

import json
from dataclasses import asdict

import pytest

from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods import run_file
from fsefs_nnunet.methods.run_file import RUN_FILE, RunFile, StageClock


def test_a_run_reads_as_it_was_written(tmp_path):
    run = RunFile("FSEFTTrainer", "3d_fullres_5shot", "all", ["O'Neil_1", 'c "d"'], ["q"], ["q"], windows=3)
    run.epochs.append({"epoch": 0, "loss": 0.5, "pseudo_dice": None, "sizes_ml": {"q": {"liver": 1.5}}})
    run.save(tmp_path)
    assert RunFile.load(tmp_path) == run
    assert json.loads((tmp_path / RUN_FILE).read_text()) == asdict(run)


def test_seconds_are_those_of_the_training(monkeypatch):
    now = iter([0.0, 2.0, 62.0, 65.0, 665.0])
    monkeypatch.setattr(run_file, "monotonic", lambda: next(now))
    run, clock = RunFile(), StageClock()
    for stage in ("start", "training", "start", "validation"):
        clock.lap(run, stage)
    assert run.seconds == {"start": 5.0, "training": 60.0, "validation": 600.0}
    assert run.training_seconds == 65.0


def test_peaks_are_those_of_the_largest_run():
    run = RunFile()
    assert run.peak_memory != run.peak_memory  # NaN where the system does not say
    for place, peak in (("host", 2.0), ("host", 1.0), ("device", None)):
        run.keep_peak(place, peak)
    assert run.peak_memory_gb == {"host": 2.0} and run.peak_memory == 2.0
    run.keep_peak("device", 0.5)
    assert run.peak_memory == 0.5


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "fseft_run.json is missing: train again"),
        ('{"trainer": ', "fseft_run.json is damaged"),
        ('{"trainer": "a", "speed": 3}', "fseft_run.json was written by another version .*speed.*: train again"),
    ],
)
def test_what_is_no_run_file(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / RUN_FILE).write_text(content)
    with pytest.raises(InputError, match=sentence):
        RunFile.load(tmp_path)
