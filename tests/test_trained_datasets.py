"""Trainings on datasets of every kind: regions, ignored voxels, missing classes, few cases, no queries."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from trainings import (
    edit_images,
    edit_labels,
    identical,
    labels_of,
    make_trainer,
    predicted,
    splits_of,
    text_of,
    trained,
    weights,
)

from fsefs_nnunet.losses.soft_dice import SoftDiceLoss
from fsefs_nnunet.nnunet import drawing
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_Adapter, FSEFTTrainer_LinearProbe

# ---- variants ----


def test_linear_probe(work):
    trainer = trained(work, FSEFTTrainer_LinearProbe, epochs=2)
    assert {name for name, _ in trainer.network.named_parameters()} == {"head.weight", "head.bias"}
    features = trainer.network.backbone.out_channels
    assert f"{4 * features + 4} parameters are trained" in text_of(trainer)
    assert trainer.query_volumes is None


def test_soft_dice_is_selectable(work):
    default, published = make_trainer(work), make_trainer(work, fseft_loss="soft_dice", fseft_lambda=0.0)
    for trainer in (default, published):
        trainer.initialize()
    assert isinstance(published.loss, SoftDiceLoss) and not isinstance(default.loss, SoftDiceLoss)
    published.run_training()
    assert all(0 < loss <= 1 for loss in published.logger.get_value("train_losses", step=None))


def test_one_shot(work):
    trainer = trained(work, configuration="3d_fullres_1shot", epochs=1)
    assert trainer.run.support == splits_of(work)["folds"][0][:1]


def test_class_missing_in_the_support(work):
    """In one support case the prior comes from the others; in all of them there is none, and training goes on."""
    support = splits_of(work)["folds"][0]
    edit_labels(work, support[:1], lambda seg: np.where(seg == 2, 0, seg))
    trainer = trained(work, epochs=2)
    assert trainer.prior.expected[1].num_cases <= 4 and trainer.prior.expected[1].size > 0
    edit_labels(work, support[1:], lambda seg: np.where(seg == 2, 0, seg))
    trainer = trained(work, epochs=2)
    assert trainer.prior.expected[1] is None and all(trainer.prior.expected[k] for k in (0, 2))
    assert "Size prior of stomach: none" in text_of(trainer)
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer).values())


def test_constant_images(work):
    """One of the support and a query: nothing to see, nothing that breaks."""
    splits = splits_of(work)
    query = splits["queries"][0]
    folder = str(work.preprocessed / "FSEFTPlans_3d_fullres")
    for case in (splits["folds"][0][0], query):
        edit_images(work, case, np.zeros_like)
        assert not np.asarray(infer_dataset_class(folder)(folder, [case]).load_case(case)[0][:]).any()
    trainer = trained(work, fseft_lambda=0.1)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    assert all(torch.isfinite(tensor).all() for tensor in trainer.network.state_dict().values())
    log = text_of(trainer)
    for case in (splits["folds"][0][0], query):
        assert f"The image of {case} is constant" in log
    assert re.search(f"spleen of {query} .*: the prior does not enlarge it", log.split("after this training")[1])


def test_regions_with_ignore_label(work):
    """A support case with ignored voxels gives no size; ignored voxels give no gradient but training goes on."""
    dataset = {
        **work.dataset_json(),
        "labels": {"background": 0, "soft": [1, 2], "stomach": 2, "kidney_left": 3, "ignore": 4},
        "regions_class_order": [1, 2, 3],
    }
    support = splits_of(work)["folds"][0]
    sizes = [[(np.isin(labels_of(work, case), n)).sum() for n in ([1, 2], [2], [3])] for case in support]

    def ignore_a_slab(seg):
        seg[:, :5] = 4
        return seg

    edit_labels(work, support[:1], ignore_a_slab)
    trainer = trained(work, epochs=2, dataset_json=dataset)
    assert trainer.label_manager.has_regions and trainer.label_manager.has_ignore_label
    assert next(trainer.dataloader_train)["target"].shape[1] == 4
    assert trainer.network.head.out_channels == 3
    # four sizes are left, so each prior is their mean; voxels of 10 mm are 1 ml
    expected = np.mean(sizes[1:], 0)
    assert [prior.num_cases for prior in trainer.prior.expected] == [4, 4, 4]
    np.testing.assert_allclose([prior.size for prior in trainer.prior.expected], expected)
    assert "{'kidney_left': 'kidney_left'}" in text_of(trainer)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()

    edit_labels(work, support[1:], ignore_a_slab)
    none = trained(work, epochs=1, dataset_json=dataset)
    assert none.prior.expected == (None,) * 3 and none.query_volumes is None
    assert "no support case shows a class whole" in text_of(none)


VARIANTS = {
    "one class": {"labels": {"background": 0, "spleen": 1}},
    "twenty classes": {"labels": {"background": 0, **{f"slab_{i}": i for i in range(1, 21)}}},
    "regions": {
        "labels": {"background": 0, "organs": [1, 2, 3], "kidney_left": 3},
        "regions_class_order": [1, 3],
    },
    "ignore": {"labels": {"background": 0, "spleen": 1, "stomach": 2, "kidney_left": 3, "ignore": 4}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_label_variants(work, variant):
    """Regions and the ignore label each without the other, one class and twenty: a step and what is predicted then."""
    change = {
        "one class": lambda seg: np.where(seg == 1, 1, 0),
        "twenty classes": lambda seg: 1 + np.indices(seg.shape)[1] * 20 // seg.shape[1],
        "ignore": lambda seg: np.where(np.arange(seg.shape[1])[:, None, None] < 5, 4, seg),
    }.get(variant)
    if change:
        edit_labels(work, splits_of(work)["folds"][0], change)
    dataset = {**work.dataset_json(), **VARIANTS[variant]}
    trainer = trained(work, epochs=1, dataset_json=dataset, fseft_steps_per_epoch=1)
    outputs = {"one class": 2, "twenty classes": 21, "regions": 2, "ignore": 4}[variant]
    assert trainer.network.head.out_channels == outputs
    assert trainer.label_manager.has_regions == (variant == "regions")
    assert trainer.label_manager.has_ignore_label == (variant == "ignore")
    # a case with ignored voxels shows no organ whole; the twenty slabs reach the border of the volume
    without = variant in ("ignore", "twenty classes")
    assert [prior is None for prior in trainer.prior.expected] == [without] * len(trainer.classes)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    query = splits_of(work)["queries"][0]
    segmentation, expected = predicted(trainer, query), decoded(trainer, trainer.load_case(query)[0][:])
    assert (segmentation == expected).mean() > 0.99  # nnU-Net blends windows in half precision
    values = set(np.unique(segmentation))
    possible = {"one class": {0, 1}, "regions": {0, 1, 3}, "ignore": {0, 1, 2, 3}, "twenty classes": {*range(21)}}
    assert len(values) > 1 and values <= possible[variant]


def decoded(trainer, image: np.ndarray) -> np.ndarray:
    """Label map (X, Y, Z) that the network's outputs on an image (1, X, Y, Z) of one window stand for."""
    room = [window - n for window, n in zip(trainer.configuration_manager.patch_size, image.shape[1:])]
    padded = np.pad(image, [(0, 0), *((r // 2, r - r // 2) for r in room)])
    with torch.no_grad():
        logits = trainer.network(torch.from_numpy(padded)[None])[0]
    inside = (slice(r // 2, r // 2 + n) for r, n in zip(room, image.shape[1:]))
    logits = logits[(slice(None), *inside)].numpy()
    if not trainer.label_manager.has_regions:
        return logits.argmax(0)
    segmentation = np.zeros(image.shape[1:], int)
    for output, value in zip(logits, trainer.dataset_json["regions_class_order"]):
        segmentation[output > 0] = value
    return segmentation


def test_labels_in_any_order(work):
    """Outputs, priors and head rows follow the labels' values, not their order in dataset.json."""
    content = work.dataset_json()
    shuffled = {**content, "labels": dict(reversed(content["labels"].items()))}
    first, second = (trained(work, epochs=2, dataset_json=d) for d in (content, shuffled))
    assert identical(weights(first), weights(second))
    pick = [line.split(": ", 1)[1] for line in text_of(first).splitlines() if "Size prior of" in line]
    assert pick == [line.split(": ", 1)[1] for line in text_of(second).splitlines() if "Size prior of" in line]


# ---- exactly K labelled cases ----


@pytest.fixture
def five(work):
    """Five labelled cases and a folder of unlabelled ones: all that the user has."""
    keep = splits_of(work)["folds"][0]
    for folder in (work.raw / "imagesTr", work.raw / "labelsTr", work.preprocessed / "FSEFTPlans_3d_fullres"):
        for file in folder.iterdir():
            if not file.name.startswith(tuple(keep)):
                file.unlink()
    drawing.write_splits(77, [5], str(work.queries), 20, 5, 12345)
    return work


def test_five_labelled_cases_and_unlabelled_queries(five):
    splits = splits_of(five)
    assert splits["queries"] == [] and splits["unlabelled_queries"] == ["scan_0", "scan_1"]
    trainer = trained(five)
    assert trainer.run.queries == ["scan_0", "scan_1"] and trainer.query_volumes is not None
    trainer.perform_actual_validation()
    log = text_of(trainer)
    assert "2 queries, 0 of them with labels" in log
    assert "scan_1: spleen" in log
    assert "No labelled queries: the final validation is skipped." in log
    assert not (Path(trainer.output_folder) / "validation").exists()
    # the prior acts
    assert not identical(weights(trainer), weights(trained(five, FSEFTTrainer_Adapter)))


@pytest.mark.slow
def test_an_unlabelled_query_without_the_organs(five):
    """A scan of air: said, and the prior does not ask for organs in it."""
    file = five.preprocessed / "FSEFTPlans_3d_fullres_queries" / "scan_1.npy"
    np.save(file, np.zeros_like(np.load(file)))
    trainer = trained(five, epochs=8, fseft_steps_per_epoch=8)
    predictions = {
        query: trainer.query_volumes.predict(trainer.network, query, has_regions=False)
        for query in ("scan_0", "scan_1")
    }
    remarks = {q: trainer.prior.remarks(p.sizes, trainer.class_names) for q, p in predictions.items()}
    assert set(remarks["scan_1"]) == {"spleen", "stomach", "kidney_left"}
    assert not any("seems absent" in reasons for reasons in remarks["scan_0"].values())
    assert trainer.prior.penalty(predictions["scan_1"], 0.1) == 0
    log = text_of(trainer).split("after this training")[1]
    assert all(f"{name} of scan_1" in log for name in remarks["scan_1"])


def test_no_queries_at_all(five):
    drawing.write_splits(77, [5], None, 20, 5, 12345)
    trainer = trained(five, epochs=2)
    assert trainer.run.queries == [] and trainer.query_volumes is None
    assert "The prior has no effect: there are no queries" in text_of(trainer)


def test_fold_all(work):
    trainer = trained(work, fold="all", epochs=1)
    assert trainer.run.support == [f"case_{i}" for i in range(8)]
    assert trainer.run.queries == ["scan_0", "scan_1"]
    trainer.perform_actual_validation()
    assert "final validation is skipped" in text_of(trainer)
    assert Path(trainer.output_folder).name == "fold_all"
