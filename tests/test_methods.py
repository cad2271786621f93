"""Every method keeps the same promises."""

import copy
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.backbones.architectures.nnunet import NNUNetBackbone
from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.methods.inside.decoder_parts import Decoder, Everything, LastBlock
from fsefs_nnunet.methods.inside.tuned_backbone import TunedBackbone
from fsefs_nnunet.methods.registry import BANK, METHODS, PATCHES, Method
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.shims import fseft_trainers
from fsefs_nnunet.trainers import by_name

SHORT = {
    "fseft_crop_size": [12, 12, 12],
    "fseft_steps_per_epoch": 1,
    "fseft_prior_from_epoch": 1,
    "fseft_views": 1,
    "batch_size": 2,
}


HEAD = 48 + 1
ADAPTER = 54 * 48**2  # 124,416
# transposed convolution 8 -> 48 of 2^3 with bias, convolutions 96 -> 48 and 48 -> 48 of 3^3 with bias and norm
BLOCK = 8 * 48 * 8 + 48 + (96 * 48 * 27 + 3 * 48) + (48 * 48 * 27 + 3 * 48)
ENCODER = (1 * 48 * 27 + 3 * 48) + (48 * 48 * 27 + 3 * 48) + (48 * 8 * 27 + 3 * 8) + (8 * 8 * 27 + 3 * 8)
# factors of rank 4 for each of these seven convolutions, (out, rest) as their weights lie in memory
LAYERS = [(48, 27), (48, 48 * 27), (8, 48 * 27), (8, 8 * 27), (8, 48 * 8), (48, 96 * 27), (48, 48 * 27)]
NORMS = 2 * (48 + 48 + 8 + 8 + 48 + 48)
# trained parameters for a single organ of its own (one sigmoid) on 48 features, 2 stages
PARAMETERS = {
    "probe": HEAD,
    "adapter": ADAPTER + HEAD,
    "adapter_in": ADAPTER + HEAD,
    "fseft": ADAPTER + HEAD,
    "context": 2 * ADAPTER + HEAD,
    "ft_last": BLOCK + HEAD,
    "decoder": BLOCK + HEAD,
    "ft": ENCODER + BLOCK + HEAD,
    "lora": sum(4 * (out + rest) for out, rest in LAYERS) + HEAD,
    "norms": NORMS + HEAD,
    "biases": NORMS + 48 + HEAD,  # a bias for each shift of a norm, and one for each scale: that of the convolution
    "ft_last_long": BLOCK + HEAD,
    "decoder_long": BLOCK + HEAD,
    "ft_long": ENCODER + BLOCK + HEAD,
    # convolutions 49 -> 16 and 16 -> 16 of 3^3 with bias and norm, head
    "unet": ((48 + 1) * 16 * 27 + 3 * 16) + (16 * 16 * 27 + 3 * 16) + 16 + 1,
}
NO_IDENTITY = ["adapter_in", "unet"]  # their first step is not the universal head's prediction
# the published rates, but for those of spatial and context adapter
RECIPES = {
    "probe": (1e-2, 0.0, 100),
    "adapter": (2e-3, 0.0, 100),
    "adapter_in": (1e-2, 1e-5, 100),
    "fseft": (2e-3, 0.0, 100),
    "context": (2e-3, 0.0, 100),
    "ft_last": (1e-2, 1e-5, 100),
    "decoder": (1e-4, 0.0, 200),
    "ft": (1e-4, 1e-5, 150),
    "lora": (1e-3, 0.0, 200),
    "norms": (1e-2, 0.0, 200),
    "biases": (1e-2, 0.0, 200),
    **dict.fromkeys(("ft_last_long", "decoder_long", "ft_long", "unet"), (1e-3, 1e-5, 400)),
}
ADAPTED = [row for row in METHODS.values() if row.trains_on_backbone and not row.transductive]
LAST_BLOCK, SCRATCH = METHODS["ft_last"], METHODS["scratch"]


def test_every_method_has_its_promises():
    assert [row.name for row in ADAPTED] == list(PARAMETERS) == list(RECIPES)


def of(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


# of stored features, patches of a backbone, from scratch; trainings of the other methods are slow tests
FAMILIES = [METHODS["fseft"], LAST_BLOCK, SCRATCH]


def trained_of(methods):
    marks = [() if method in FAMILIES else pytest.mark.slow for method in methods]
    return of([pytest.param(method, marks=mark) for method, mark in zip(methods, marks)])


def trainer_of(method: Method) -> type:
    return getattr(by_name, method.trainer)


def configuration_of(method: Method) -> str:
    return f"3d_fullres_5shot{method.suffix}"


@pytest.fixture(scope="module")
def work(tiny, tmp_path_factory):
    """One copy for all methods: results lie in folders of their own, the bank is shared."""
    copied = type(tiny)(tmp_path_factory.mktemp("methods") / "work")
    shutil.copytree(tiny.root, copied.root)
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in copied.environment().items():
            patch.setenv(name, folder)
        patch.setenv("nnUNet_n_proc_DA", "0")  # without workers, patches are a function of the epoch
        yield copied


def plans_of(work, method) -> dict:
    """For short trainings: one window of a volume for the bank, small patches where each step runs the backbone."""
    return work.plans(**SHORT, patch_size=[24 if method.learns_from == BANK else 16] * 3)


def make_trainer(work, method, epochs=3, cls=None):
    plans = plans_of(work, method)
    plans["continue_training"] = False
    trainer = (cls or trainer_of(method))(plans, configuration_of(method), 0, work.dataset_json(), torch.device("cpu"))
    trainer.num_epochs = epochs
    trainer.num_iterations_per_epoch = 1
    trainer.save_every = 1
    return trainer


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}


def identical(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(work):
    """Uninterrupted trainings of three epochs by method, each once."""
    done = {}

    def train(method):
        if method not in done:
            trainer = make_trainer(work, method)
            trainer.run_training()
            folder = work.root / "whole" / method.trainer
            shutil.copytree(Path(trainer.output_folder_base), folder)
            done[method] = trainer, folder
        return done[method]

    return train


# ---- the network ----


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A backbone of 48 features."""
    folder = tmp_path_factory.mktemp("wide")
    contract = find_backbone("phantom")
    architecture = copy.deepcopy(contract.architecture)
    kwargs = architecture["arch_kwargs"]
    kwargs.update(n_stages=2, features_per_stage=[48, 8], kernel_sizes=[[3] * 3] * 2, strides=[[1] * 3, [2] * 3])
    kwargs.update(n_conv_per_stage=[2, 2], n_conv_per_stage_decoder=[2])
    contract = replace(contract, id="wide", architecture=architecture)
    torch.manual_seed(0)
    contract = save_backbone(contract, NNUNetBackbone(contract, "last").backbone_state(), folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("fseft_backbones", str(folder))
        yield contract


def network_of(method, contract, num_classes=1):
    kwargs = dict(backbone=contract.id, sha256=contract.sha256, adapter="spatial", stages="last", channels=48, seed=1)
    configuration = SimpleNamespace(network_arch_init_kwargs=kwargs)
    return trainer_of(method).build_network_architecture(None, configuration, 1, num_classes, False)


@of(ADAPTED)
def test_number_of_parameters(method, wide):
    network = network_of(method, wide)
    assert sum(p.numel() for p in network.parameters()) == PARAMETERS[method.name]
    buffers = {"feature_mean", "feature_std", "is_fitted"}
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()} | buffers


@of(ADAPTED)
def test_step_0(method, wide, image, device):
    network, image = network_of(method, wide).to(device), image.to(device)
    features = FrozenBackbone("wide", "last").to(device)
    labels = {"background": 0, "liver": [1, 2]}
    name = wide.classes.index("liver")
    network.fit(torch.full_like(network.feature_mean, 0.5), torch.full_like(network.feature_std, 2.0), labels, True)
    with torch.no_grad():
        universal = features.head(features(image)[0])[:, name]
        same = torch.allclose(network(image)[:, 0], universal, rtol=0, atol=1e-4)
    assert same == (method.name not in NO_IDENTITY)


def tuned_in(method, backbone) -> set[str]:
    """Names of what `method` trains in the backbone, which has been prepared for it."""
    names = {name for name, _ in backbone.named_parameters() if "seg_layers" not in name}
    part = {"ft_last": "last_block", "decoder": "decoder", "ft": "all"}.get(method.name.removesuffix("_long"))
    if part:
        return set(backbone.tuned_parameters(part))
    endings = {"lora": ("weight.0.a", "weight.0.b"), "norms": ("norm.weight", "norm.bias"), "biases": ("bias",)}
    return {name for name in names if name.endswith(endings.get(method.name, "-"))}


@of(ADAPTED)
def test_only_the_methods_parameters_get_gradients(method, wide, image, device):
    network, image = network_of(method, wide).to(device).train(), image[..., :8, :8, :8].to(device)
    backbone = network.backbone.module
    named = dict(backbone.named_parameters())
    tuned = tuned_in(method, backbone)
    before = {name: p.clone() for name, p in named.items()}
    optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(2):  # what lies before a layer that starts at zero gets its first gradient in the second step
        optimizer.zero_grad()
        network(image).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert {name for name, p in named.items() if p.grad is not None} == tuned
    assert {name for name, p in named.items() if not torch.equal(p, before[name])} == tuned
    assert not any(module.training for module in backbone.modules())
    assert {name.removeprefix("backbone.tuned.") for name, _ in network.named_parameters() if "tuned" in name} == tuned


def test_parts_lie_in_each_other(wide):
    module = FrozenBackbone("phantom", "last").module
    last, decoder, everything = (set(module.tuned_parameters(part)) for part in ("last_block", "decoder", "all"))
    assert last < decoder < everything
    rest = {name for name, _ in module.named_parameters()} - everything
    assert rest and all("seg_layers" in name for name in rest)


def test_nothing_is_kept_of_the_frozen_layers(image):
    """What autograd stores for a step grows with what is trained."""

    def stored(part: type) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            TunedBackbone("phantom", "last", None, part())(image)
        return sum(kept)

    last, decoder, everything = map(stored, (LastBlock, Decoder, Everything))
    assert 0 < last < decoder < everything
    assert last < 0.5 * everything


def test_tuned_backbone_follows_to(image):
    backbone = TunedBackbone("phantom", "last", None, Decoder()).to(torch.float64)
    module = dict(backbone.module.named_parameters())
    assert {p.dtype for p in module.values()} == {torch.float64}
    assert all(module[name.removeprefix("tuned.")] is p for name, p in backbone.named_parameters())
    copied = copy.deepcopy(backbone)
    module = dict(copied.module.named_parameters())
    assert all(module[name.removeprefix("tuned.")] is p for name, p in copied.named_parameters())


def test_backbone_without_weights(contract, tmp_path, monkeypatch):
    monkeypatch.setenv("fseft_backbones", str(tmp_path))
    raw = replace(contract, id="raw", architecture={"kind": "raw_image"}, classes=())
    save_backbone(raw, {"none": torch.zeros(1)}, tmp_path)
    with pytest.raises(
        ValueError, match="'raw' has no part that this method fine-tunes: choose another method or backbone"
    ):
        TunedBackbone("raw", "last", None, Everything())


# ---- trainings ----


@trained_of(ADAPTED)
def test_checkpoint_holds_the_trained_weights_alone(method, whole, work):
    trainer, folder = whole(method)
    content = read_checkpoint(folder / "fold_0" / "checkpoint_final.pth")
    own = {name for name, _ in trainer.network.named_parameters()}
    assert set(content["network_weights"]) == own | {"feature_mean", "feature_std", "is_fitted"}
    assert content["optimizer_state"]["state"] == {}
    assert content["trainer_name"] == method.trainer
    fresh = make_trainer(work, method)
    fresh.load_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    assert identical(weights(fresh), weights(trainer))
    assert identical(content["network_weights"], weights(trainer))


class Interruption(Exception):
    pass


@of(FAMILIES)
def test_continued_training_is_exact(method, whole, work):
    class Interrupted(trainer_of(method)):
        def on_epoch_end(self):
            super().on_epoch_end()
            if self.current_epoch == 2:
                raise Interruption

    if method is SCRATCH:  # stock nnU-Net draws its first weights from the global generator
        torch.manual_seed(5)
    expected, _ = whole(method)
    if method is SCRATCH:
        torch.manual_seed(5)
    broken = make_trainer(work, method, cls=Interrupted)
    with pytest.raises(Interruption):
        broken.run_training()
    torch.manual_seed(999)
    np.random.seed(999)
    continued = make_trainer(work, method)
    continued.load_checkpoint(str(Path(broken.output_folder) / "checkpoint_latest.pth"))
    assert continued.current_epoch == 2
    continued.run_training()
    assert identical(weights(continued), weights(expected))
    losses = [t.logger.get_value("train_losses", step=None) for t in (continued, expected)]
    np.testing.assert_array_equal(*losses)


@trained_of([*ADAPTED, SCRATCH])
def test_nnunet_predicts(method, whole, work):
    """nnU-Net's predictor, as nnUNetv2_predict calls it, gives the trained network's segmentation of a query."""
    trainer, folder = whole(method)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_extTrainer", str(Path(fseft_trainers.__file__).parent))
        predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    assert predictor.allowed_mirroring_axes is None
    case = load_splits(work.preprocessed / "splits_fseft.json")["queries"][0]
    data = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)[0][:, :20, :20, :20]
    logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(data))
    manual = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    manager = PlansManager(plans_of(work, method))
    trainer.set_deep_supervision_enabled(False)
    manual.manual_initialization(
        trainer.network.eval(),
        manager,
        manager.get_configuration(configuration_of(method)),
        None,
        work.dataset_json(),
        method.trainer,
        None,
    )
    expected = manual.predict_sliding_window_return_logits(torch.from_numpy(data))
    assert torch.equal(logits, expected.cpu()) and logits.std() > 0


@trained_of([*ADAPTED, SCRATCH])
def test_the_run_file_says_what_was_used(method, whole):
    trainer, _ = whole(method)
    support = load_splits(Path(trainer.preprocessed_dataset_folder_base) / "splits_fseft.json")["folds"][0]
    run = RunFile.load(trainer.output_folder)
    assert run.support == support and len(run.epochs) == 3 and run.configuration == configuration_of(method)
    assert 0.1 < run.peak_memory < 100 and {"start", "training"} <= run.seconds.keys()
    assert run.trained_parameters == sum(p.numel() for p in trainer.network.parameters())
    assert bool(run.prior) == method.trains_with_prior == any("penalty" in epoch for epoch in run.epochs)
    if method.learns_from == PATCHES:
        assert all(set(dataset.identifiers) == set(support) for dataset in trainer.get_tr_and_val_datasets())


@trained_of([row for row in ADAPTED if row.inside])
def test_the_log_of_a_fine_tuning(method, whole):
    trainer, _ = whole(method)
    log = Path(trainer.log_file).read_text()
    assert f"{sum(p.numel() for p in trainer.network.parameters())} parameters are trained" in log
    assert "{'spleen': 'spleen', 'kidney_left': 'kidney_left'}" in log


@of(ADAPTED)
def test_recipes(method, work):
    plans = work.plans()
    plans["continue_training"] = False
    trainer = trainer_of(method)(plans, configuration_of(method), 0, work.dataset_json(), torch.device("cpu"))
    trainer.initialize()
    *groups, last = trainer.optimizer.param_groups
    rate, weight_decay, epochs = RECIPES[method.name]
    assert isinstance(trainer.optimizer, torch.optim.AdamW)
    assert (last["weight_decay"], trainer.num_epochs) == (weight_decay, epochs)
    if not method.warmup:
        assert not groups and last["lr"] == rate
        trainer.lr_scheduler.step(epochs // 2 + 0.5)
        assert last["lr"] == pytest.approx(rate / 2)
        return
    # a tenth of the run to warm up, another tenth for the encoder's parameters, which come last
    assert bool(groups) == (method.name == "ft_long")
    encoder = {id(p) for p in last["params"]} if groups else set()
    named = {name: id(p) for name, p in trainer.network.named_parameters()}
    assert encoder == {i for name, i in named.items() if ".encoder." in name}
    for epoch, first, late in (
        (-0.5, 0, 0),
        (19.5, 0.5, 0),
        (39.5, 1, 0),
        (59.5, None, 0.5),
        (79.5, None, 1),
        (400, 0, 0),
    ):
        trainer.lr_scheduler.step(epoch)
        for group in groups or [last]:
            assert first is None or group["lr"] == pytest.approx(rate * first)
        assert not groups or last["lr"] == pytest.approx(rate * late)


@pytest.mark.slow
def test_fine_tuning_for_a_time(work, monkeypatch):
    """The schedule runs over the budget instead of the epochs, and the training ends with it."""
    monkeypatch.setenv("fseft_train_minutes", "0.02")
    trainer = make_trainer(work, LAST_BLOCK)
    trainer.num_epochs = 100
    trainer.run_training()
    rates = trainer.logger.get_value("lrs", step=None)
    assert 5e-3 < rates[0] <= 1e-2 and rates[-1] < rates[0]  # the clock runs before the first rate is taken
    seconds = trainer.seconds_trained()
    assert seconds["wall"] >= 1.2 and seconds["cpu"] > 0
    final = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    ended, epochs = read_checkpoint(Path(final)), trainer.current_epoch
    # killed in its final validation and continued: no step beyond the budget
    continued = make_trainer(work, LAST_BLOCK)
    continued.initialize()
    continued.load_checkpoint(final)
    continued.run_training()
    assert continued.current_epoch == epochs
    weights = read_checkpoint(Path(final))["network_weights"]
    assert all(torch.equal(weights[name], tensor) for name, tensor in ended["network_weights"].items())
