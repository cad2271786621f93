"""What a training refuses, and what it says."""

import errno
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from trainings import (
    FIVE,
    TINY,
    edit_images,
    edit_labels,
    make_trainer,
    splits_of,
    trained,
)

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.store import load_weights, save_backbone
from fsefs_nnunet.cases.preprocessed import require_labels
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.inference.support import memory_from_bank
from fsefs_nnunet.inference.trained_model import TrainedModel
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_Adapter, FSEFTTrainer_FTLast, FSEFTTrainer_LinearProbe
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch


@pytest.mark.parametrize("cls, configuration", [(FSEFTTrainer, FIVE), (FSEFTTrainer_Scratch, f"{FIVE}_scratch")])
def test_fold_beyond_the_file(work, cls, configuration):
    trainer = make_trainer(work, cls, configuration=configuration, fold=5)
    with pytest.raises(ValueError, match="Fold 5 does not exist: there are 5 folds.*fseft splits -d ID --folds N"):
        trainer.run_training()


def test_configuration_that_is_not_k_shot(work):
    with pytest.raises(
        InputError, match="'3d_fullres' of plans 'FSEFTPlans' is not a K-shot configuration: make plans"
    ):
        make_trainer(work, configuration="3d_fullres")
    for configuration in ("3d_fullres", FIVE):
        with pytest.raises(InputError, match=f"'{configuration}' of plans 'FSEFTPlans' is not a baseline: make plans"):
            make_trainer(work, FSEFTTrainer_Scratch, configuration=configuration)


def test_missing_splits(work):
    (work.preprocessed / "splits_fseft.json").unlink()
    with pytest.raises(InputError, match="There are no K-shot folds at .*fseft splits -d ID"):
        make_trainer(work).run_training()


def test_more_shots_than_the_pool(work):
    with pytest.raises(ValueError, match="6 shots from a pool of 5 cases"):
        make_trainer(work, fseft_shots=6).run_training()


def test_plans_of_other_weights(work):
    plans = work.plans(**TINY)
    plans["configurations"][FIVE]["architecture"]["arch_kwargs"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="plan and train again"):
        make_trainer(work, plans=plans).run_training()


@pytest.mark.parametrize("argument", ["-pretrained_weights", "-pretrained"])
def test_pretrained_weights_are_refused(work, monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "77", FIVE, "0", argument, "model.pth"])
    with pytest.raises(InputError, match="does not support -pretrained_weights: import the model as a backbone"):
        make_trainer(work)


@pytest.mark.parametrize("cls", [FSEFTTrainer, FSEFTTrainer_LinearProbe])
def test_several_gpus_are_refused(work, cls):
    """nnU-Net's -num_gpus starts a process group, which is how its trainers know."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(InputError, match=f"^{cls.__name__} trains on one device: leave -num_gpus at 1.$"):
            make_trainer(work, cls)
    finally:
        torch.distributed.destroy_process_group()


def spawned(rank, plans, dataset_json):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=rank, world_size=1)
    FSEFTTrainer(plans, FIVE, 0, dataset_json, torch.device("cpu"))


@pytest.mark.slow
def test_several_gpus_end_in_the_sentence(work):
    """The processes of -num_gpus are spawned, and what the command prints of them at last is our sentence."""
    with pytest.raises(torch.multiprocessing.ProcessRaisedException) as error:
        torch.multiprocessing.spawn(spawned, (work.plans(**TINY), work.dataset_json()))
    report = str(error.value)
    assert report.endswith("InputError: FSEFTTrainer trains on one device: leave -num_gpus at 1.\n")
    assert "File " not in report


def test_damaged_checkpoint_is_refused(work):
    trainer = trained(work, epochs=1)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="checkpoint_final.pth is damaged or incomplete"):
        make_trainer(work).load_checkpoint(str(file))


def test_cut_latest_checkpoint_names_the_remedy_that_works(work):
    trainer = make_trainer(work)
    latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
    latest.parent.mkdir(parents=True, exist_ok=True)
    latest.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(InputError, match="checkpoint_latest.pth cannot be read.*delete it, and `--c` continues from"):
        trainer.load_checkpoint(str(latest))


def test_checkpoint_of_another_backbone_of_the_same_id(work, tmp_path, monkeypatch, contract):
    """Ours names the checkpoint; nnUNetv2_predict, which knows the model folder's plans alone, refuses as well."""
    folder = Path(trained(work, epochs=1).output_folder)
    model = load_weights(contract)
    first = next(iter(model))
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    other = save_backbone(contract, {**model, first: model[first] + 1}, tmp_path / "backbones")
    plans = work.plans(**TINY)
    for configuration in plans["configurations"].values():
        if "fseft_backbone" in configuration:
            configuration["architecture"]["arch_kwargs"]["sha256"] = other.sha256
    mismatch = (
        f"trained on .*SHA-256 {contract.sha256[:12]}, but the .* 'phantom' of {other.sha256[:12]}: restore plans"
    )
    with pytest.raises(InputError, match=f"checkpoint_final.pth was {mismatch}"):
        make_trainer(work, plans=plans).load_checkpoint(str(folder / "checkpoint_final.pth"))
    # as a later training leaves it
    (folder.parent / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(InputError, match=f"fold_0/checkpoint_final.pth was {mismatch}"):
        TrainedModel(folder.parent, FIVE, ["0"], "checkpoint_final.pth", torch.device("cpu"))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
    with pytest.raises(InputError, match=f"The checkpoint was {mismatch}"):
        nnUNetPredictor(device=torch.device("cpu")).initialize_from_trained_model_folder(str(folder.parent), (0,))


@pytest.mark.parametrize("cls, configuration", [(FSEFTTrainer_FTLast, FIVE), (FSEFTTrainer_Scratch, f"{FIVE}_scratch")])
def test_nan_in_the_support_of_a_patch_training(work, cls, configuration):
    case = splits_of(work)["folds"][0][1]
    edit_images(work, case, with_nan)
    with pytest.raises(InputError, match=f"image of {case} in .*FSEFTPlans_3d_fullres holds NaN or infinite values"):
        make_trainer(work, cls, configuration=configuration).run_training()


def with_nan(image: np.ndarray) -> np.ndarray:
    image[0, 3, 3, 3] = np.nan
    return image


@pytest.mark.parametrize("kind", ["query", "support", "unlabelled", "everything"])
def test_case_of_the_splits_without_preprocessed_data(work, kind):
    splits, folder, options = splits_of(work), work.preprocessed / "FSEFTPlans_3d_fullres", ""
    if kind == "everything":
        shutil.rmtree(folder)
        case = sorted([*splits["folds"][0], *splits["queries"]])[0]
    elif kind == "unlabelled":
        case, options = splits["unlabelled_queries"][1], " --queries FOLDER"
        (work.preprocessed / "FSEFTPlans_3d_fullres_queries" / f"{case}.npy").unlink()
    else:
        case = splits["queries"][0] if kind == "query" else splits["folds"][0][0]
        for file in folder.glob(f"{case}*"):
            file.unlink()
    with pytest.raises(
        InputError, match=f"e.g. {case}: preprocess them with `fseft plan_and_preprocess -d ID{options}`"
    ):
        make_trainer(work).run_training()


def test_model_whose_support_is_no_longer_preprocessed(work):
    trainer = trained(work, epochs=1)
    for file in Path(trainer.preprocessed_dataset_folder).glob(f"{trainer.run.support[0]}*"):
        file.unlink()
    model = TrainedModel(Path(trainer.output_folder_base), FIVE, ["0"], "checkpoint_final.pth", torch.device("cpu"))
    with pytest.raises(InputError, match=f"e.g. {trainer.run.support[0]}: preprocess them with"):
        memory_from_bank(model, 0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"fseft_loss": "softdice"}, 'fseft_loss .* is \'softdice\': make it "nnunet" or "soft_dice"'),
        (
            {"fseft_gamma": 1.5},
            "fseft_gamma of '3d_fullres_5shot' in FSEFTPlans.json is 1.5: make it a number of at least 0",
        ),
        ({"fseft_lambda": "0.1"}, "fseft_lambda .* is '0.1': make it a number"),
        ({"fseft_steps_per_epoch": 0}, "fseft_steps_per_epoch .* is 0: make it a whole number of at least 1"),
        ({"fseft_crop_size": [12, 12]}, "fseft_crop_size .*: make it three whole numbers"),
        ({"patch_size": [24, 24]}, r"patch_size .* is \[24, 24\]: make it three whole numbers"),
        ({"patch_size": [24, 24.5, 24]}, "patch_size .*: make it three whole numbers"),
        ({"fseft_stop_at_plateau": "no"}, "fseft_stop_at_plateau .*: make it true or false"),
        ({"fseft_seed": None}, "fseft_seed .* is None: make it a whole number"),
        ({"fseft_lamda": 0.5}, "'fseft_lamda' of .* is not a known key: did you mean 'fseft_lambda'"),
        ({"fseft_wwwwqqqqzzzz": 1}, "'fseft_wwwwqqqqzzzz' of .* is not a known key: known are fseft_backbone, "),
    ],
)
def test_impossible_values_in_the_plans(work, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make_trainer(work, **settings)


@pytest.mark.slow
def test_crops_larger_than_the_views(work):
    """Which are windows; without views the crops of small volumes may be larger."""
    crop = {"fseft_crop_size": [20, 20, 20], "patch_size": [16, 24, 24]}
    with pytest.raises(
        InputError, match=r"fseft_crop_size of '3d_fullres_5shot' in .* is \[20, 20, 20\]: no axis may be"
    ):
        make_trainer(work, **crop).run_training()
    assert trained(work, FSEFTTrainer_Adapter, epochs=1, fseft_views=0, **crop).current_epoch == 1


def test_a_dataset_that_was_renamed(work):
    """nnU-Net would make a folder of results for the old name."""
    plans, content = work.plans(**TINY), work.dataset_json()
    work.preprocessed.rename(work.preprocessed.with_name("Dataset077_New"))
    said = "'FSEFTPlans' were made for Dataset077_Tiny, which is not in .*: was the dataset renamed"
    with pytest.raises(InputError, match=said):
        FSEFTTrainer({**plans, "continue_training": False}, FIVE, 0, content, torch.device("cpu"))
    assert not work.results.exists()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_empty_environment_variables(work, monkeypatch, variable):
    plans = work.plans(**TINY)
    monkeypatch.setenv(variable, "")
    with pytest.raises(InputError, match=f"{variable} is empty: export {variable}=FOLDER"):
        FSEFTTrainer({**plans, "continue_training": False}, FIVE, 0, work.dataset_json(), torch.device("cpu"))


@pytest.mark.parametrize("cls, configuration", [(FSEFTTrainer, FIVE), (FSEFTTrainer_Scratch, f"{FIVE}_scratch")])
def test_a_support_without_labels(work, cls, configuration):
    trainer = make_trainer(work, cls, configuration=configuration)
    edit_labels(work, trainer.do_split()[0], np.zeros_like)
    with pytest.raises(InputError, match="The support cases case_.* show no labelled structure.*--seed N"):
        trainer.run_training()


def test_a_support_of_which_everything_is_ignored():
    with pytest.raises(InputError, match="The support cases a show no"):
        require_labels([("a", np.array([[-1, 0, 3]]))], ignore_label=3)
    require_labels([("a", np.array([[-1, 0, 3]]))], ignore_label=None)


def test_a_bank_that_cannot_be_written(work, monkeypatch):
    def refuse(file):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))

    shutil.rmtree(work.preprocessed / "fseft_features")
    trainer = make_trainer(work)
    monkeypatch.setattr("fsefs_nnunet.features.arrays.replacing", refuse)
    with pytest.raises(
        InputError, match=r"fseft_features/.* cannot be written \(Permission denied\): make it writable"
    ):
        trainer.run_training()


def test_a_training_that_diverges_ends(work):
    """What would be a checkpoint of NaN is none; the last good one stays."""
    trainer = make_trainer(work)
    latest, train_step = Path(trainer.output_folder, "checkpoint_latest.pth"), trainer.train_step

    def spoil(batch: dict) -> dict:
        if trainer.current_epoch == 1:
            with torch.no_grad():
                trainer.network.head.bias[0] = float("nan")
        return train_step(batch)

    trainer.train_step = spoil
    with pytest.raises(InputError, match="The training diverged: in epoch 1 a weight became NaN"):
        trainer.run_training()
    assert all(weight.isfinite().all() for weight in read_checkpoint(latest)["network_weights"].values())
