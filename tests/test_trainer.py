"""What a training reads, and what it leaves."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import run_training
from trainings import (
    FIVE,
    TINY,
    edit_images,
    edit_labels,
    identical,
    labels_of,
    make_trainer,
    predicted,
    save_case,
    splits_of,
    text_of,
    trained,
    weights,
)

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.cases.queries import UnlabelledQueries
from fsefs_nnunet.cases.splits import query_cases, save_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.features.disk import BANK_FOLDER
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.features.views import SupportViews
from fsefs_nnunet.files import PART
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.trainers.bank_trainer import BankTrainer
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_Adapter, FSEFTTrainer_Context

# ---- what a training reads ----


def test_log_of_a_training(banked):
    workspace, log = banked
    splits = splits_of(workspace)
    for case in splits["folds"][0]:
        assert f"'{case}'" in log.split("5 labelled support cases")[1].splitlines()[0]
    assert "5 queries, 3 of them with labels for the final validation" in log
    for name in ("spleen", "stomach", "kidney_left"):
        assert f"Size prior of {name}: " in log
    assert "Head rows from the universal head: {'spleen': 'spleen', 'kidney_left': 'kidney_left'}" in log
    for when in ("before this training", "after this training"):
        part = log.split(f"Predicted sizes of the queries in ml {when}:")[1].splitlines()[1:6]
        assert sorted(line.split(":")[0].strip() for line in part) == sorted(
            [*splits["queries"], *splits["unlabelled_queries"]]
        )
        assert all("stomach" in line for line in part)


def test_query_labels_change_no_weight(work):
    queries, unlabelled = query_cases(splits_of(work), 0)
    assert len(queries) == 3 and unlabelled
    expected = trained(work)
    before = labels_of(work, queries[0])
    rng = np.random.default_rng(0)
    edit_labels(work, queries, lambda seg: rng.integers(0, 4, seg.shape))
    assert not np.array_equal(labels_of(work, queries[0]), before)
    changed = trained(work)
    assert identical(weights(changed), weights(expected))
    assert changed._best_ema == expected._best_ema
    # the test sees what labels do: one support case's do change the weights
    edit_labels(work, splits_of(work)["folds"][0][:1], lambda seg: np.roll(seg, 5, 1))
    assert not identical(weights(trained(work)), weights(expected))


def test_query_images_matter_with_the_prior_alone(work):
    with_prior, without = trained(work), trained(work, fseft_lambda=0.0)
    assert not identical(weights(with_prior), weights(without))
    assert "The prior has no effect: it is switched off" in text_of(without)
    assert identical(weights(trained(work, FSEFTTrainer_Adapter)), weights(without))
    # during its warm-up the prior does nothing
    assert identical(weights(trained(work, fseft_prior_from_epoch=3)), weights(without))


@pytest.mark.slow
def test_folds_and_seeds_differ(work):
    first = weights(trained(work, epochs=1))
    assert not identical(weights(trained(work, epochs=1, fold=1)), first)
    assert not identical(weights(trained(work, epochs=1, fseft_seed=1)), first)


def test_dropped_channels_are_a_function_of_the_step(work):
    trainer = make_trainer(work, FSEFTTrainer_Context)
    trainer.on_train_start()
    crops = MapCrops((torch.zeros(2, 300, 4, 4, 4), torch.zeros(2, 200, 1, 1, 1)), (0, 0), (None,))
    kept = []
    for epoch, step in ((0, 1), (0, 2), (1, 1), (0, 1)):
        trainer.current_epoch, trainer.dataloader_train.step = epoch, step
        kept.append(trainer.kept_channels(crops))
    assert torch.equal(kept[0], kept[3])
    assert not any(torch.equal(kept[i], kept[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert not torch.equal(kept[0][0], kept[0][1])
    assert 0.87 < torch.stack(kept[:3]).float().mean() < 0.93
    assert kept[0].shape == (2, 500)
    assert make_trainer(work).kept_channels(crops) is None


def test_dropped_channels_change_the_training(work):
    class Without(FSEFTTrainer_Context):
        method = replace(FSEFTTrainer_Context.method, channel_dropout=0.0)

    with_dropout, without = trained(work, FSEFTTrainer_Context), trained(work, Without)
    assert not identical(weights(with_dropout), weights(without))
    assert "left out with a probability of 0.1" in text_of(with_dropout)
    assert "left out" not in text_of(without)


def test_global_random_state_does_not_matter(work):
    torch.manual_seed(1)
    first = weights(trained(work, epochs=1))
    torch.manual_seed(2)
    np.random.seed(2)
    assert identical(weights(trained(work, epochs=1)), first)


# ---- what a training leaves ----


@pytest.mark.slow
def test_final_checkpoint_of_the_default_plans(work):
    """Small, the adapter alone, and readable as data alone; it goes into a fresh network as nnU-Net loads it."""
    trainer = trained(work, epochs=1, plans=work.plans(fseft_steps_per_epoch=1, fseft_views=1, patch_size=[24] * 3))
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    assert file.stat().st_size < 1_000_000
    content = read_checkpoint(file)
    assert set(content["network_weights"]) == {
        *("feature_mean", "feature_std", "is_fitted", "reduction.weight"),
        *("adapter.conv1.weight", "adapter.conv2.weight", "head.weight", "head.bias"),
    }
    backbone = content["init_args"]["plans"]["configurations"][FIVE]["architecture"]["arch_kwargs"]
    assert backbone["backbone"] == "phantom"
    assert backbone["sha256"] == trainer.network.backbone.contract.sha256
    assert content["optimizer_state"]["state"] == {}
    fresh = make_trainer(work)
    fresh.load_checkpoint(str(file))
    assert identical(weights(fresh), weights(trainer))
    names = {path.name for path in file.parent.iterdir()}
    assert {"checkpoint_final.pth", "checkpoint_best.pth"} <= names
    assert "checkpoint_latest.pth" not in names


def test_huge_logits_are_predicted(work):
    """nnUNetv2_predict refuses infinite sums, which an adapter's unbounded logits could reach."""
    trainer = trained(work, epochs=1)
    with torch.no_grad():
        trainer.network.head.weight *= 1e6
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    query = trainer.run.labelled_queries[0]
    image = torch.zeros(1, 1, *TINY["patch_size"])
    image[..., :24, :20, :22] = torch.from_numpy(trainer.load_image(query))
    with torch.no_grad():
        assert trainer.network(image).abs().max() > 2000  # of logits above 1e5
    assert len(np.unique(predicted(trainer, query))) > 1


def test_half_written_checkpoints_do_not_matter(work):
    trainer = make_trainer(work, epochs=2)
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("latest", "best", "final"):
        (folder / f".checkpoint_{name}.pth.1-0{PART}").write_bytes(b"cut")
    trainer.run_training()
    read_checkpoint(folder / "checkpoint_final.pth")


def test_val_alone(work, monkeypatch):
    """nnUNetv2_train --val: the queries again from the final checkpoint."""
    trainer = trained(work, epochs=1)
    splits = splits_of(work)
    splits["folds"] = [[*fold, *splits["queries"][1:]] for fold in splits["folds"]]
    splits["queries"] = splits["queries"][:1]  # of one query is enough
    save_splits(splits, work.preprocessed / "splits_fseft.json")
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**TINY)))
    validation = Path(trainer.output_folder) / "validation"
    validation.mkdir()
    (validation / "case_of_earlier_draws.nii.gz").write_bytes(b"nnU-Net would average over it, too")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
    options = dict(only_run_validation=True, device=torch.device("cpu"))
    run_training("77", FIVE, 0, "FSEFTTrainer", "FSEFTPlans", **options)
    summary = json.loads((validation / "summary.json").read_text())
    assert [Path(case["prediction_file"]).name for case in summary["metric_per_case"]] == [
        f"{splits['queries'][0]}.nii.gz"
    ]


def test_a_query_that_was_labelled_since_is_read_with_its_label(work):
    """What was preprocessed of it when it was an unlabelled query lies there still."""
    case = splits_of(work)["folds"][0][0]
    queries = UnlabelledQueries(work.preprocessed / "FSEFTPlans_3d_fullres")
    np.save(queries.folder / f"{case}.npy", np.zeros((1, 9, 9, 9), np.float32))
    assert case in queries.cases
    trainer = trained(work, epochs=1)
    np.testing.assert_array_equal(trainer.load_image(case), trainer.load_case(case)[0][:])


def test_lambda_0_wants_nothing_of_the_queries(work):
    for file in (work.preprocessed / "FSEFTPlans_3d_fullres_queries").iterdir():
        file.unlink()
    trainer = trained(work, epochs=1, fseft_lambda=0)
    assert "The prior has no effect: it is switched off." in text_of(trainer)
    assert trainer.query_volumes is None


def validated(work, *args):
    """A training of an epoch with its final validation, as nnUNetv2_train runs them."""
    trainer = trained(work, *args, epochs=1)
    trainer.perform_actual_validation()
    return trainer


@pytest.mark.slow
def test_after_a_training_without_prior_only_the_queries_are_left_to_compute(work):
    shutil.rmtree(work.preprocessed / BANK_FOLDER)
    without = validated(work, FSEFTTrainer_Adapter)
    # of a window each; the final validation looks at three of the queries
    assert without.run.windows == len(without.run.support) + len(without.views.names)
    assert without.run.validation_windows == len(without.run.labelled_queries) == 3
    with_prior = validated(work)
    assert with_prior.run.windows == len(with_prior.run.queries) == 5 and with_prior.run.validation_windows == 0


def test_queries_go_through_the_backbone_once_for_the_prior_and_the_final_validation(work, monkeypatch):
    shutil.rmtree(work.preprocessed / BANK_FOLDER)
    trainer = validated(work)
    run = trainer.run
    assert run.windows == len(run.support) + len(trainer.views.names) + len(run.queries) == 15
    assert run.validation_windows == 0
    # another fold on the same features, and a method that looks at all of the queries; where there is no room, again
    assert validated(work, FSEFTTrainer_Adapter).run.validation_windows == 0
    used = sum(file.stat().st_size for file in (work.preprocessed / BANK_FOLDER).rglob("*.npy"))
    for file in (work.preprocessed / BANK_FOLDER).rglob("*__whole_*"):
        used -= file.stat().st_size
        file.unlink()
    monkeypatch.setenv("fseft_bank_gb", str((used + 1e5) / 1e9))
    assert validated(work, FSEFTTrainer_Adapter).run.validation_windows == 3
    assert not list((work.preprocessed / BANK_FOLDER).rglob("*__whole_*"))


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
def test_the_final_validation_is_nnunets_prediction(work, monkeypatch, float32, kept):
    """Of the queries, whether their features are in the bank or the backbone runs again.

    But for the two outermost voxels: nnU-Net's adapter sees features of padding there. Features stored in float16 move
    a few voxels of ties elsewhere, on one processor 7 of 5,760.
    """
    if not kept:
        monkeypatch.setattr(BankTrainer, "whole_queries", lambda self, *others: [])
    trainer = validated(work)
    for case in trainer.run.labelled_queries:
        made = nib.load(Path(trainer.output_folder) / "validation" / f"{case}.nii.gz")
        inside = (slice(2, -2),) * 3
        expected = predicted(trainer, case)[inside]
        assert (np.asarray(made.dataobj)[inside] == expected).mean() > 0.998 and expected.any()
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 3 and summary["foreground_mean"]["Dice"] > 0


def test_cap_of_the_bank_in_the_plans(work):
    with pytest.raises(InputError, match="fseft_bank_gb allows 0.001 GB: raise it, clear old banks"):
        make_trainer(work, fseft_views=10, fseft_bank_gb=0.001).run_training()


def test_training_decreases_the_loss(work):
    trainer = trained(work, epochs=8, fseft_steps_per_epoch=4, fseft_lambda=0.0, fseft_crop_size=[20, 20, 20])
    losses = trainer.logger.get_value("train_losses", step=None)
    assert np.isfinite(losses).all()
    assert np.mean(losses[-2:]) < np.mean(losses[:2]) - 0.05
    # the online validation looks at the same crops each epoch
    val = trainer.logger.get_value("val_losses", step=None)
    assert val[-1] < val[0] - 0.05


def test_size_prior_pulls_the_queries_sizes_towards_it(work):
    """Without a segmentation loss worth mentioning, the penalty goes down."""
    trainer = make_trainer(work, epochs=1, fseft_lambda=1000.0, fseft_prior_from_epoch=0, fseft_steps_per_epoch=12)
    penalties = []

    def mean_penalty():
        trainer.calibrate()
        with torch.no_grad():
            predictions = [trainer.query_volumes.predict(trainer.network, q, False) for q in trainer.run.queries]
        penalties.append(np.mean([trainer.prior.penalty(p, 0.3).item() for p in predictions]))

    trainer.on_train_start()
    mean_penalty()
    trainer.on_train_epoch_start()
    for _ in range(12):
        trainer.train_step(next(trainer.dataloader_train))
    looks = trainer.query_volumes.visits(12)
    assert len(trainer.seen) == looks < 12
    trainer.dataloader_train.step = 1
    assert trainer.penalty().item() == pytest.approx(trainer.seen[-1][2].item() * 12 / looks)  # as if each step looked
    mean_penalty()
    assert penalties[0] > 0.1
    assert penalties[1] < 0.8 * penalties[0]


def test_adapter_alone_gets_gradients(work):
    trainer = make_trainer(work, epochs=1)
    trainer.on_train_start()
    backbone = trainer.network.backbone.module
    before = {name: p.clone() for name, p in backbone.named_parameters()}
    trainer.on_train_epoch_start()
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    assert all(p.grad is not None and p.grad.any() for p in trainer.network.parameters())
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in backbone.named_parameters())
    assert not any(module.training for module in backbone.modules())
    optimised = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in trainer.network.parameters()}


def test_views_of_the_support(work):
    """Other images with label maps that fit them, the same in every training, drawn beside the originals."""
    trainers = [make_trainer(work, fseft_views=10, fold=1) for _ in range(2)]
    loaders = []
    for seed, trainer in enumerate(trainers):
        torch.manual_seed(seed), np.random.seed(seed)
        trainer.on_train_start()
        loaders.append(trainer.dataloader_train)
    state = np.random.get_state()[1].copy()
    case = trainer.run.support[0]
    original, views = trainer.load_image(case), [trainer.views.make(f"{case}__view{v}")[0] for v in range(2)]
    assert np.array_equal(np.random.get_state()[1], state)
    assert all(view.shape == original.shape for view in views)
    assert not np.array_equal(views[0], original) and not np.array_equal(*views)
    assert np.array_equal(views[0], trainers[0].views.make(f"{case}__view0")[0])
    assert trainer.segmentations[f"{case}__view0"].shape == trainer.segmentations[case].shape
    names = {key for _ in range(40) for key in next(loaders[0])["keys"]}
    assert names == {*trainer.run.support, *(f"{c}__view{v}" for c in trainer.run.support for v in range(2))}
    assert set(trainer.dataloader_val.cases) == set(trainer.run.support)
    assert trainer.inference_allowed_mirroring_axes is None
    # a view's label map turns with its image: the kidney, the brightest organ, stays bright under its label
    kidney = [trainer.segmentations[name][0] == 3 for name in (case, f"{case}__view0", f"{case}__view1")]
    for image, mask in zip((original, *views), kidney):
        assert mask.any() and image[0][mask].mean() > image[0].mean()


@pytest.mark.slow
def test_views_of_a_volume_larger_than_the_window(work):
    """One window each, so that a view costs one pass of the backbone; image and label map stay together."""
    trainer = make_trainer(work, fseft_views=10, fold=1, patch_size=[16, 24, 24], fseft_lambda=0.0)
    trainer.on_train_start()
    entries = [trainer.bank[name] for name in trainer.views.names]
    assert {entry.layout.shape for entry in entries} == {(16, 20, 22)}
    assert all(entry.layout.boxes == (((0, 0, 0), (16, 20, 22)),) for entry in entries)
    kidneys = 0
    for name in trainer.views.names:
        image, kidney = trainer.views.make(name)[0][0], trainer.segmentations[name][0] == 3
        if kidney.sum() > 20:
            kidneys += 1
            assert image[kidney].mean() > image[~kidney].mean()
    assert kidneys >= 2


def test_second_training_fills_no_bank(work):
    bank = work.preprocessed / "fseft_features"
    times = {file: file.stat().st_mtime_ns for file in bank.rglob("*.npy")}
    # five support cases, a view of each with its label map, once more pooled, five queries, three of them whole, too
    assert len(times) == 5 + 2 * 5 + 5 + 5 + 3
    trainer = trained(work, epochs=1, fold=2)
    assert trainer.run.windows == trainer.run.validation_windows == 0
    assert {file: file.stat().st_mtime_ns for file in bank.rglob("*.npy")} == times
    assert "through the frozen backbone" not in text_of(trainer)


def test_a_second_training_makes_no_view(work, monkeypatch):
    """Their label maps are stored with their features."""

    def make(self, name):
        raise AssertionError

    first = make_trainer(work)
    first.on_train_start()
    monkeypatch.setattr(SupportViews, "make", make)
    second = make_trainer(work)
    second.on_train_start()
    assert second.run.windows == 0 and len(second.views.names) == 5
    for name in second.views.names:
        assert np.array_equal(second.segmentations[name], first.segmentations[name])
        assert second.segmentations[name].shape[1:] == second.bank[name].layout.shape


def preprocessed_files(work) -> list[Path]:
    folders = (work.preprocessed / f"FSEFTPlans_3d_fullres{ending}" for ending in ("", "_queries"))
    return [file for folder in folders for file in folder.iterdir()]


def test_touched_cases_are_not_computed_again_and_changed_ones_are(work):
    for file in preprocessed_files(work):
        os.utime(file)
    trainer = make_trainer(work)
    trainer.on_train_start()
    assert trainer.run.windows == 0
    support, query = trainer.run.support[0], trainer.run.labelled_queries[0]
    edit_images(work, support, lambda image: image + 0.1)
    changed = make_trainer(work)
    changed.on_train_start()
    assert changed.run.windows == 2  # the case and its view
    edit_images(work, query, lambda image: image + 0.1)
    changed = make_trainer(work)
    changed.on_train_start()
    assert changed.run.windows == 1
    unlabelled = UnlabelledQueries(work.preprocessed / "FSEFTPlans_3d_fullres")
    file = unlabelled.file(unlabelled.cases[0])
    np.save(file, np.load(file) + 0.1)
    changed = make_trainer(work)
    changed.on_train_start()
    assert changed.run.windows == 1


def test_other_labels_of_a_support_case_make_other_views_of_it(work):
    case = splits_of(work)["folds"][0][0]
    edit_labels(work, [case], lambda seg: np.roll(seg, 5, 1))
    trainer = make_trainer(work)
    trainer.on_train_start()
    assert trainer.run.windows == 1  # the view alone


def test_a_view_with_a_box_of_a_changed_case_is_made_anew(work):
    trainer = make_trainer(work, fseft_cutmix=1.0)
    trainer.on_train_start()
    assert trainer.run.windows == 5  # every view shows a box now
    changed = trainer.views.other_case(next(iter(trainer.views.names)))
    showing = [view for view in trainer.views.names if trainer.views.other_case(view) == changed]
    edit_images(work, changed, lambda image: image + 0.1)
    again = make_trainer(work, fseft_cutmix=1.0)
    again.on_train_start()
    assert showing and again.run.windows == 2 + len(showing)  # the case, its view, and those that show it


def test_a_thin_support_case_is_said_to_make_thin_crops(work):
    trainer = make_trainer(work, epochs=1, fseft_lambda=0.0)
    trainer.initialize()
    thin = trainer.do_split()[0][0]
    data, labels, _, properties = trainer.load_case(thin)
    data, labels = (np.array(array[:])[..., :3] for array in (data, labels))
    save_case(work, trainer.dataset_class, thin, data, labels, properties)
    trainer.run_training()
    assert "Crops have [12, 12, 3] voxels, not [12, 12, 12]: along each axis, the shortest" in text_of(trainer)
