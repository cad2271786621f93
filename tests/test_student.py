"""Students: a pile of unlabelled cases, what a teacher says of it, and the training on both."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import write_phantom
from nnunetv2.inference.predict_from_raw_data import predict_entry_point
from trainings import edit, make_trainer, splits_of, text_of

from fsefs_nnunet.adaptation.pseudo_labels import sure_labels
from fsefs_nnunet.cases.pile import keep_pile, pile_cases
from fsefs_nnunet.cli.main import main
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.trainers.by_name import FSEFTTrainer_FTLong

ONE = "3d_fullres_1shot"


@pytest.fixture
def taught(work, monkeypatch):
    """A workspace with a teacher of one shot and one epoch."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("fseft_final_validation", "0")
    make_trainer(work, epochs=1, configuration=ONE).run_training()
    return work


def student(*options: object) -> int:
    arguments = ["-d", 77, "-c", ONE, "-tr", "FSEFTTrainer", "-o", 177, "-np", 1, "-device", "cpu", *options]
    return main(["student", *map(str, arguments)])


# ---- the pile's labels ----


def test_unsure_voxels_are_ignored():
    segmentation = np.array([[[0, 1, 2, 1]]])
    softmax = np.array([[0.9, 0.1, 0.2, 0.3], [0.05, 0.8, 0.1, 0.4], [0.05, 0.1, 0.7, 0.3]])[:, None, None]
    assert sure_labels(segmentation, softmax, False, 0.75, 3).tolist() == [[[0, 1, 3, 3]]]
    assert sure_labels(segmentation, softmax, False, 0.0, 3).tolist() == segmentation.tolist()


def test_regions_are_sure_of_what_is_there_and_of_what_is_not():
    segmentation = np.array([[[0, 1, 2]]])
    sigmoid = np.array([[0.1, 0.95, 0.9], [0.2, 0.3, 0.9]])[:, None, None]
    assert sure_labels(segmentation, sigmoid, True, 0.75, 3).tolist() == [[[0, 3, 2]]]


# ---- from a teacher to a trained student ----


@pytest.mark.slow
def test_from_teacher_to_student(taught, capsys, tmp_path):
    assert student("--minutes", 0.05, "--min_probability", 0.6) == 0
    splits, raw = splits_of(taught), taught.root / "nnUNet_raw" / "Dataset177_TinyStudent"
    true, *pile = splits["folds"][0]
    content = json.loads((raw / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "spleen": 1, "stomach": 2, "kidney_left": 3, "ignore": 4}
    assert not content["transductive"] and not any(case in json.dumps(content) for case in pile)
    assert json.loads((raw / "conversion.json").read_text())["pseudo_labels"]["pile"].keys() == {*pile}
    assert {file.name for file in (raw / "labelsTr").iterdir()} == {f"{case}.nii.gz" for case in [true, *pile]}

    def label(folder: Path, case: str) -> np.ndarray:
        return np.asarray(nib.load(folder / "labelsTr" / f"{case}.nii.gz").dataobj)

    assert np.array_equal(label(raw, true), label(taught.raw, true))
    # the pile's are the teacher's: what nnUNetv2_predict makes of the images, where it is sure
    images = tmp_path / "pile"
    images.mkdir()
    for case in pile:
        (images / f"{case}_0000.nii.gz").symlink_to((taught.raw / "imagesTr" / f"{case}_0000.nii.gz").resolve())
    predict(images, tmp_path / "predicted")
    for case in pile:
        predicted, kept = np.asarray(nib.load(tmp_path / "predicted" / f"{case}.nii.gz").dataobj), label(raw, case)
        assert np.array_equal(kept[kept != 4], predicted[kept != 4])
        assert (kept == 4).any() and (kept != 4).any()
    model = taught.root / "nnUNet_results" / raw.name / "FSEFTTrainer_FTLong__FSEFTPlans__3d_fullres_allshot"
    run = RunFile.load(model / "fold_0")
    assert run.support == [true] and sorted(run.pile) == sorted(pile) and run.budget_seconds == 3
    plans = json.loads((model / "plans.json").read_text())["configurations"]
    assert plans["3d_fullres"]["spacing"] == taught.plans()["configurations"]["3d_fullres"]["spacing"]
    # the student without a pile, for comparison
    assert plans[ONE]["fseft_shots"] == 1
    # nothing is done twice
    before = {file: file.stat().st_mtime_ns for file in taught.root.rglob("*") if file.is_file()}
    capsys.readouterr()
    assert student("--minutes", 0.05, "--min_probability", 0.6) == 0
    assert "is complete and unchanged" in capsys.readouterr().out
    changed = [f.name for f in taught.root.rglob("*") if f.is_file() and before.get(f) != f.stat().st_mtime_ns]
    assert changed == []
    assert student("--minutes", 2, "--min_probability", 0.6) == 2
    assert "was trained for 0.05 minutes: delete it to train for another time" in capsys.readouterr().err
    assert student("--min_probability", 0.7) == 2
    assert "Dataset177_TinyStudent was made with another teacher, pile or probability" in capsys.readouterr().err


def predict(images: Path, output: Path) -> None:
    arguments = ["-i", images, "-o", output, "-d", 77, "-c", ONE, "-tr", "FSEFTTrainer", "-p", "FSEFTPlans", "-f", 0]
    arguments += ["-device", "cpu", "-npp", 1, "-nps", 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["nnUNetv2_predict", *map(str, arguments)])
        predict_entry_point()


def test_an_interrupted_student_goes_on(taught, monkeypatch):
    from fsefs_nnunet.adaptation import pseudo_labels

    labelled, original = [], pseudo_labels.sure_labels

    def fail_at_the_third(*arguments):
        labelled.append(len(labelled))
        if len(labelled) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(pseudo_labels, "sure_labels", fail_at_the_third)
    assert student("--student", "none") == 130
    assert student("--student", "none") == 0
    assert len(labelled) == 2 + 1 + 2  # the third and the fourth after the interruption
    assert len(list((taught.root / "nnUNet_raw" / "Dataset177_TinyStudent" / "labelsTr").iterdir())) == 5


# ---- which cases are drawn ----


@pytest.mark.slow
def test_true_cases_are_repeated_and_alone_in_the_end(work, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("fseft_final_validation", "0")
    pool = splits_of(work)["folds"][0]
    keep_pile(work.preprocessed, pool[1:])
    drawn = []

    class Recorded(FSEFTTrainer_FTLong):
        def get_tr_and_val_datasets(self):
            datasets = super().get_tr_and_val_datasets()
            drawn.append((self.current_epoch, list(datasets[0].identifiers)))
            return datasets

    trainer = make_trainer(work, Recorded, epochs=10)
    trainer.num_iterations_per_epoch = 1
    assert trainer.true_and_pile() == ([pool[0]], pool[1:])
    assert trainer.drawn_cases() == [pool[0]] * 2 + pool[1:]  # 2 of 6 are nearest to 0.3
    trainer.run_training()
    assert drawn == [(0, sorted([pool[0], *pool])), (8, [pool[0]])]  # nnU-Net sorts them; the last fifth
    assert "drawn from the true cases alone" in text_of(trainer)


@pytest.mark.slow
def test_nnunet_from_scratch_can_be_a_student(taught, capsys):
    assert student("--student", "FSEFTTrainer_Scratch", "--minutes", 0.02) == 0
    assert "-c 3d_fullres_allshot_scratch -f 0 -tr FSEFTTrainer_Scratch" in capsys.readouterr().out


# ---- bad input ----


def test_an_empty_pile(taught, capsys):
    make_trainer(taught, epochs=1).run_training()
    assert main("student -d 77 -c 3d_fullres_5shot -tr FSEFTTrainer -o 177".split()) == 2
    assert "no labelled case besides the support and the queries of fold 0" in capsys.readouterr().err


def write_copy(case_file: Path, target: Path) -> None:
    """The same voxels in another number format, stored along other axes."""
    image = nib.load(case_file)
    stored = nib.Nifti1Image(np.asarray(image.dataobj).astype(np.float32), image.affine)
    turned = stored.as_reoriented(np.array([[0, -1], [1, 1], [2, 1]]))
    target.parent.mkdir(exist_ok=True)
    nib.save(turned, target)


def test_a_pile_that_shows_a_support_case(taught, capsys, tmp_path):
    true = splits_of(taught)["folds"][0][0]
    write_copy(taught.raw / "imagesTr" / f"{true}_0000.nii.gz", tmp_path / "pile" / "patient_0000.nii.gz")
    assert student("--pile", tmp_path / "pile", "--transductive") == 2
    error = capsys.readouterr().err
    assert "patient_0000.nii.gz is the support case " + true in error and "remove it from the pile" in error


def test_queries_in_the_pile_are_asked_for(taught, capsys, tmp_path):
    query = splits_of(taught)["queries"][0]
    write_copy(taught.raw / "imagesTr" / f"{query}_0000.nii.gz", tmp_path / "pile" / "patient_0000.nii.gz")
    assert student("--pile", tmp_path / "pile", "--student", "none") == 2
    assert f"is the query or test case {query}" in capsys.readouterr().err
    assert student("--pile", tmp_path / "pile", "--student", "none", "--transductive") == 0
    raw = taught.root / "nnUNet_raw" / "Dataset177_TinyStudent"
    assert json.loads((raw / "dataset.json").read_text())["transductive"]
    assert pile_cases(taught.root / "nnUNet_preprocessed" / raw.name) == {"pile_patient"}
    assert "Transductive: the pile shows queries or test cases." in capsys.readouterr().out


def test_no_teacher(work, capsys):
    assert student() == 2
    assert "train the teacher, or check -d, -tr, -p, -c and -f" in capsys.readouterr().err


def test_no_probability(taught, capsys):
    assert student("--min_probability", 80) == 2
    assert "--min_probability 80: give a probability, at most 1." in capsys.readouterr().err


@pytest.mark.parametrize("trainer", ["FSEFTTrainer", "FSEFTTrainer_Context"])
def test_stored_features_take_no_pseudo_labels(taught, capsys, trainer):
    assert student("--student", trainer) == 2
    assert f"--student {trainer} trains on stored features" in capsys.readouterr().err
    keep_pile(taught.preprocessed, splits_of(taught)["folds"][0][:1])
    with pytest.raises(InputError, match="would treat a model's labels as true ones"):
        make_trainer(taught, epochs=1, configuration=ONE).run_training()


def test_a_student_does_not_teach(taught, capsys):
    keep_pile(taught.preprocessed, ["case_0"])
    assert student() == 2
    assert "is a student's dataset: choose a teacher that was trained on true labels alone" in capsys.readouterr().err


def test_a_teacher_of_other_splits(taught, capsys):
    def swap(splits: dict) -> None:
        splits["folds"][0] = splits["folds"][0][::-1]

    edit(taught.preprocessed / "splits_fseft.json", swap)
    assert student() == 2
    assert "was trained on support cases other than those in splits_fseft.json now" in capsys.readouterr().err


def test_test_cases_are_compared_whatever_their_names(taught, capsys, tmp_path):
    """A case of imagesTs that has the name of a support case; an empty imagesTs is none."""
    true, query = splits_of(taught)["folds"][0][0], splits_of(taught)["queries"][0]
    (taught.raw / "imagesTs").mkdir()
    write_copy(taught.raw / "imagesTr" / f"{query}_0000.nii.gz", tmp_path / "pile" / "patient_0000.nii.gz")
    image = nib.load(tmp_path / "pile" / "patient_0000.nii.gz")
    other = nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine)
    nib.save(other, tmp_path / "pile" / "patient_0000.nii.gz")
    assert student("--pile", tmp_path / "pile", "--student", "none") == 0
    write_copy(tmp_path / "pile" / "patient_0000.nii.gz", taught.raw / "imagesTs" / f"{true}_0000.nii.gz")
    assert student("--pile", tmp_path / "pile", "--student", "none") == 2
    assert f"is the query or test case {true}" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nan", "constant"])
def test_broken_images_are_refused_before_any_is_labelled(taught, capsys, tmp_path, what):
    """Left out, the rest of the pile goes on."""
    pile = tmp_path / "pile"
    for number, seed in enumerate(((8, 0), (9, 1))):
        pile.mkdir(exist_ok=True)
        write_phantom(pile / f"scan{number}_0000.nii.gz", None, seed)
    image = nib.load(pile / "scan1_0000.nii.gz")
    broken = np.full(image.shape, np.nan if what == "nan" else 3.0, np.float32)
    nib.save(nib.Nifti1Image(broken, image.affine), pile / "z_0000.nii.gz")
    assert student("--pile", pile, "--student", "none") == 2
    assert f"{pile / 'z_0000.nii.gz'} {'holds NaN' if what == 'nan' else 'is constant'}" in capsys.readouterr().err
    assert not list((taught.root / "nnUNet_raw").glob(".*part"))
    (pile / "z_0000.nii.gz").unlink()
    assert student("--pile", pile, "--student", "none", "--transductive") == 0


def test_an_image_that_was_replaced_is_labelled_again(taught, capsys, tmp_path, monkeypatch):
    from fsefs_nnunet.datasets.building import UnfinishedDataset

    pile = tmp_path / "pile"
    pile.mkdir()
    write_phantom(pile / "scan_0000.nii.gz", None, (9, 0))
    write_phantom(pile / "gone_0000.nii.gz", None, (9, 2))
    with monkeypatch.context() as patch:
        patch.setattr(
            UnfinishedDataset, "finish", lambda *arguments, **others: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        assert student("--pile", pile, "--student", "none") == 130
    (part,) = (taught.root / "nnUNet_raw").glob(".*part")
    before = (part / "labelsTr" / "pile_scan.nii.gz").read_bytes()
    write_phantom(pile / "scan_0000.nii.gz", None, (9, 1))
    (pile / "gone_0000.nii.gz").unlink()
    assert student("--pile", pile, "--student", "none") == 0
    raw = taught.root / "nnUNet_raw" / "Dataset177_TinyStudent"
    assert (raw / "labelsTr" / "pile_scan.nii.gz").read_bytes() != before
    true = splits_of(taught)["folds"][0][0]
    assert sorted(file.name for file in (raw / "labelsTr").iterdir()) == sorted([f"{true}.nii.gz", "pile_scan.nii.gz"])
    write_phantom(pile / "scan_0000.nii.gz", None, (9, 3))
    assert student("--pile", pile, "--student", "none") == 2
    assert "was made with another teacher, pile or probability" in capsys.readouterr().err


def test_a_teacher_that_is_sure_of_nothing(taught, capsys):
    assert student("--student", "none", "--min_probability", 1) == 2
    assert "unsure of every voxel of the pile: reduce --min_probability, which is 1" in capsys.readouterr().err


@pytest.mark.parametrize("file, content", [("plans.json", "{}"), ("dataset.json", "{")])
def test_a_damaged_teacher(taught, capsys, file, content):
    (taught.results / "FSEFTTrainer__FSEFTPlans__3d_fullres_1shot" / file).write_text(content)
    assert student() == 2
    assert file in capsys.readouterr().err
