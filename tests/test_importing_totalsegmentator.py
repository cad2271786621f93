"""Models in TotalSegmentator's folders, whole and in parts."""

import shutil
from pathlib import Path

import pytest
import torch
from nnunet_models import PATCH, write_dataset, write_totalsegmentator
from test_importing_zips import RunsCode

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.totalsegmentator import installed_models, weights_folder
from fsefs_nnunet.backbones.store import find_backbone, known_backbones
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.datasets.tables import tables
from fsefs_nnunet.labels import match_labels, normalised

CLASSES = tables()["sources"]["TotalSegmentator"]["v2"]  # in the order of TotalSegmentator's task "total"
MR_ORGANS = [
    "spleen", "kidney_right", "kidney_left", "gallbladder", "liver", "stomach", "pancreas", "adrenal_gland_right",
    "adrenal_gland_left", "lung_left", "lung_right", "esophagus", "small_bowel", "duodenum", "colon",
    "urinary_bladder", "prostate", "sacrum", "vertebrae", "intervertebral_discs", "spinal_cord", "heart", "aorta",
    "inferior_vena_cava", "portal_vein_and_splenic_vein", "iliac_artery_left", "iliac_artery_right",
    "iliac_vena_left", "iliac_vena_right",
]  # fmt: skip
PART1, FAST = "Dataset291_TotalSegmentator_part1_organs_1559subj", "Dataset297_TotalSegmentator_total_3mm_1559subj"
CT_MODELS = {
    PART1: CLASSES[:24],
    "Dataset292_TotalSegmentator_part2_vertebrae_1532subj": CLASSES[24:50],
    "Dataset293_TotalSegmentator_part3_cardiac_1559subj": CLASSES[50:68],
    "Dataset294_TotalSegmentator_part4_muscles_1559subj": CLASSES[68:91],
    "Dataset295_TotalSegmentator_part5_ribs_1559subj": CLASSES[91:],
}
MR_MODELS = {
    "Dataset850_TotalSegMRI_part1_organs_1088subj": MR_ORGANS,
    "Dataset851_TotalSegMRI_part2_muscles_1088subj": [
        name for name in CLASSES[68:91] if name not in ("spinal_cord", "skull")
    ],
}
IDS = [
    "totalseg291_part1_organs",
    "totalseg292_part2_vertebrae",
    "totalseg293_part3_cardiac",
    "totalseg294_part4_muscles",
    "totalseg295_part5_ribs",
    "totalseg297_total_3mm",
    "totalseg850_mr_part1_organs",
    "totalseg851_mr_part2_muscles",
]
FIRST = IDS[0]


@pytest.fixture(scope="module")
def every_model(tmp_path_factory) -> Path:
    """The folder that TotalSegmentator fills for the tasks total, total --fast and total_mr; do not write into it."""
    root = tmp_path_factory.mktemp("home") / "nnunet" / "results"
    for dataset, names in CT_MODELS.items():
        write_totalsegmentator(root, dataset, "nnUNetTrainerNoMirroring", "CT", names)
    write_totalsegmentator(root, FAST, "nnUNetTrainer_4000epochs_NoMirroring", "CT", CLASSES, 3.0)
    for dataset, names in MR_MODELS.items():
        write_totalsegmentator(root, dataset, "nnUNetTrainer_2000epochs_NoMirroring", "MR", names)
    return root


@pytest.fixture
def installed(every_model, tmp_path, backbones, monkeypatch) -> Path:
    """A copy of the first part alone, which a test may break."""
    root = tmp_path / "weights"
    shutil.copytree(every_model / PART1, root / PART1)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(root))
    return root


def folder_of(root: Path) -> Path:
    return root / PART1 / "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"


def run(*arguments: str) -> int:
    return main(["backbones", "import", "totalsegmentator", *arguments])


# ---- where they are ----


def test_folder_is_found_as_totalsegmentator_finds_it(tmp_path, monkeypatch):
    for name in ("TOTALSEG_WEIGHTS_PATH", "TOTALSEG_HOME_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_folder() == tmp_path / ".totalsegmentator" / "nnunet" / "results"
    monkeypatch.setenv("TOTALSEG_HOME_DIR", "/data/ts")
    assert weights_folder() == Path("/data/ts/nnunet/results")
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "/data/weights")
    assert weights_folder() == Path("/data/weights")


@pytest.mark.parametrize("arguments", [[], ["all"], ["291"]])
def test_without_totalsegmentator(tmp_path, backbones, monkeypatch, capsys, arguments):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    assert run(*arguments) == 2
    assert "none, where TotalSegmentator keeps its models, is missing: run totalseg_download" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert run(*arguments) == 2
    assert "none holds no folder of a model of TotalSegmentator v2, DatasetXXX_NAME: run" in capsys.readouterr().err


# ---- the list ----


def test_list_names_models_classes_and_commands(every_model, backbones, monkeypatch, capsys):
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(every_model.parents[1]))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    assert [model.id for model in installed_models()] == IDS
    assert run() == 0
    out = capsys.readouterr().out
    assert f"Models of TotalSegmentator in {every_model}:\n" in out
    assert f"{FIRST}: CT, [1.5, 1.5, 1.5] mm, 24 classes: spleen, kidney_right, kidney_left, gallbladder, " in out
    assert "kidney_cyst_right; licence Apache-2.0 (README of github.com/wasserth/TotalSegmentator)\n" in out
    assert "totalseg297_total_3mm: CT, [3.0, 3.0, 3.0] mm, 117 classes: spleen, " in out
    assert "totalseg850_mr_part1_organs: MR, [1.5, 1.5, 1.5] mm, 29 classes: spleen, " in out
    for name in IDS:
        assert f"  fseft backbones import totalsegmentator {name}\n" in out
    assert "All of them: fseft backbones import totalsegmentator all\n" in out
    assert not backbones.exists()


def test_list_says_what_is_imported(installed, capsys):
    assert run(FIRST) == 0
    capsys.readouterr()
    assert run() == 0
    assert f"  imported; again: fseft backbones import totalsegmentator {FIRST}\n" in capsys.readouterr().out


def test_models_that_need_a_licence_are_not_called_open(installed, capsys):
    shutil.copytree(installed / PART1, installed / "Dataset301_heart_highres_1559subj")
    assert run() == 0
    out = capsys.readouterr().out
    assert "totalseg301_heart_highres: CT" in out and "licence not known here: some of TotalSegmentator's models" in out


def test_two_models_of_one_data_set(installed, capsys):
    shutil.copytree(folder_of(installed), installed / PART1 / "nnUNetTrainer__nnUNetPlans__3d_fullres_high")
    names = [model.id for model in installed_models()]
    assert names == [
        f"{FIRST}_nnUNetTrainer{end}" for end in ("NoMirroring_nnUNetPlans_3d_fullres", "_nnUNetPlans_3d_fullres_high")
    ]
    assert run(names[1]) == 0 and run("291") == 0
    assert set(names) <= set(known_backbones())


# ---- the import ----


def test_all_are_imported(every_model, backbones, monkeypatch, capsys):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(every_model))
    assert run("all") == 0
    out = capsys.readouterr().out
    for name, model in zip(IDS, installed_models()):
        assert f"Use it: fseft plan_and_preprocess -d DATASET -b {name}\n" in out
        contract = find_backbone(name)
        expected = (CT_MODELS | {FAST: CLASSES} | MR_MODELS)[model.dataset.name]
        assert contract.head_classes == ("background", *expected)
        assert len({normalised(label) for label in expected}) == len(expected)  # each can be asked for
        assert contract.licence.startswith("Apache-2.0")
        assert ("MRI" in contract.citation) == ("mr" in name)
    assert find_backbone("totalseg297_total_3mm").spacing == (3.0, 3.0, 3.0)
    assert "trained by nnUNetTrainer_4000epochs_NoMirroring: all" in out


@pytest.mark.parametrize("wanted", [FIRST, "291", PART1, "data set", "model"])
def test_one_is_imported_by_each_of_its_names(installed, wanted):
    path = {"data set": installed / PART1, "model": folder_of(installed)}.get(wanted, wanted)
    assert run(str(path)) == 0
    assert find_backbone(FIRST).classes[:2] == ("background", "spleen")


def test_a_path_needs_no_weights_folder(installed, monkeypatch):
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", "/none")
    assert run(str(installed / PART1)) == 0


def test_features_are_the_stock_networks(installed, every_model):
    model = write_totalsegmentator(installed / "again", PART1, "nnUNetTrainerNoMirroring", "CT", CLASSES[:24])
    assert run(str(installed / "again" / PART1)) == 0
    image = torch.randn((1, 1, *PATCH), generator=torch.Generator().manual_seed(1))
    backbone = FrozenBackbone(FIRST, "last")
    with torch.no_grad():
        assert torch.equal(backbone.head(backbone(image)[0]), model.network(image)[0])


def test_labels_of_a_users_dataset_find_their_classes(installed, tmp_path, monkeypatch, capsys):
    assert run("291") == 0
    raw = write_dataset(tmp_path, monkeypatch, ["CT"])
    capsys.readouterr()
    assert main(["plan", "-d", raw.name.split("_")[0].removeprefix("Dataset"), "-b", FIRST]) == 0
    assert "Labels that the backbone knows by name: {'liver': 'liver'}" in capsys.readouterr().out
    spelled = {"Left Kidney": "kidney_left", "RKid": "kidney_right", "bladder": "urinary_bladder", "eso": "esophagus"}
    assert match_labels([*spelled, "lung"], find_backbone(FIRST).head_classes) == spelled


def test_names_that_are_not_there(installed, capsys, tmp_path):
    assert run("292") == 2
    assert f"TotalSegmentator's model '292' is not in {installed}; there are: {FIRST}." in capsys.readouterr().err
    assert run(str(installed)) == 2
    assert f"{installed} is not one of TotalSegmentator's folders, DatasetXXX_NAME: import" in capsys.readouterr().err


def test_another_id_needs_a_path(backbones, capsys):
    assert main(["backbones", "import", "mine"]) == 2
    assert "Say what 'mine' is imported from: fseft backbones import mine PATH." in capsys.readouterr().err
    assert main(["backbones", "import", "obelisk"]) == 2
    assert "PATH. Get allconvunet_tcia_fold1.pth from https://github.com/mattiaspaul/OBELISK" in capsys.readouterr().err
    assert main(["backbones", "import", "totalsegmentator", "291", "-c", "2d"]) == 2
    assert "omit -c" in capsys.readouterr().err


# ---- what an interrupted download leaves ----

MODEL = "nnUNetTrainerNoMirroring__nnUNetPlans__3d_fullres"
BROKEN = {
    "no checkpoint": (lambda model: (model / "fold_0" / "checkpoint_final.pth").unlink(), f"{MODEL} has no fold_X/"),
    "no fold": (lambda model: shutil.rmtree(model / "fold_0"), f"{MODEL} has no fold_X/checkpoint_final.pth"),
    "part of a checkpoint": (
        lambda model: shorten(model / "fold_0" / "checkpoint_final.pth"),
        "checkpoint_final.pth is damaged or incomplete",
    ),
    "empty checkpoint": (
        lambda model: (model / "fold_0" / "checkpoint_final.pth").write_bytes(b""),
        "checkpoint_final.pth is damaged or incomplete",
    ),
    "no dataset.json": (lambda model: (model / "dataset.json").unlink(), "dataset.json is missing"),
    "part of dataset.json": (lambda model: shorten(model / "dataset.json"), "dataset.json is damaged or incomplete"),
    "no plans.json": (lambda model: (model / "plans.json").unlink(), "plans.json is missing"),
    "part of plans.json": (lambda model: shorten(model / "plans.json"), "plans.json is damaged or incomplete"),
    "other JSON": (lambda model: (model / "plans.json").write_text("[]"), "plans.json is damaged or incomplete"),
    "no model": (lambda model: shutil.rmtree(model), f"{PART1} holds no model"),
}


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("what", BROKEN)
def test_half_a_download(installed, backbones, capsys, what):
    """In one sentence with the remedy: TotalSegmentator fetches nothing while the folder is there."""
    spoil, message = BROKEN[what]
    spoil(folder_of(installed))
    remedy = f": delete {installed / PART1} and run totalseg_download_weights -t total, which fetches only what is not "
    for arguments in (["291"], ["all"], [str(installed / PART1)]):
        assert run(*arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert remedy in said and said.count("\n") == 1
    assert not backbones.exists()
    assert run() == 0
    out = capsys.readouterr().out
    assert f"{FIRST}: {installed}" in out and message in out and remedy in out
    assert f"import totalsegmentator {FIRST}\n" not in out


def test_the_others_are_imported(installed, every_model, capsys):
    shutil.copytree(every_model / FAST, installed / FAST)
    (folder_of(installed) / "fold_0" / "checkpoint_final.pth").unlink()
    assert run("all") == 2
    said = capsys.readouterr()
    assert "Use it: fseft plan_and_preprocess -d DATASET -b totalseg297_total_3mm" in said.out
    assert f"{PART1} and run totalseg_download_weights -t total" in said.err
    assert "totalseg297_total_3mm" in known_backbones() and FIRST not in known_backbones()


def test_leftover_zips_and_other_files(installed, capsys):
    for name in ("tmp_download_file.zip", f"{FAST}.zip", "notes.txt"):
        (installed / name).write_bytes(b"PK")
    (installed / "__MACOSX").mkdir()
    assert run("all") == 0 and run() == 0
    out = capsys.readouterr().out
    temporary = installed / "tmp_download_file.zip"
    assert f"{temporary} is left over from a download: delete it unless TotalSegmentator is downloading now.\n" in out
    assert f"{installed / FAST}.zip is not unpacked; one model: fseft backbones import ID {installed / FAST}.zip" in out
    assert "notes" not in out and "MACOSX" not in out


def test_a_checkpoint_that_would_run_code(installed, backbones, tmp_path, capsys):
    witness, file = tmp_path / "ran", folder_of(installed) / "fold_0" / "checkpoint_final.pth"
    torch.save({"network_weights": {}, "logging": RunsCode(f"touch {witness}")}, file)
    assert run("all") == 2
    assert "checkpoint_final.pth was not opened: it holds more than weights" in capsys.readouterr().err
    assert not witness.exists() and not backbones.exists()
