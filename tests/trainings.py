"""Short trainings on the tiny dataset, and what tests ask of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class

from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer

FIVE = "3d_fullres_5shot"
TINY = {
    "fseft_crop_size": [12, 12, 12],
    "fseft_steps_per_epoch": 2,
    "fseft_prior_from_epoch": 1,
    "fseft_views": 1,
    "patch_size": [24, 24, 24],  # one window holds a volume
}


def make_trainer(
    workspace,
    cls=FSEFTTrainer,
    epochs=3,
    configuration=FIVE,
    fold=0,
    dataset_json=None,
    plans=None,
    device=torch.device("cpu"),
    **settings,
):
    plans = plans or workspace.plans(**{**TINY, **settings})
    plans["continue_training"] = False
    content = dataset_json or workspace.dataset_json()
    trainer = cls(plans, configuration, fold, content, device)
    trainer.num_epochs = epochs
    return trainer


def trained(*args, **kwargs):
    trainer = make_trainer(*args, **kwargs)
    trainer.run_training()
    return trainer


def predicted(trainer, case: str) -> np.ndarray:
    """Label map (X, Y, Z) that nnU-Net's predictor gives of a preprocessed case, from the model's folder alone."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
        predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (trainer.fold,))
    image = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)[0][:]
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image))
    return predictor.label_manager.convert_logits_to_segmentation(logits).numpy()


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def identical(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def text_of(trainer) -> str:
    return Path(trainer.log_file).read_text()


def edit(file, change) -> None:
    """Let `change` alter the content of a JSON file."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_labels(workspace, cases, change) -> None:
    """Replace the preprocessed label maps (1, X, Y, Z) of `cases` by what `change` makes of them."""
    folder = str(workspace.preprocessed / "FSEFTPlans_3d_fullres")
    cls = infer_dataset_class(folder)
    for case in cases:
        data, segmentation, _, properties = cls(folder, [case]).load_case(case)
        save_case(workspace, cls, case, np.array(data[:]), change(np.array(segmentation[:])), properties)


def edit_images(workspace, case, change) -> None:
    """Replace the preprocessed image (channels, X, Y, Z) of `case` by what `change` makes of it."""
    folder = str(workspace.preprocessed / "FSEFTPlans_3d_fullres")
    cls = infer_dataset_class(folder)
    data, segmentation, _, properties = cls(folder, [case]).load_case(case)
    data, segmentation = change(np.array(data[:])), np.array(segmentation[:])
    save_case(workspace, cls, case, data, segmentation, properties)


def save_case(workspace, cls, case, data, segmentation, properties) -> None:
    folder = workspace.preprocessed / "FSEFTPlans_3d_fullres"
    for file in folder.glob(f"{case}*"):
        file.unlink()
    blocks, chunks = comp_blosc2_params(data.shape, (16, 16, 16))
    layout = dict(chunks=chunks, blocks=blocks, chunks_seg=chunks, blocks_seg=blocks)
    cls.save_case(data, segmentation.astype(np.int8), properties, str(folder / case), **layout)


def labels_of(workspace, case) -> np.ndarray:
    folder = str(workspace.preprocessed / "FSEFTPlans_3d_fullres")
    return np.array(infer_dataset_class(folder)(folder, [case]).load_case(case)[1][:])


def splits_of(workspace) -> dict:
    return load_splits(workspace.preprocessed / "splits_fseft.json")
