import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, infer_dataset_class
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from fsefs_nnunet import planning
from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.importing import import_nnunet_model
from fsefs_nnunet.backbones.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.store import load_weights, save_backbone
from fsefs_nnunet.cases.preprocessed import require_finite
from fsefs_nnunet.cases.queries import UnlabelledQueries, images_in
from fsefs_nnunet.cases.splits import load_splits, query_cases, save_splits
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.inference.support import memory_from_bank
from fsefs_nnunet.inference.trained_model import TrainedModel
from fsefs_nnunet.losses import SoftDiceLoss
from fsefs_nnunet.planners.fseft_planner import FSEFTPlanner
from fsefs_nnunet.shims import fseft_trainers
from fsefs_nnunet.size_prior import size_penalty
from fsefs_nnunet.trainers.fine_tuning import FSEFTTrainer_FTLast
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer, FSEFTTrainer_Adapter, FSEFTTrainer_LinearProbe
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch

pytestmark = pytest.mark.usefixtures("one_thread")

FIVE = "3d_fullres_5shot"
TINY = {"fseft_crop_size": [12, 12, 12], "fseft_steps_per_epoch": 2, "fseft_prior_from_epoch": 1, "fseft_views": 1}


@pytest.fixture(scope="session")
def banked(tiny, tmp_path_factory):
    """A feature bank of the tiny dataset, filled by one epoch of training, for the other tests to copy."""
    folder = tmp_path_factory.mktemp("banked") / "work"
    shutil.copytree(tiny.root, folder)
    copy = type(tiny)(folder)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in copy.environment().items():
            patch.setenv(name, value)
        trainer = make_trainer(copy, epochs=1)
        trainer.run_training()
    return copy, text_of(trainer)


@pytest.fixture
def work(banked, tmp_path, monkeypatch):
    """A copy with a filled bank and no results."""
    source, _ = banked
    copy = type(source)(tmp_path / "copy")
    shutil.copytree(source.root, copy.root, ignore=shutil.ignore_patterns("nnUNet_results"))
    for name, folder in copy.environment().items():
        monkeypatch.setenv(name, folder)
    return copy


def make_trainer(
    workspace, cls=FSEFTTrainer, epochs=3, configuration=FIVE, fold=0, dataset_json=None, plans=None, **settings
):
    plans = plans or workspace.plans(**{**TINY, **settings})
    plans["continue_training"] = False
    content = dataset_json or workspace.dataset_json()
    trainer = cls(plans, configuration, fold, content, torch.device("cpu"))
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
    for when in ("before this training", "after training"):
        part = log.split(f"Predicted sizes of the queries in ml {when}:")[1].splitlines()[1:6]
        assert sorted(line.split(":")[0].strip() for line in part) == sorted(
            [*splits["queries"], *splits["unlabelled_queries"]]
        )
        assert all("stomach" in line and "(S " in line for line in part)


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
    assert "The size prior has no effect: it is switched off" in text_of(without)
    assert identical(weights(trained(work, FSEFTTrainer_Adapter)), weights(without))
    # during its warm-up the prior does nothing
    assert identical(weights(trained(work, fseft_prior_from_epoch=3)), weights(without))


def test_folds_and_seeds_differ(work):
    first = weights(trained(work, epochs=1))
    assert not identical(weights(trained(work, epochs=1, fold=1)), first)
    assert not identical(weights(trained(work, epochs=1, fseft_seed=1)), first)


def test_global_random_state_does_not_matter(work):
    torch.manual_seed(1)
    first = weights(trained(work, epochs=1))
    torch.manual_seed(2)
    np.random.seed(2)
    assert identical(weights(trained(work, epochs=1)), first)


# ---- interruption ----


class Interruption(Exception):
    pass


class Interrupted(FSEFTTrainer):
    def on_epoch_end(self):
        super().on_epoch_end()
        if self.current_epoch == 2:
            raise Interruption


def test_continued_training_is_bit_identical(work):
    expected = trained(work, epochs=4)
    broken = make_trainer(work, Interrupted, epochs=4)
    with pytest.raises(Interruption):
        broken.run_training()
    latest = Path(broken.output_folder) / "checkpoint_latest.pth"
    assert not list(latest.parent.glob("*.part"))
    torch.manual_seed(999)
    continued = make_trainer(work, epochs=4)
    continued.load_checkpoint(str(latest))
    assert continued.current_epoch == 2
    continued.run_training()
    assert identical(weights(continued), weights(expected))
    losses = [t.logger.get_value("train_losses", step=None) for t in (continued, expected)]
    np.testing.assert_array_equal(losses[0], losses[1])


def test_plateau_stop_holds_when_continued(work):
    """The rule needs thirty epochs; a loss that cannot fall, because the rate is zero, ends the training there."""
    settings = dict(fseft_stop_at_plateau=True, fseft_steps_per_epoch=1, fseft_crop_size=[4, 4, 4], fseft_lambda=0.0)

    class Still(FSEFTTrainer):
        initial_lr_of_method = 0.0

        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.dataloader_train.start_epoch(0)  # the same crops, the same loss

    stopped = trained(work, Still, epochs=40, **settings)
    assert stopped.current_epoch == 30
    assert "Training ends after epoch 29: the training loss no longer falls" in text_of(stopped)
    continued = make_trainer(work, Still, epochs=40, **settings)
    continued.load_checkpoint(str(Path(stopped.output_folder) / "checkpoint_final.pth"))
    continued.run_training()
    assert continued.current_epoch == 30
    assert identical(weights(continued), weights(stopped))
    assert trained(work, Still, epochs=31, **{**settings, "fseft_stop_at_plateau": False}).current_epoch == 31


def test_one_training_of_a_fold_at_a_time(work):
    """A command that was started twice, or the training of one that was killed, would write into each other's files."""
    trainer, beside = make_trainer(work, epochs=1), make_trainer(work, epochs=1, fold=1)
    with FileLock(Path(trainer.output_folder) / "training.lock"):
        with pytest.raises(InputError, match=r"Another process trains in .*fold_0.*wait until it ends, or end it"):
            trainer.run_training()
        beside.run_training()
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


# ---- what a training leaves ----


def test_final_checkpoint_of_the_default_plans(work):
    """Small, the adapter alone, and readable as data alone; it goes into a fresh network as nnU-Net loads it."""
    trainer = trained(work, epochs=1, plans=work.plans(fseft_steps_per_epoch=1, fseft_views=1))
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
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= names
    assert "checkpoint_latest.pth" not in names


def test_half_written_checkpoints_do_not_matter(work):
    trainer = make_trainer(work, epochs=2)
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("latest", "best", "final"):
        (folder / f"checkpoint_{name}.pth.part").write_bytes(b"cut")
    trainer.run_training()
    assert not list(folder.glob("*.part"))
    read_checkpoint(folder / "checkpoint_final.pth")


def test_val_alone(work, monkeypatch):
    """nnUNetv2_train --val: the queries again from the final checkpoint."""
    trainer = trained(work, epochs=1)
    splits = splits_of(work)
    splits["folds"] = [[*fold, *splits["queries"][1:]] for fold in splits["folds"]]
    splits["queries"] = splits["queries"][:1]  # of one query is enough
    save_splits(splits, work.preprocessed / "splits_fseft.json")
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**TINY)))
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
    options = dict(only_run_validation=True, device=torch.device("cpu"))
    run_training("77", FIVE, 0, "FSEFTTrainer", "FSEFTPlans", **options)
    summary = json.loads((Path(trainer.output_folder) / "validation" / "summary.json").read_text())
    assert [Path(case["prediction_file"]).name for case in summary["metric_per_case"]] == [
        f"{splits['queries'][0]}.nii.gz"
    ]


def test_cap_of_the_bank_in_the_plans(work):
    with pytest.raises(InputError, match="fseft_bank_gb allows 0.001 GB: raise it, clear old banks"):
        make_trainer(work, fseft_views=2, fseft_bank_gb=0.001).run_training()


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
        from fsefs_nnunet.size_prior import size_penalty

        with torch.no_grad():
            sizes = [trainer.query_sizes.predict(trainer.network, q, False).soft for q in trainer.queries]
        values = [size_penalty(s[trainer.known], trainer.prior_ml, 0.3).mean().item() for s in sizes]
        penalties.append(np.mean(values))

    trainer.on_train_start()
    mean_penalty()
    trainer.on_train_epoch_start()
    for _ in range(12):
        trainer.train_step(next(trainer.dataloader_train))
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
    trainers = [make_trainer(work, fseft_views=2, fold=1) for _ in range(2)]
    loaders = []
    for seed, trainer in enumerate(trainers):
        torch.manual_seed(seed), np.random.seed(seed)
        trainer.on_train_start()
        loaders.append(trainer.dataloader_train)
    state = np.random.get_state()[1].copy()
    case = trainer.support[0]
    original, views = trainer.load_image(case), [trainer.load_image(f"{case}__view{v}") for v in range(2)]
    assert np.array_equal(np.random.get_state()[1], state)
    assert all(view.shape == original.shape for view in views)
    assert not np.array_equal(views[0], original) and not np.array_equal(*views)
    assert np.array_equal(views[0], trainers[0].load_image(f"{case}__view0"))
    assert trainer.load_segmentation(f"{case}__view0").shape == trainer.load_segmentation(case).shape
    names = {key for _ in range(40) for key in next(loaders[0])["keys"]}
    assert names == {*trainer.support, *(f"{c}__view{v}" for c in trainer.support for v in range(2))}
    assert set(trainer.dataloader_val.cases) == set(trainer.support)
    assert trainer.inference_allowed_mirroring_axes is None
    # a view's label map turns with its image: the kidney, the brightest organ, stays bright under its label
    kidney = [trainer.load_segmentation(name)[0] == 3 for name in (case, f"{case}__view0", f"{case}__view1")]
    for image, mask in zip((original, *views), kidney):
        assert mask.any() and image[0][mask].mean() > image[0].mean()


def test_views_of_a_volume_larger_than_the_window(work):
    """One window each, so that a view costs one pass of the backbone; image and label map stay together."""
    trainer = make_trainer(work, fseft_views=6, fold=1, patch_size=[24, 24, 24], fseft_lambda=0.0)
    trainer.on_train_start()
    entries = [trainer.bank[name] for name in trainer.views]
    assert {entry.layout.shape for entry in entries} == {(24, 24, 24)}
    assert all(entry.layout.boxes == (((0, 0, 0), (24, 24, 24)),) for entry in entries)
    kidneys = 0
    for name in trainer.views:
        image, kidney = trainer.load_image(name)[0], trainer.load_segmentation(name)[0] == 3
        if kidney.sum() > 20:
            kidneys += 1
            assert image[kidney].mean() > image[~kidney].mean()
    assert kidneys >= 6


def test_second_training_fills_no_bank(work):
    bank = work.preprocessed / "fseft_features"
    times = {file: file.stat().st_mtime_ns for file in bank.rglob("*.npy")}
    assert len(times) == 20  # five support cases, a view of each, once more pooled, five queries
    trainer = trained(work, epochs=1, fold=2)
    assert {file: file.stat().st_mtime_ns for file in bank.rglob("*.npy")} == times
    assert "through the frozen backbone" not in text_of(trainer)


# ---- variants ----


def test_linear_probe(work):
    trainer = trained(work, FSEFTTrainer_LinearProbe, epochs=2)
    assert {name for name, _ in trainer.network.named_parameters()} == {"head.weight", "head.bias"}
    features = trainer.network.backbone.out_channels
    assert f"{4 * features + 4} parameters are trained" in text_of(trainer)
    assert trainer.query_sizes is None


def test_soft_dice_is_selectable(work):
    default, published = make_trainer(work), make_trainer(work, fseft_loss="soft_dice", fseft_lambda=0.0)
    for trainer in (default, published):
        trainer.initialize()
    assert isinstance(published.loss, SoftDiceLoss) and not isinstance(default.loss, SoftDiceLoss)
    published.run_training()
    assert all(0 < loss <= 1 for loss in published.logger.get_value("train_losses", step=None))


def test_one_shot(work):
    trainer = trained(work, configuration="3d_fullres_1shot", epochs=1)
    assert trainer.support == splits_of(work)["folds"][0][:1]


def test_class_missing_in_the_support(work):
    """In one support case the prior comes from the others; in all of them there is none, and training goes on."""
    support = splits_of(work)["folds"][0]
    edit_labels(work, support[:1], lambda seg: np.where(seg == 2, 0, seg))
    trainer = trained(work, epochs=2)
    assert trainer.priors[1].num_cases <= 4 and trainer.priors[1].size > 0
    edit_labels(work, support[1:], lambda seg: np.where(seg == 2, 0, seg))
    trainer = trained(work, epochs=2)
    assert trainer.priors[1] is None
    assert trainer.known.tolist() == [0, 2]
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
    assert f"{query} seems to lack spleen" in log.split("after training")[1]


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
    assert [prior.num_cases for prior in trainer.priors] == [4, 4, 4]
    np.testing.assert_allclose([prior.size for prior in trainer.priors], expected)
    assert "{'kidney_left': 'kidney_left'}" in text_of(trainer)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()

    edit_labels(work, support[1:], ignore_a_slab)
    none = trained(work, epochs=1, dataset_json=dataset)
    assert none.priors == [None] * 3 and none.query_sizes is None
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
    # a case with ignored voxels shows no organ whole
    assert [prior is None for prior in trainer.priors] == [variant == "ignore"] * len(trainer.classes)
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    values = set(np.unique(predicted(trainer, splits_of(work)["queries"][0])))
    possible = {"one class": {0, 1}, "regions": {0, 1, 3}, "ignore": {0, 1, 2, 3}, "twenty classes": {*range(21)}}
    assert values <= possible[variant]


def test_labels_in_any_order(work):
    """Outputs, priors and head rows follow the labels' values, not their order in dataset.json."""
    content = work.dataset_json()
    shuffled = {**content, "labels": dict(reversed(content["labels"].items()))}
    first, second = (trained(work, epochs=2, dataset_json=d) for d in (content, shuffled))
    assert identical(weights(first), weights(second))
    pick = [line.split(": ", 1)[1] for line in text_of(first).splitlines() if "Size prior of" in line]
    assert pick == [line.split(": ", 1)[1] for line in text_of(second).splitlines() if "Size prior of" in line]


# ---- other backbones ----


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
    for file, change in (
        (work.raw / "dataset.json", lambda content: content.update(channel_names={"0": "CT", "1": "MRI"})),
        (
            work.preprocessed / "dataset_fingerprint.json",
            lambda content: (values := content["foreground_intensity_properties_per_channel"]).update(
                {"1": values["0"]}
            ),
        ),
    ):
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
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
    images = images_in(work.queries, work.dataset_json())
    UnlabelledQueries(folder).preprocess(images, manager, configuration, work.dataset_json())
    plans = json.loads((work.preprocessed / "FSEFTPlans_pair.json").read_text())
    plans["configurations"][FIVE].update(TINY)
    return plans


def test_two_channels(work, pair):
    trainer = trained(work, epochs=1, plans=pair)
    assert trainer.load_image(trainer.support[0]).shape[0] == trainer.load_image("scan_0").shape[0] == 2
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    query = splits_of(work)["queries"][0]
    assert predicted(trainer, query).shape == trainer.load_image(query).shape[1:]


def test_nan_in_the_second_channel_names_its_file():
    image = np.zeros((2, 4, 4, 4))
    image[1, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match=r"^b_0001\.nii\.gz holds NaN"):
        require_finite(image, ["b_0000.nii.gz", "b_0001.nii.gz"])


# ---- exactly K labelled cases ----


@pytest.fixture
def five(work):
    """Five labelled cases and a folder of unlabelled ones: all that the user has."""
    keep = splits_of(work)["folds"][0]
    for folder in (work.raw / "imagesTr", work.raw / "labelsTr", work.preprocessed / "FSEFTPlans_3d_fullres"):
        for file in folder.iterdir():
            if not file.name.startswith(tuple(keep)):
                file.unlink()
    planning.write_splits(77, [5], str(work.queries), 20, 5, 12345)
    return work


def test_five_labelled_cases_and_unlabelled_queries(five):
    splits = splits_of(five)
    assert splits["queries"] == [] and splits["unlabelled_queries"] == ["scan_0", "scan_1"]
    trainer = trained(five)
    assert trainer.queries == ["scan_0", "scan_1"] and trainer.query_sizes is not None
    trainer.perform_actual_validation()
    log = text_of(trainer)
    assert "2 queries, 0 of them with labels" in log
    assert "scan_1: spleen" in log
    assert "No labelled queries: the final validation is skipped." in log
    assert not (Path(trainer.output_folder) / "validation").exists()
    # the prior acts
    assert not identical(weights(trainer), weights(trained(five, FSEFTTrainer_Adapter)))


def test_an_unlabelled_query_without_the_organs(five):
    """A scan of air: said, and the prior does not ask for organs in it. (Three epochs find no stomach anywhere.)"""
    file = five.preprocessed / "FSEFTPlans_3d_fullres_queries" / "scan_1.npy"
    np.save(file, np.zeros_like(np.load(file)))
    trainer = trained(five)
    prior = trainer.prior_ml[[0, 2]]
    for query, shows in (("scan_0", True), ("scan_1", False)):
        predicted = trainer.query_sizes.predict(trainer.network, query, has_regions=False)[[0, 2]]
        whole = predicted.seen_whole(prior)
        assert not predicted.absent(prior).any() if shows else not whole.any()
    assert not size_penalty(predicted.soft, prior, 0.1, whole).any()
    log = text_of(trainer).split("after training")[1]
    assert "scan_1 seems to lack spleen, kidney_left" in log and "scan_0 seems to lack" not in log


def test_no_queries_at_all(five):
    planning.write_splits(77, [5], None, 20, 5, 12345)
    trainer = trained(five, epochs=2)
    assert trainer.queries == [] and trainer.query_sizes is None
    assert "The size prior has no effect: there are no queries" in text_of(trainer)


def test_fold_all(work):
    trainer = trained(work, fold="all", epochs=1)
    assert trainer.support == [f"case_{i}" for i in range(8)]
    assert trainer.queries == ["scan_0", "scan_1"]
    trainer.perform_actual_validation()
    assert "final validation is skipped" in text_of(trainer)
    assert Path(trainer.output_folder).name == "fold_all"


# ---- clear errors ----


@pytest.mark.parametrize("cls, configuration", [(FSEFTTrainer, FIVE), (FSEFTTrainer_Scratch, f"{FIVE}_scratch")])
def test_fold_beyond_the_file(work, cls, configuration):
    trainer = make_trainer(work, cls, configuration=configuration, fold=5)
    with pytest.raises(ValueError, match="Fold 5 does not exist: there are 5 folds.*fseft splits -d ID --folds N"):
        trainer.run_training()


def test_configuration_that_is_not_k_shot(work):
    with pytest.raises(InputError, match="'3d_fullres' of plans 'FSEFTPlans' is no K-shot configuration: make plans"):
        make_trainer(work, configuration="3d_fullres")
    for configuration in ("3d_fullres", FIVE):
        with pytest.raises(InputError, match=f"'{configuration}' of plans 'FSEFTPlans' is no baseline: make plans"):
            make_trainer(work, FSEFTTrainer_Scratch, configuration=configuration)


def test_missing_splits(work):
    (work.preprocessed / "splits_fseft.json").unlink()
    with pytest.raises(InputError, match="There are no K-shot folds at .*fseft splits -d ID"):
        make_trainer(work).run_training()


def test_more_shots_than_the_pool(work):
    with pytest.raises(ValueError, match="6 shots of a pool of 5 cases"):
        make_trainer(work, fseft_shots=6).run_training()


def test_plans_of_other_weights(work):
    plans = work.plans(**TINY)
    plans["configurations"][FIVE]["architecture"]["arch_kwargs"]["sha256"] = "0" * 64
    with pytest.raises(ValueError, match="plan and train anew"):
        make_trainer(work, plans=plans).run_training()


@pytest.mark.parametrize("argument", ["-pretrained_weights", "-pretrained"])
def test_pretrained_weights_are_refused(work, monkeypatch, argument):
    monkeypatch.setattr(sys, "argv", ["nnUNetv2_train", "77", FIVE, "0", argument, "model.pth"])
    with pytest.raises(InputError, match="takes no -pretrained_weights: import the model as a backbone"):
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
    mismatch = f"trained on .*SHA-256 {contract.sha256[:12]}, the .* 'phantom' of {other.sha256[:12]}: restore plans"
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
    for file in Path(trainer.preprocessed_dataset_folder).glob(f"{trainer.support[0]}*"):
        file.unlink()
    model = TrainedModel(Path(trainer.output_folder_base), FIVE, ["0"], "checkpoint_final.pth", torch.device("cpu"))
    with pytest.raises(InputError, match=f"e.g. {trainer.support[0]}: preprocess them with"):
        memory_from_bank(model, 0)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"fseft_loss": "softdice"}, 'fseft_loss .* is \'softdice\': make it "nnunet" or "soft_dice"'),
        (
            {"fseft_gamma": 1.5},
            "fseft_gamma of '3d_fullres_5shot' in FSEFTPlans.json is 1.5: make it a number from 0 on",
        ),
        ({"fseft_lambda": "0.1"}, "fseft_lambda .* is '0.1': make it a number"),
        ({"fseft_steps_per_epoch": 0}, "fseft_steps_per_epoch .* is 0: make it a whole number from 1 on"),
        ({"fseft_crop_size": [12, 12]}, "fseft_crop_size .*: make it three whole numbers"),
        ({"fseft_stop_at_plateau": "no"}, "fseft_stop_at_plateau .*: make it true or false"),
        ({"fseft_seed": None}, "fseft_seed .* is None: make it a whole number"),
        ({"fseft_lamda": 0.5}, "'fseft_lamda' of .* is no key of ours: did you mean 'fseft_lambda'"),
        ({"fseft_quux_thing_xyz": 1}, "'fseft_quux_thing_xyz' of .* is no key of ours: known are fseft_crop_size, "),
    ],
)
def test_impossible_values_in_the_plans(work, settings, sentence):
    with pytest.raises(InputError, match=sentence):
        make_trainer(work, **settings)


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
