"""nnU-Net's own plans, with K-shot configurations for the baseline, stock nnU-Net."""

from __future__ import annotations

import json
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

from fsefs_nnunet.cases.fingerprint import FINGERPRINT_FILE, MADE_OF
from fsefs_nnunet.cases.folders import dataset_folders
from fsefs_nnunet.files import read_json, value_in, write_atomically
from fsefs_nnunet.methods.registry import METHODS, STOCK_PLANS
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner, default_workers

PARENT = "3d_fullres"


def add_stock_configurations(planner: FSEFTPlanner) -> None:
    """Add `3d_fullres_<K>shot_nnunet` to nnUNetPlans.json for all shots of `planner`, which has planned.

    Plans that a user made are otherwise unchanged; those that this function made are made again.

    Raises:
        InputError: if the existing plans are damaged.
    """
    folder = dataset_folders(planner.dataset_name)[2]
    file = folder / f"{STOCK_PLANS}.json"
    before = read_json(file) if file.exists() else {}
    if not before or MADE_OF in before:
        try:
            _plan(planner, folder)
        except RuntimeError as error:  # none of its readers can open the first image
            print(f"nnU-Net's own planner fails ({error}): there are no plans for `--methods nnunet`.")
            return
    plans = read_json(file)
    stock = {
        f"{PARENT}_{k}shot{METHODS['nnunet'].suffix}": {"inherits_from": PARENT, "fseft_shots": k}
        for k in planner.all_shots()
    }
    # configurations that a user edited are kept
    added = {name: content for name, content in stock.items() if name not in plans["configurations"]}
    write_atomically(file, json.dumps({**plans, "configurations": plans["configurations"] | added}, indent=4))
    print(f"{file}: nnU-Net's own plans, with {', '.join(stock)} for the baseline.")
    if MADE_OF in before:
        _clear_if_stale(folder, before, plans)


def _plan(planner: FSEFTPlanner, folder: Path) -> None:
    """Write nnU-Net's plans, marked as ours; the configurations of its planner replace earlier ones."""
    listed = (folder / "dataset.json").read_bytes()  # may list the cases, if macOS left files next to them
    with default_workers(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        stock = ExperimentPlanner(planner.dataset_name, planner.UNet_vram_target_GB)
        stock.dataset, stock.dataset_json = planner.dataset, planner.dataset_json
        stock.plan_experiment()
    write_atomically(folder / "dataset.json", listed)
    file = folder / f"{STOCK_PLANS}.json"
    made = {**read_json(file), MADE_OF: value_in(folder / FINGERPRINT_FILE, MADE_OF)}
    write_atomically(file, json.dumps(made, indent=4))


def _clear_if_stale(folder: Path, before: dict, now: dict) -> None:
    """Delete what was preprocessed with other plans of ours, or from other files."""
    preprocessed = folder / _parent(before)["data_identifier"]
    same = before[MADE_OF] == now[MADE_OF] and _parent(before) == _parent(now)
    if not same and preprocessed.exists():
        shutil.rmtree(preprocessed)
        print(f"{preprocessed} was made with other plans or from other files: it is deleted; the benchmark remakes it.")


def _parent(plans: dict) -> dict:
    return plans["configurations"][PARENT]
