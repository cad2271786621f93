"""Trainings on other backbones, of several channels too."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from trainings import (
    FIVE,
    TINY,
    edit,
    predicted,
    splits_of,
    text_of,
    trained,
)

from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import save_backbone
from fsefs_nnunet.cases.images import list_images
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.nnunet import planning
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner


@pytest.mark.slow
def test_adapter_on_a_stock_nnunet_model_of_the_same_plans(work, tmp_path, monkeypatch):
    """nnUNetTrainer trains 3d_fullres of our plans; imported, its model is planned with and adapted."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    plans = work.plans()
    kwargs = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    plans["continue_training"] = False
    stock = nnUNetTrainer(plans, "3d_fullres", 0, work.dataset_json(), torch.device("cpu"))
    stock.num_epochs = stock.num_iterations_per_epoch = stock.num_val_iterations_per_epoch = 1
    stock.run_training()
    assert (work.preprocessed / "splits_final.json").exists()  # nnU-Net's own, beside ours
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    contract = import_nnunet_model("stock", Path(stock.output_folder_base), tmp_path / "backbones")
    assert planning.plan(77, "stock", [], 1, 8, None) == "FSEFTPlans_stock"
    for kind in ("", "_queries"):  # its preprocessing is that of the plans it was trained with
        folder = work.preprocessed / f"FSEFTPlans_3d_fullres{kind}"
        shutil.copytree(folder, folder.with_name(f"FSEFTPlans_stock_3d_fullres{kind}"))
    plans = json.loads((work.preprocessed / "FSEFTPlans_stock.json").read_text())
    plans["configurations"][FIVE].update(TINY)
    trainer = trained(work, epochs=1, plans=plans)
    assert trainer.network.backbone.contract.sha256 == contract.sha256
    assert "'spleen': 'spleen', 'stomach': 'stomach'" in text_of(trainer)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()


@pytest.fixture
def pair(work, tmp_path, monkeypatch, contract):
    """A backbone of two channels with fresh weights, and the dataset with each image twice, planned for it."""
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    fields = {"normalization_schemes": ("CTNormalization", "ZScoreNormalization"), "use_mask_for_norm": (False, False)}
    wanted = replace(contract, id="pair", channel_names=("CT", "MRI"), **fields)
    save_backbone(wanted, NNUNetBackbone(wanted, "last").backbone_state(), tmp_path / "backbones")
    for file in (*(work.raw / "imagesTr").iterdir(), *work.queries.iterdir()):
        shutil.copy(file, file.with_name(file.name.replace("_0000", "_0001")))
    edit(work.raw / "dataset.json", lambda content: content.update(channel_names={"0": "CT", "1": "MRI"}))
    planner = FSEFTPlanner(work.dataset, backbone="pair")
    planner.plan_experiment()
    manager = PlansManager(str(work.preprocessed / "FSEFTPlans_pair.json"))
    configuration = manager.get_configuration("3d_fullres")
    folder = work.preprocessed / configuration.data_identifier
    folder.mkdir()
    preprocessor = configuration.preprocessor_class(verbose=False)
    for case, files in get_filenames_of_train_images_and_targets(str(work.raw)).items():
        arguments = (files["images"], files["label"], manager, configuration, work.dataset_json())
        preprocessor.run_case_save(str(folder / case), *arguments)
    images = list_images(work.queries, work.dataset_json()).require_sound()
    UnlabelledQueries(folder).preprocess(images, manager, configuration, work.dataset_json())
    plans = json.loads((work.preprocessed / "FSEFTPlans_pair.json").read_text())
    plans["configurations"][FIVE].update(TINY)
    return plans


@pytest.mark.slow
def test_two_channels(work, pair):
    trainer = trained(work, epochs=1, plans=pair)
    assert trainer.load_image(trainer.run.support[0]).shape[0] == trainer.unlabelled.load("scan_0").shape[0] == 2
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    query = splits_of(work)["queries"][0]
    assert predicted(trainer, query).shape == trainer.load_image(query).shape[1:]


def test_nan_in_the_second_channel_names_its_file():
    image = np.zeros((2, 4, 4, 4))
    image[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^b_0001\.nii\.gz holds NaN"):
        require_finite(image, ["b_0000.nii.gz", "b_0001.nii.gz"])
