"""plans.json that others published, with small random weights: what 3D stages give, what the rest says."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path

import pytest
import torch
from nnunet_models import network_of, write_checkpoint
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from test_importing_zips import RunsCode

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError

STAGES = [  # folder, configuration
    ("flare23", "3d_lowres"),
    ("flare23", "3d_fullres"),
    ("fdg_petct", "3d_lowres"),
    ("fdg_petct", "3d_fullres"),
    ("nextou", "3d_lowres"),
    ("nextou", "3d_fullres"),
    ("nextou", "3d_fullres_nextou"),
    ("liver_resencL", "3d_fullres"),
    ("uppect", "3d_lowres"),
    ("uppect", "3d_fullres"),
    ("brats_goat_resencM", "3d_fullres"),
    ("autopetv_interactive", "3d_fullres"),
    ("spine_ct", "3d_fullres"),
]
SECOND = "is the second stage of a cascade; import the first"
FLAT = "2D) cannot be a backbone: 3D models of PlainConvUNet or ResidualEncoderUNet can"
REFUSED = [
    ("flare23", "2d", FLAT),
    ("flare23", "3d_cascade_fullres", SECOND),
    ("fdg_petct", "2d", FLAT),
    ("fdg_petct", "3d_cascade_fullres", SECOND),
    ("nextou", "2d", FLAT),
    ("nextou", "3d_cascade_fullres", SECOND),
    ("liver_resencL", "2d", FLAT),
    ("uppect", "2d", FLAT),
    ("uppect", "3d_cascade_fullres", SECOND),
    ("brats_goat_resencM", "2d", FLAT),
    ("spine_ct", "2d", FLAT),
    ("stenunet_2d", "2d", FLAT),
    ("stenunet_2d_training", "2d", FLAT),
]


@pytest.fixture
def field_plans(shared) -> Path:
    if not (shared / "field" / "plans").is_dir():
        pytest.skip(f"{shared / 'field' / 'plans'} is missing: this test reads plans.json that others published.")
    return shared / "field" / "plans"


def narrow(plans: dict) -> dict:
    """The same plans with few features, in the format that they have."""
    for configuration in plans["configurations"].values():
        if "UNet_base_num_features" in configuration:
            configuration.update(UNet_base_num_features=2, unet_max_num_features=6)
        if "architecture" in configuration:
            kwargs = configuration["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [min(features // 16, 6) for features in kwargs["features_per_stage"]]
    return plans


def settings_of(plans: dict, configuration: str) -> ConfigurationManager:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected old nnU-Net plans format")
        return PlansManager(plans).get_configuration(configuration)


def published_model(source: Path, folder: Path, configuration: str) -> torch.nn.Module:
    """A model folder as a training with these plans leaves it. Returns its network."""
    folder.mkdir(parents=True)
    plans = narrow(json.loads((source / "plans.json").read_text("utf-8")))
    settings = settings_of(plans, configuration)
    if (source / "dataset.json").exists():
        dataset = json.loads((source / "dataset.json").read_text("utf-8"))
    else:
        schemes = settings.normalization_schemes
        names = {str(i): "CT" if scheme == "CTNormalization" else f"MR{i}" for i, scheme in enumerate(schemes)}
        labels = {"background": 0, "one": 1, "two": 2}
        dataset = {"channel_names": names, "labels": labels, "numTraining": 9, "file_ending": ".nii.gz"}
    architecture = {
        "network_class_name": settings.network_arch_class_name,
        "arch_kwargs": settings.network_arch_init_kwargs,
        "_kw_requires_import": settings.network_arch_init_kwargs_req_import,
    }
    torch.manual_seed(3)
    network = network_of(architecture, len(dataset["channel_names"]), len(dataset["labels"])).eval()
    arguments = {"plans": plans, "configuration": configuration, "fold": 0, "dataset_json": dataset}
    write_checkpoint(folder / "fold_0" / "checkpoint_final.pth", network, plans, init_args=arguments)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    return network


@pytest.mark.parametrize("name, configuration", STAGES)
def test_a_3d_stage_is_imported_and_runs_on_one_window(tmp_path, backbones, field_plans, name, configuration):
    network = published_model(field_plans / name, tmp_path / "model", configuration)
    contract = import_nnunet_model("mine", tmp_path / "model", backbones)
    settings = settings_of(json.loads((tmp_path / "model" / "plans.json").read_text()), configuration)
    assert contract.spacing == tuple(settings.spacing) and contract.patch_size == tuple(settings.patch_size)
    assert all(side % divisor == 0 for side, divisor in zip(contract.patch_size, contract.divisor))
    window = [min(side, 2 * divisor) for side, divisor in zip(contract.patch_size, contract.divisor)]
    image = torch.randn((1, contract.input_channels, *window), generator=torch.Generator().manual_seed(1))
    backbone = FrozenBackbone("mine", "last")
    with torch.no_grad():
        assert torch.equal(backbone.head(backbone(image)[0]), network(image)[0])


@pytest.mark.parametrize("name, configuration, message", REFUSED)
def test_another_stage_is_refused(tmp_path, backbones, field_plans, capsys, name, configuration, message):
    published_model(field_plans / name, tmp_path / "model", configuration)
    assert main(["backbones", "import", "mine", str(tmp_path / "model")]) == 2
    said = capsys.readouterr().err
    assert message in said and f"Configuration {configuration!r}" in said and said.count("\n") == 1
    assert not backbones.exists()


def test_every_configuration_is_in_one_of_the_lists(field_plans):
    found = {
        (file.parent.name, name)
        for file in field_plans.glob("*/plans.json")
        for name in json.loads(file.read_text("utf-8"))["configurations"]
    }
    assert found == {*STAGES, *((name, configuration) for name, configuration, _ in REFUSED)}


# ---- nnU-Net v1 ----


@pytest.mark.parametrize("name, file", [("stunet_v1", "base_ep4k.model.pkl"), ("liver_v1_prediction", "plans.pkl")])
def test_a_model_of_nnunet_v1(backbones, field_plans, capsys, name, file):
    for path in (field_plans / name, field_plans / name / file):
        assert main(["backbones", "import", "mine", str(path)]) == 2
        said = capsys.readouterr().err
        assert (
            f"{name}/{file} is a pickle, as nnU-Net v1 wrote them; it could run code and was not opened: give" in said
        )
        assert said.count("\n") == 1 and not backbones.exists()


@pytest.mark.parametrize("place", ["plans.pkl", "fold_0/model_final_checkpoint.model.pkl", "in a zip", "the file"])
def test_a_pickle_of_nnunet_v1_is_never_opened(tmp_path, backbones, capsys, place):
    witness, folder = tmp_path / "ran", tmp_path / "model"
    file = folder / ("plans.pkl" if place in ("in a zip", "the file") else place)
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(RunsCode(f"touch {witness}")))
    path = {"in a zip": tmp_path / "model.zip", "the file": file}.get(place, folder)
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.write(file, "model/plans.pkl")
    assert main(["backbones", "import", "mine", str(path)]) == 2
    assert "is a pickle, as nnU-Net v1 wrote them; it could run code and was not opened" in capsys.readouterr().err
    with pytest.raises(InputError, match="is a pickle, as nnU-Net v1 wrote them"):
        import_nnunet_model("mine", path, backbones)
    assert not witness.exists() and not backbones.exists()
    pickle.loads(file.read_bytes())
    assert witness.exists()  # so it was dangerous
