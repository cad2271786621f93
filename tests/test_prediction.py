"""`fseft predict` and `fseft remember` on the tiny dataset, with adapters of a few steps."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from published_files import turned
from scipy.ndimage import label
from trainings import edit

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.cases.splits import load_splits
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.features.map_crops import MapCrops
from fsefs_nnunet.inference.export import PART_FOLDER, keep_largest_components, part_folder
from fsefs_nnunet.inference.prediction import QueryPredictor
from fsefs_nnunet.inference.support import memories_of, memory_from_bank
from fsefs_nnunet.inference.trained_model import MEMORY_KEY, PRIOR_KEY, TrainedModel
from fsefs_nnunet.losses.segmentation import segmentation_loss
from fsefs_nnunet.priors.size import ExpectedSize, SizePrior
from fsefs_nnunet.priors.support_memory import SupportMemory
from fsefs_nnunet.priors.transduction import Transduction
from fsefs_nnunet.priors.volumes import PredictedSizes, QueryVolume
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer

FIVE = "3d_fullres_5shot"
CPU = torch.device("cpu")
THREE_CHANNELS = MapCrops((torch.zeros(1, 3, 4, 4, 4).half(),), (0,), (None,))
OTHER_MEMORY = {"features": THREE_CHANNELS.state(), "targets": torch.zeros(1, 1, 4, 4, 4)}
EARLIER_MEMORY = {**OTHER_MEMORY, "features": torch.zeros(1, 3, 4, 4, 4).half()}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """Two folds, trained for a few steps each."""
    work = type(tiny)(tmp_path_factory.mktemp("predict") / "work")
    shutil.copytree(tiny.root, work.root)
    settings = {"fseft_crop_size": [16] * 3, "fseft_steps_per_epoch": 10, "fseft_views": 0, "fseft_lambda": 0.0}
    settings["patch_size"] = [24] * 3
    settings |= {"fseft_predict_lambda": 1.0, "fseft_predict_lr": 1e-4}  # a pull that thirty steps show
    (work.preprocessed / "FSEFTPlans.json").write_text(json.dumps(work.plans(**settings)))
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in work.environment().items():
            patch.setenv(name, folder)
        for fold in (0, 1):
            plans = {**work.plans(), "continue_training": False}
            trainer = FSEFTTrainer(plans, FIVE, fold, work.dataset_json(), CPU)
            trainer.num_epochs = 3
            trainer.run_training()
    queries = load_splits(work.preprocessed / "splits_fseft.json")["queries"]
    (work.root / "images").mkdir()
    for case in queries[:2]:
        shutil.copy(work.raw / "imagesTr" / f"{case}_0000.nii.gz", work.root / "images")
    return work


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    copy = type(trained)(tmp_path / "work")
    shutil.copytree(trained.root, copy.root)
    for name, folder in copy.environment().items():
        monkeypatch.setenv(name, folder)
    return copy


def model_folder(work) -> Path:
    return work.results / f"FSEFTTrainer__FSEFTPlans__{FIVE}"


def load(work, *folds) -> TrainedModel:
    return TrainedModel(model_folder(work), FIVE, folds or ["0"], "checkpoint_final.pth", CPU)


def edit_checkpoint(work, fold=0, **changes) -> None:
    file = model_folder(work) / f"fold_{fold}" / "checkpoint_final.pth"
    torch.save({**read_checkpoint(file), **changes}, file)


def edit_prior(work, sizes) -> None:
    file = model_folder(work) / "fold_0" / "checkpoint_final.pth"
    init = read_checkpoint(file)["init_args"]
    edit_checkpoint(work, init_args={**init, PRIOR_KEY: {"name": "size", "state": sizes}})


def predict(work, output, *arguments, folds=("0",)) -> int:
    options = ["-d", "77", "-c", FIVE, "-device", "cpu", "-f", *folds, *arguments]
    return main(["predict", "-i", str(work.root / "images"), "-o", str(work.root / output), *options])


def predict_file(predictor: QueryPredictor, files: list[str], output: Path) -> dict:
    """Segment an image; returns the report of its sizes."""
    segmented = predictor.predict(predictor.load(files), output)
    predictor.write(segmented, output)
    return segmented.report


def segmentations(work, output) -> dict[str, np.ndarray]:
    files = sorted((work.root / output).glob("*.nii.gz"))
    return {file.name[:-7]: np.asarray(nib.load(file).dataobj) for file in files}


def reports(work, output) -> dict[str, dict]:
    return {f.name[:-11]: json.loads(f.read_text()) for f in sorted((work.root / output).glob("*_sizes.json"))}


@pytest.mark.slow
def test_inductive_prediction_is_nnunets(work):
    assert predict(work, "ours", "--inductive", folds=("0", "1")) == 0
    predictor = nnUNetPredictor(use_mirroring=False, device=CPU, perform_everything_on_device=False)
    network = load(work).network
    content = [read_checkpoint(model_folder(work) / f"fold_{f}" / "checkpoint_final.pth") for f in (0, 1)]
    model = load(work)
    predictor.manual_initialization(
        network,
        model.plans_manager,
        model.configuration,
        [c["network_weights"] for c in content],
        model.dataset_json,
        "FSEFTTrainer",
        None,
    )
    (work.root / "stock").mkdir()
    predictor.predict_from_files_sequential(str(work.root / "images"), str(work.root / "stock"))
    ours, stock = segmentations(work, "ours"), segmentations(work, "stock")
    assert len(ours) == 2 and ours.keys() == stock.keys()
    for case, array in ours.items():
        assert array.any() and (array == stock[case]).mean() > 0.999
    for name in ("plans.json", "dataset.json"):
        assert (work.root / "ours" / name).read_bytes() == (model_folder(work) / name).read_bytes()


@pytest.mark.slow
def test_sizes_outside_their_band_are_drawn_towards_it(work, float32):
    """A prior of twice what is predicted: adaptation enlarges the organ; within the band it takes no step."""
    assert main(["remember", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu"]) == 0
    assert predict(work, "inductive", "--inductive") == 0
    before = reports(work, "inductive")
    case = next(iter(before))
    sizes = [entry["size_before_ml"] for entry in before[case]["classes"].values()]
    assert min(sizes) > 0 and not before[case]["transductive"]
    priors = [(2 * sizes[0], 0.0, 5), *[(size, 0.0, 5) for size in sizes[1:]]]
    edit_prior(work, priors)
    assert predict(work, "transductive") == 0
    after = reports(work, "transductive")[case]
    first, *others = after["classes"].values()
    assert after["transductive"] and after["steps"][0] > 0
    assert first["prior"]["size"] == pytest.approx(2 * sizes[0], abs=1e-3)
    assert first["size_before_ml"] == pytest.approx(sizes[0], abs=1e-3)
    assert first["size_after_ml"] > 1.2 * sizes[0] and first["not_enlarged_because"] is None
    voxels = [(segmentations(work, output)[case] == 1).sum() for output in ("inductive", "transductive")]
    assert voxels[1] > 1.2 * voxels[0]
    edit_prior(work, [(size, 0.0, 5) for size in sizes])
    assert predict(work, "expected") == 0
    assert reports(work, "expected")[case]["steps"] == [0]
    assert np.array_equal(segmentations(work, "expected")[case], segmentations(work, "inductive")[case])


def test_an_organ_that_seems_absent_is_left_alone(work):
    main(["remember", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu"])
    edit_prior(work, [None, None, (1e7, 0.0, 5)])
    assert predict(work, "output") == 0
    for report in reports(work, "output").values():
        assert report["steps"] == [0]
        assert "seems absent" in report["classes"]["kidney_left"]["not_enlarged_because"]
        assert report["classes"]["spleen"]["prior"] is None


def test_an_organ_at_the_border_is_not_enlarged(work):
    """Of features averaged over blocks, which cover the border; the volume itself decides."""
    model = load(work)
    memory = memory_from_bank(model, 0)
    network = model.network
    network.load_state_dict(model.weights[0])
    loss = segmentation_loss("nnunet", model.label_manager, False)
    shape = (1, network.backbone.out_channels, 8, 8, 8)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    volume = QueryVolume(features, torch.ones(shape[2:]))
    sizes = volume.predict(network, False).sizes.soft.detach()
    prior = SizePrior((ExpectedSize(2 * sizes[0].item(), 0.0, 5), None, None))
    transduction = Transduction(prior, memory, loss, model.settings, False)
    seen = []  # the smallest numbers while gradients are computed
    network.head.weight.register_hook(lambda gradient: seen.append((torch.tensor([1e-38]) / 100).item()))
    for at_border in (True, False):
        before = PredictedSizes(sizes, torch.tensor([at_border, False, False]))
        assert (transduction.adapt(network, volume, before) == 0) is at_border
    assert seen and not any(seen)


@pytest.mark.slow
def test_a_model_that_travels_alone_adapts_as_at_home(work, monkeypatch):
    model = load(work)
    priors = [
        SizePrior(tuple(ExpectedSize(1.5 * e.size, 0.0, e.num_cases) for e in prior.expected)) for prior in model.priors
    ]
    image = [str(next((work.root / "images").iterdir()))]

    def adapted() -> tuple[dict, np.ndarray]:
        model = load(work)
        memories = memories_of(model)
        model.priors = priors
        report = predict_file(QueryPredictor(model, memories), image, work.root / "x.nii.gz")
        assert report.pop("adaptation_seconds") > 0
        return report, np.asarray(nib.load(work.root / "x.nii.gz").dataobj)

    home = adapted()
    assert home[0]["steps"][0] > 0
    assert main(["remember", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu"]) == 0
    file = model_folder(work) / "fold_0" / "checkpoint_final.pth"
    assert file.stat().st_size < 50_000_000 + 1_000_000 and not list(file.parent.glob(".*.part"))
    stored = read_checkpoint(file)
    assert set(stored[MEMORY_KEY]) == {"features", "targets"}  # no names of cases
    shutil.rmtree(work.preprocessed)
    away = adapted()
    assert away[0] == home[0] and np.array_equal(away[1], home[1])
    nnunets = nnUNetPredictor(device=CPU, perform_everything_on_device=False)
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(__file__).parent.parent / "fsefs_nnunet" / "nnunet" / "shims"))
    nnunets.initialize_from_trained_model_folder(str(model_folder(work)), ["0"], "checkpoint_final.pth")
    assert all(torch.equal(t, nnunets.list_of_parameters[0][n]) for n, t in stored["network_weights"].items())


def test_folds_share_one_pass_of_the_backbone(work):
    passes = []
    for folds in (["0"], ["0", "1"]):
        model = load(work, *folds)
        model.network.backbone.module.register_forward_hook(lambda *args: passes.append(len(folds)))  # noqa: B023
        image = [str(next((work.root / "images").iterdir()))]
        report = predict_file(QueryPredictor(model, None), image, work.root / "x.nii.gz")
        assert len(report["steps"]) == len(folds)
    assert passes.count(1) == passes.count(2) > 0


@pytest.mark.parametrize("room", [True, False])
def test_the_backbone_runs_once_where_the_disk_holds_the_features(work, monkeypatch, room):
    """Adaptation looks at them again; without room for them the backbone runs again, and little changes."""
    if not room:
        monkeypatch.setenv("fseft_bank_gb", "0")
    model = load(work, "0", "1")
    memory = memory_from_bank(load(work), 0) if room else SupportMemory(*memory_without_a_bank(model))
    model.priors = [SizePrior(tuple(ExpectedSize(1e-9, 0.0, 5) for _ in prior.expected)) for prior in model.priors]
    predictor = QueryPredictor(model, [memory] * 2)
    image, output = [str(first_image(work))], work.root / "made" / "x.nii.gz"
    output.parent.mkdir()
    report = predict_file(predictor, image, output)
    assert all(report["steps"])
    assert predictor.windows == (1 if room else 4)  # two folds, before and after their adaptation
    assert [file.name for file in output.parent.iterdir()] == ["x.nii.gz"]


def memory_without_a_bank(model):
    """Crops of noise and their labels."""
    maps = tuple(torch.randn(4, m.channels, *(8 // s for s in m.stride)).half() for m in model.network.backbone.maps)
    return MapCrops.whole(maps, (8, 8, 8)), torch.randint(0, 4, (4, 1, 8, 8, 8), dtype=torch.int16)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_features_where_a_prediction_ends_early(work, monkeypatch, error):
    def end(self, network, volume, before) -> int:
        assert list(output.parent.glob(f"{PART_FOLDER}*/features.npy"))
        raise error

    output = work.root / "made" / "x.nii.gz"
    output.parent.mkdir()
    model = load(work)
    predictor = QueryPredictor(model, [memory_from_bank(model, 0)])
    monkeypatch.setattr(Transduction, "adapt", end)
    with pytest.raises(error):
        predict_file(predictor, [str(first_image(work))], output)
    assert not list(output.parent.iterdir())


def test_a_broken_volume_does_not_stop_the_others(work, capsys):
    images = sorted((work.root / "images").iterdir())
    volume = nib.load(images[0])
    broken = np.asarray(volume.dataobj, np.float32)
    broken[3, 4, 5] = np.nan
    nib.save(nib.Nifti1Image(broken, volume.affine), images[0])
    (work.root / "images" / "cut_0000.nii.gz").write_bytes(images[1].read_bytes()[:500])
    assert predict(work, "output", "--inductive") == 2
    error = capsys.readouterr().err
    assert "2 case(s) failed" in error and "cut_0000.nii.gz" in error
    assert f"{images[0]} was not segmented: it holds NaN" in error
    assert list(segmentations(work, "output")) == [images[1].name[:-12]]
    assert not list((work.root / "output").glob(f"{PART_FOLDER}*"))


def test_an_interrupted_prediction_goes_on(work):
    assert predict(work, "output", "--inductive") == 0
    first, second = sorted((work.root / "output").glob("*.nii.gz"))
    untouched = first.stat().st_mtime_ns
    second.with_name(second.name.replace(".nii.gz", "_sizes.json")).unlink()
    written = second.stat().st_mtime_ns
    assert predict(work, "output", "--inductive", "--continue_prediction") == 0
    assert first.stat().st_mtime_ns == untouched and second.stat().st_mtime_ns > written
    assert len(reports(work, "output")) == 2


def test_support_features_keep_to_their_bytes(work, monkeypatch):
    whole = memory_from_bank(load(work), 0)
    a_crop = whole.features[torch.tensor([0])].nbytes + whole.targets[0].nbytes
    assert len(whole.features) == 64 and 64 * a_crop <= 50_000_000
    for limit, crops in ((3 * a_crop, 3), (3 * a_crop - 1, 2), (1, 1)):
        monkeypatch.setattr("fsefs_nnunet.priors.support_memory.MAX_BYTES", limit)
        memory = memory_from_bank(load(work), 0)
        first = whole.features[torch.arange(crops)].at_full_resolution()
        assert len(memory.features) == crops and torch.equal(memory.features.at_full_resolution(), first)
        assert all(m.dtype == torch.float16 for m in memory.features.maps)


def test_inductive_predictions_are_no_transductive_ones(work):
    assert predict(work, "output", "--inductive") == 0
    main(["remember", "-d", "77", "-c", FIVE, "-f", "0", "-device", "cpu"])
    assert predict(work, "output", "--continue_prediction") == 0
    assert all(report["transductive"] for report in reports(work, "output").values())


def test_leftovers_of_a_killed_prediction_stay_out(work):
    case = next(iter((work.root / "images").iterdir())).name[: -len("_0000.nii.gz")]
    for purpose, file in (("export", f"{case}.npz"), ("features", "features.npy")):
        left = work.root / "output" / f"{PART_FOLDER}_{case}.nii.gz_{purpose}"
        left.mkdir(parents=True)
        (left / file).write_bytes(b"of other weights")
    assert predict(work, "output", "--inductive") == 0
    assert not list((work.root / "output").glob(f"{PART_FOLDER}*"))
    assert not list((work.root / "output").glob("*.npz"))


def test_parts_of_cases_with_dots_in_their_names_are_apart(tmp_path):
    """Several processes may predict them at once."""
    with part_folder(tmp_path / "1.2.840.1.nii.gz", "features") as one:
        with part_folder(tmp_path / "1.2.840.2.nii.gz", "features") as other:
            assert one != other
        assert one.exists() and not other.exists()
    assert not list(tmp_path.iterdir())


def test_interrupt(work, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(QueryPredictor, "predict", interrupt)
    assert predict(work, "output", "--inductive") == 2
    assert "Interrupted: --continue_prediction skips the cases that are done" in capsys.readouterr().err


def test_a_channel_too_many_stops_its_case_alone(work, capsys):
    image, other = sorted((work.root / "images").iterdir())
    shutil.copy(image, image.with_name(image.name.replace("_0000", "_0001")))
    assert predict(work, "output", "--inductive") == 2
    assert "1 case(s) failed" in (error := capsys.readouterr().err)
    assert "_0001.nii.gz was not segmented: it is one channel too many: the dataset has 1" in error
    assert list(segmentations(work, "output")) == [other.name[: -len("_0000.nii.gz")]]


CHANGES = ["other folds", "largest component", "probabilities", "another gamma"]
CHANGES = ["other weights", "a damaged report", *(pytest.param(change, marks=pytest.mark.slow) for change in CHANGES)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_continued_prediction_keeps_what_the_same_command_made(work, change):
    assert predict(work, "output", "--inductive") == 0
    files = sorted((work.root / "output").glob("*.nii.gz"))
    before = [file.stat().st_mtime_ns for file in files]
    options, folds, again = ["--inductive", "--continue_prediction"], ("0",), [True, True]
    if change == "other weights":
        weights = read_checkpoint(model_folder(work) / "fold_0" / "checkpoint_final.pth")["network_weights"]
        head = {name: t * 1.1 for name, t in weights.items() if name.startswith("head")}
        edit_checkpoint(work, network_weights={**weights, **head})
    elif change == "other folds":
        folds = ("0", "1")
    elif change == "largest component":
        options.append("--largest_component")
    elif change == "probabilities":
        options.append("--save_probabilities")
    elif change == "another gamma":
        edit(
            model_folder(work) / "plans.json",
            lambda plans: plans["configurations"][FIVE].update(fseft_predict_gamma=0.5),
        )
    else:
        files[0].with_name(files[0].name.replace(".nii.gz", "_sizes.json")).write_text('{"made_of": ')
        again = [True, False]
    assert predict(work, "output", *options, folds=folds) == 0
    assert [file.stat().st_mtime_ns > then for file, then in zip(files, before)] == again


def test_an_adaptation_that_diverges_leaves_the_trained_model(work, monkeypatch, float32):
    def diverge(self, network, volume, before) -> int:
        network.head.weight.data.fill_(float("nan"))
        return 3

    assert predict(work, "inductive", "--inductive") == 0
    monkeypatch.setattr(Transduction, "adapt", diverge)
    assert predict(work, "output") == 0
    for case, array in segmentations(work, "output").items():
        assert np.array_equal(array, segmentations(work, "inductive")[case]) and array.any()
        report = reports(work, "output")[case]
        assert report["diverged"] == [True]
        assert all(entry["size_after_ml"] == entry["size_before_ml"] for entry in report["classes"].values())


def test_an_image_without_air_is_told(work, capsys):
    first, second = sorted((work.root / "images").iterdir())
    volume = nib.load(first)
    nib.save(nib.Nifti1Image(np.maximum(volume.get_fdata(dtype=np.float32) + 1024, 0), volume.affine), first)
    assert predict(work, "output", "--inductive") == 0
    told = capsys.readouterr()
    assert f"{first}: no value below 0" in told.out + told.err and str(second) not in told.out + told.err


@pytest.mark.slow
def test_stored_orientation_does_not_matter(work):
    assert predict(work, "before") == 0
    for file in (work.root / "images").iterdir():
        image = nib.load(file)
        nib.save(turned(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), "LPS"), file)
    assert predict(work, "after") == 0
    for case, expected in segmentations(work, "before").items():
        made = nib.load(work.root / "after" / f"{case}.nii.gz")
        assert nib.aff2axcodes(made.affine) == ("L", "P", "S")
        assert (np.asarray(turned(made, "RAS").dataobj) != expected).mean() < 1e-3 and expected.any()


def test_parts_share_the_cases(work):
    for part in ("0", "1"):
        assert predict(work, f"part_{part}", "--inductive", "-num_parts", "2", "-part_id", part) == 0
    parts = [list(segmentations(work, f"part_{part}")) for part in (0, 1)]
    cases = [file.name[: -len("_0000.nii.gz")] for file in sorted((work.root / "images").iterdir())]
    assert parts == [cases[:1], cases[1:]]
    assert predict(work, "part_2", "--inductive", "-num_parts", "2", "-part_id", "2") == 2


def test_largest_component(work):
    """Of each class; the command does it, too."""
    file = work.root / "labels.nii.gz"
    array = np.zeros((12, 12, 12), np.uint8)
    array[1:6, 1:6, 1:6], array[8:10, 8:10, 8:10], array[1:3, 8:10, 1:3] = 1, 1, 2
    nib.save(nib.Nifti1Image(array, np.eye(4)), file)
    keep_largest_components(file, load(work))
    array[8:10, 8:10, 8:10] = 0
    assert np.array_equal(np.asarray(nib.load(file).dataobj), array)
    assert predict(work, "output", "--inductive", "--largest_component") == 0
    for array in segmentations(work, "output").values():
        assert all(label(array == k)[1] <= 1 for k in (1, 2, 3)) and array.any()


def test_support_of_other_draws_is_refused(work):
    """The prior that was trained with is not that of the labels that lie there now."""
    model = load(work)
    memory_from_bank(model, 0)
    first, second, third = model.priors[0].expected
    # the cases were added up in another order
    model.priors[0] = SizePrior((first, replace(second, size=second.size * (1 + 1e-15)), third))
    memory_from_bank(model, 0)
    model.priors[0] = SizePrior((first, replace(second, size=second.size * 1.01), third))
    with pytest.raises(ValueError, match="fold 0 are not those that .* was trained on"):
        memory_from_bank(model, 0)


@pytest.mark.parametrize(
    "break_it, sentence",
    [
        (lambda work: shutil.rmtree(work.preprocessed), "or predict with --inductive"),
        (lambda work: edit_checkpoint(work, **{MEMORY_KEY: OTHER_MEMORY}), "have 3 channels"),
        (lambda work: edit_checkpoint(work, **{MEMORY_KEY: EARLIER_MEMORY}), "by an earlier version: write them again"),
        (lambda work: (work.root / "output").write_text("a file"), "choose another output folder"),
        (lambda work: shutil.rmtree(model_folder(work) / "fold_0"), "trained folds: 1. Choose with -f"),
        (lambda work: (model_folder(work) / "plans.json").unlink(), "does not contain a trained model"),
        (lambda work: shutil.rmtree(work.root / "images"), "does not exist. Expected a folder of images named"),
        (lambda work: (model_folder(work) / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK cut"), "final.pth"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_a_sentence(work, capsys, break_it, sentence):
    break_it(work)
    try:
        code = predict(work, "output")
        error = capsys.readouterr().err
    except SystemExit as end:
        code, error = 2, str(end)
    assert code == 2 and sentence in error and "Traceback" not in error


@pytest.mark.parametrize("options", [(), ("--inductive",)])
def test_weights_of_a_training_that_diverged(work, capsys, options):
    weights = read_checkpoint(model_folder(work) / "fold_0" / "checkpoint_final.pth")["network_weights"]
    weights["head.bias"][0] = float("nan")
    edit_checkpoint(work, network_weights=weights)
    assert predict(work, "output", *options) == 2
    assert "holds weights that are NaN or infinite" in capsys.readouterr().err
    assert not (work.root / "output").exists()


def test_without_the_results_folder(work, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results")
    assert os.environ.get("nnUNet_results") is None
    assert predict(work, "output") == 2
    assert "nnUNet_results is not set" in capsys.readouterr().err


# ---- images as people have them ----


def first_image(work) -> Path:
    return sorted((work.root / "images").iterdir())[0]


@pytest.mark.parametrize("value", [0, -1024])
@pytest.mark.parametrize("options", [(), ("--inductive",)])
def test_a_constant_image_shows_no_organ(work, capsys, value, options):
    image = nib.load(first_image(work))
    nib.save(nib.Nifti1Image(np.full(image.shape, value, np.int16), image.affine), first_image(work))
    assert predict(work, "output", "--save_probabilities", *options) == 0
    assert f"{first_image(work)} is constant ({value}): nothing is segmented in it." in capsys.readouterr().out
    case = first_image(work).name[:-12]
    (empty, shown), sizes = segmentations(work, "output").values(), reports(work, "output")[case]
    assert not empty.any() and shown.any() and empty.shape == image.shape
    assert np.load(work.root / "output" / f"{case}.npz")["probabilities"][1:].max() < 1e-6
    assert sizes["steps"] == [0]
    assert all(c["size_before_ml"] == c["size_after_ml"] == 0 for c in sizes["classes"].values())


def test_the_spacing_is_that_of_the_sform(work, capsys):
    """pixdim says 1 mm: nnU-Net would take it and segment another volume."""
    assert predict(work, "before", "--inductive") == 0
    image = nib.load(first_image(work))
    torn = nib.Nifti1Image(np.asarray(image.dataobj), None)
    torn.set_sform(image.affine, 1)
    nib.save(torn, first_image(work))
    assert nib.load(first_image(work)).header.get_zooms() == (1, 1, 1)
    assert predict(work, "after", "--inductive") == 0
    assert f"{first_image(work)}: pixdim of the header disagrees with the sform, whose" in capsys.readouterr().out
    for case, expected in segmentations(work, "before").items():
        np.testing.assert_array_equal(segmentations(work, "after")[case], expected)


def test_cases_that_would_vanish_are_counted(work, capsys):
    images = sorted((work.root / "images").iterdir())
    image = nib.load(images[0])
    nib.save(image, images[0].with_name(images[0].name[:-3]))  # .nii beside .nii.gz
    (work.root / "images" / "gone_0000.nii.gz").symlink_to("/nowhere/x.nii.gz")
    (work.root / "images" / "plain.nii.gz").write_bytes(images[0].read_bytes())
    (work.root / "images" / f"._{images[1].name}").write_bytes(b"\0\5\x16\7")
    (work.root / "images" / ".DS_Store").write_bytes(b"Bud1")
    assert predict(work, "output", "--inductive") == 2
    error = capsys.readouterr().err
    assert "fseft: 3 case(s) failed:" in error
    assert f"{images[0]} was not segmented: it exists twice, also as {images[0].name[:-3]}" in error
    assert "gone_0000.nii.gz was not segmented: it is a broken link to /nowhere/x.nii.gz" in error
    assert "plain.nii.gz was not segmented: it has no channel number" in error
    assert list(segmentations(work, "output")) == [images[1].name[:-12]]
    # the parts of a folder share the failures between them
    assert predict(work, "parts", "--inductive", "-num_parts", "4", "-part_id", "0") == 2
    assert "fseft: 1 case(s) failed:" in capsys.readouterr().err


def test_label_maps_beside_their_images_are_left_alone(work):
    image = first_image(work)
    image.with_name(image.name.replace("_0000", "")).write_bytes(image.read_bytes())
    assert predict(work, "output", "--inductive") == 0


@pytest.mark.parametrize("output", ["images", "nnUNet_raw/Dataset077_Tiny/labelsTr", "nnUNet_raw/Dataset077_Tiny"])
def test_predictions_replace_no_images_and_labels(work, capsys, output):
    before = {file: file.read_bytes() for file in (work.root / output).rglob("*") if file.is_file()}
    assert predict(work, output, "--inductive") == 2
    assert f"{output} holds images or labels of a dataset: choose another output folder." in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (work.root / output).rglob("*") if file.is_file()} == before


def test_a_field_of_view_in_other_units_is_warned_of(work, capsys):
    image = nib.load(first_image(work))
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([0.1, 0.1, 0.1, 1]) @ image.affine), first_image(work))
    predict(work, "output", "--inductive")
    assert f"{first_image(work)}: field of view far from that of the training cases. Is the" in capsys.readouterr().out
