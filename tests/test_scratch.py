"""The baseline with the backbone's architecture and random weights."""

import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from trainings import FIVE, make_trainer, splits_of

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.trainers.patch_trainer import missed_classes
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch


def test_classes_that_the_end_of_a_training_hardly_found():
    nan = float("nan")
    dice = [[0.0, 0.9, nan, 0.0], *[[0.8, 0.01, nan, nan]] * 4, [0.0, 0.04, nan, 0.06]]
    assert missed_classes(dice, ["found once", "found early", "never shown", "found"]) == ["found early"]
    assert missed_classes(dice[:1], ["a", "b", "c", "d"]) == ["a", "d"]


def test_scratch_baseline_takes_our_support(work):
    trainer = make_trainer(work, FSEFTTrainer_Scratch, configuration="3d_fullres_1shot_scratch", fold=1)
    support, queries = trainer.do_split()
    assert support == splits_of(work)["folds"][1][:1] and queries == splits_of(work)["queries"]
    trainer.dataset_class = infer_dataset_class(trainer.preprocessed_dataset_folder)
    assert [list(d.identifiers) for d in trainer.get_tr_and_val_datasets()] == [support, support]


def test_scratch_baseline_has_the_backbone_s_architecture_and_other_weights(work):
    trainer = make_trainer(work, FSEFTTrainer_Scratch, configuration=f"{FIVE}_scratch")
    trainer.initialize()
    own = trainer.network.state_dict()
    known = FrozenBackbone("phantom", "last").module.backbone_state()
    heads = "decoder.seg_layers."
    assert {k: v.shape for k, v in own.items() if k in known and heads not in k} == {
        k: v.shape for k, v in known.items() if heads not in k
    }
    assert not any(torch.equal(own[k], v) for k, v in known.items() if k.endswith("conv.weight"))
    output = [torch.randn(1, 3, 4, 4, 4, dtype=torch.bfloat16), torch.randn(1, 3, 2, 2, 2, dtype=torch.bfloat16)]
    target = [torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 2, 2, 2)]
    assert trainer.loss(output, target).dtype == torch.float32
