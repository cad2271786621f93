import json
import math
import re
from base64 import b64decode
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import SimpleITK
from matplotlib.colors import to_rgb
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO

from fsefs_nnunet.evaluation.overlays import _load, save_overlay
from fsefs_nnunet.evaluation.plots import plot_learning_curves, plot_sizes
from fsefs_nnunet.evaluation.report import write_report
from fsefs_nnunet.evaluation.tables import (
    best_median_worst,
    case_dice,
    counted_sizes,
    markdown_table,
    mean_dice,
    summary_key,
)
from fsefs_nnunet.methods.run_file import RunFile

SPACING = (1.0, 1.5, 3.0)
LPS = np.diag([-1, -1, 1, 1])


def save_ras(file, array):
    nib.save(nib.Nifti1Image(array, np.diag([*SPACING, 1.0])), file)


def save_lps(file, array):
    affine = np.diag([*SPACING, 1.0]) @ LPS
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array[::-1, ::-1]), affine), file)


@pytest.fixture
def case():
    """Image (X, Y, Z) in RAS, a segmentation and a reference of two organs that differ a little."""
    rng = np.random.default_rng(0)
    image = rng.normal(0, 10, (20, 24, 12)).astype(np.float32)
    segmentation = np.zeros(image.shape, np.uint8)
    segmentation[12:18, 5:12, 3:9] = 1
    segmentation[0:4, 14:20, 4:8] = 2  # touches the border
    reference = np.roll(segmentation, 1, axis=1)
    image[reference > 0] += 100
    return {"image": image, "segmentation": segmentation, "reference": reference}


def write(folder, case, save):
    folder.mkdir()
    files = {name: folder / f"{name}.nii.gz" for name in case}
    for name, array in case.items():
        save(files[name], array)
    return files


def picture(files, png, **arguments):
    from matplotlib.image import imread

    save_overlay(files["image"], files["segmentation"], png, **arguments)
    return imread(png)[..., :3]


def coloured(pixels):
    """Pixels that are neither black, grey nor white."""
    return (np.ptp(pixels, axis=-1) > 0.1).sum()


def test_overlay_shows_image_and_contours(tmp_path, case):
    files = write(tmp_path / "ras", case, save_ras)
    pixels = picture(files, tmp_path / "a.png", labels={"background": 0, "liver": 1, "spleen": 2}, title="case")
    assert pixels.std() > 0.1
    assert coloured(pixels) > 100
    with_reference = picture(files, tmp_path / "b.png", reference_file=files["reference"])
    assert coloured(with_reference) > coloured(pixels)


def test_overlay_does_not_depend_on_stored_orientation(tmp_path, case):
    ras, lps = write(tmp_path / "ras", case, save_ras), write(tmp_path / "lps", case, save_lps)
    for files, png in ((ras, "ras.png"), (lps, "lps.png")):
        save_overlay(files["image"], files["segmentation"], tmp_path / png, files["reference"])
    assert (tmp_path / "ras.png").read_bytes() == (tmp_path / "lps.png").read_bytes()


def test_slices_lie_as_radiologists_expect(tmp_path):
    volume = np.zeros((4, 5, 6), np.uint8)
    volume[3, 4, 5] = 1  # RAS: right, anterior, superior
    save_ras(tmp_path / "x.nii.gz", volume)
    array, spacing = _load(tmp_path / "x.nii.gz")
    assert array[0, 0, 0] == 1  # left column and top row of every panel
    np.testing.assert_allclose(spacing, SPACING)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_overlay_of_what_simpleitk_reads(tmp_path, case, ending):
    """The same picture as of NIfTI, whose axes nibabel turns, SimpleITK's being stored as they come."""
    files = write(tmp_path / "nii", case, save_ras)
    others = {name: file.with_name(f"{name}{ending}") for name, file in files.items()}
    for name, file in files.items():
        SimpleITK.WriteImage(SimpleITK.ReadImage(file), others[name])
    for group, png in ((files, "a.png"), (others, "b.png")):
        save_overlay(group["image"], group["segmentation"], tmp_path / png, group["reference"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_overlay_of_an_empty_segmentation(tmp_path, case):
    case["segmentation"] = np.zeros_like(case["segmentation"])
    files = write(tmp_path / "ras", case, save_ras)
    assert coloured(picture(files, tmp_path / "a.png")) == 0
    assert coloured(picture(files, tmp_path / "b.png", reference_file=files["reference"])) > 100


def test_overlay_of_what_an_image_shows(tmp_path, case):
    """Air around a patient is left out: the picture of a padded volume is that of the volume."""
    case["image"] += 500
    padded = {name: np.pad(array, ((0, 0), (6, 9), (3, 0))) for name, array in case.items()}
    for name, arrays in (("tight", case), ("padded", padded)):
        files = write(tmp_path / name, arrays, save_ras)
        save_overlay(files["image"], files["segmentation"], tmp_path / f"{name}.png", window=(100, 900))
    # two voxels of air stay
    tight, wide = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("tight", "padded"))
    assert coloured(tight[..., :3]) > 100
    assert abs(wide.shape[1] / tight.shape[1] - 1) < 0.15


def test_overlay_in_a_window(tmp_path, case):
    files = write(tmp_path / "ras", case, save_ras)
    dark, bright = (picture(files, tmp_path / "a.png", window=w).mean() for w in ((0, 10_000), (-100, 0)))
    assert dark < 0.2 < bright


def test_overlay_refuses_another_cases_segmentation(tmp_path, case):
    case["segmentation"] = case["segmentation"][:-1]
    files = write(tmp_path / "ras", case, save_ras)
    with pytest.raises(ValueError, match="they are different cases"):
        save_overlay(files["image"], files["segmentation"], tmp_path / "a.png")


def test_markdown_table():
    rows = [
        {"method": "linear probe", "Dice": 0.5, "parameters": 49},
        {"method": "a|b", "Dice": np.float32(0.12345), "seconds": math.nan},
    ]
    assert markdown_table(rows) == (
        "| method | Dice | parameters | seconds |\n"
        "| --- | --- | --- | --- |\n"
        "| linear probe | 0.500 | 49 |  |\n"
        "| a\\|b | 0.123 |  | - |\n"
    )
    assert markdown_table([]) == ""


def test_mean_dice(tmp_path):
    summary = {
        "foreground_mean": {"Dice": 0.7, "IoU": 0.6},
        "mean": {"1": {"Dice": 0.6}, "(1, 2)": {"Dice": 0.8}, "3": {"Dice": math.nan}},
        "metric_per_case": [],
    }
    file = tmp_path / "summary.json"
    file.write_text(json.dumps(summary))
    dice = mean_dice(file)
    assert math.isnan(dice.pop("3"))
    assert dice == {"1": 0.6, "(1, 2)": 0.8, "mean": 0.7}


# ---- what a training leaves ----


def test_summary_key_is_nnunets():
    assert [summary_key(value) for value in (1, [1, 2], [3])] == ["1", "(1, 2)", "(3,)"]


LABELS = {"background": 0, "left <kidney> & co": 1, "kidney": 2}
ORGANS = {name: value for name, value in LABELS.items() if value}


def counts(dice: float, voxels: int) -> dict:
    return {"Dice": dice, "n_ref": voxels, "n_pred": 2 * voxels}


SUMMARY = {
    "foreground_mean": {"Dice": 0.5},
    "mean": {"1": {"Dice": 0.6}, "2": {"Dice": 0.4}},
    "metric_per_case": [
        # nnU-Net writes the paths of the training's machine
        {"prediction_file": f"/elsewhere/{case}.nii.gz", "metrics": metrics}
        for case, metrics in {
            "a": {"1": counts(0.5, 200), "2": counts(math.nan, 0)},
            "b": {"1": counts(0.9, 100), "2": counts(0.8, 1000)},
            "c": {"1": counts(0.1, 0), "2": counts(0.3, 400)},
            "d": {"1": counts(0.6, 0), "2": counts(0.6, 0)},
        }.items()
    ],
}
RUN = RunFile(
    prior={
        "left <kidney> & co": {"size": 1.5, "spread": 0.25, "num_cases": 4, "tolerance": 0.3},
        "kidney": {"size": 20.0, "spread": 0.0, "num_cases": 1, "tolerance": 0.3},
        "spleen": None,
    },
    epochs=[{"loss": 0.5, "pseudo_dice": 0.125, "seconds": 3.0}, {"loss": -0.25, "pseudo_dice": 0.75, "seconds": 4.0}],
)


def write_model(results: Path, name: str, case: dict) -> Path:
    """A model folder as nnU-Net leaves it, with four queries; returns its fold."""
    fold = results / name / "fold_0"
    (fold / "validation").mkdir(parents=True)
    content = {"channel_names": {"0": "CT"}, "labels": LABELS, "file_ending": ".nii.gz"}
    (fold.parent / "dataset.json").write_text(json.dumps(content))
    (fold.parent / "plans.json").write_text(json.dumps({"image_reader_writer": "NibabelIO", "configurations": {}}))
    (fold / "validation" / "summary.json").write_text(json.dumps(SUMMARY))
    for query in "abcd":
        save_ras(fold / "validation" / f"{query}.nii.gz", case["segmentation"])
    RUN.save(fold)
    return fold


@pytest.fixture
def fold(tmp_path, case):
    return write_model(tmp_path, "FSEFTTrainer__FSEFTPlans__3d_fullres_5shot", case)


def test_cases_by_dice(fold):
    dice = case_dice(fold / "validation" / "summary.json")
    assert dice == pytest.approx({"a.nii.gz": 0.5, "b.nii.gz": 0.85, "c.nii.gz": 0.2, "d.nii.gz": 0.6})
    assert best_median_worst(dice) == {"best": "b.nii.gz", "median": "d.nii.gz", "worst": "c.nii.gz"}
    assert best_median_worst({"x": 0.1, "y": 0.2, "z": 0.3}) == {"best": "z", "median": "y", "worst": "x"}
    assert set(best_median_worst({"x": 0.1}).values()) == {"x"}
    assert best_median_worst({}) == {}


def test_counted_sizes(fold):
    """A voxel has 1.0 x 1.5 x 3.0 mm = 0.0045 ml."""
    predicted, labelled = counted_sizes(fold / "validation" / "summary.json", ORGANS, NibabelIO())
    assert predicted.equals(2 * labelled)
    assert dict(labelled.loc["a.nii.gz"]) == pytest.approx({"left <kidney> & co": 0.9, "kidney": 0.0})
    assert dict(labelled.loc["b.nii.gz"]) == pytest.approx({"left <kidney> & co": 0.45, "kidney": 4.5})


# ---- report ----


class Reader(HTMLParser):
    """Text outside of <style>, pictures, and what a browser would fetch."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.cells, self.pictures, self.fetched, self.text, self.within = [], [], [], [], "", None
        self.feed(source)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.within = tag
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action"):
                (self.pictures if value.startswith("data:image/png;base64,") else self.fetched).append(value)

    def handle_data(self, data):
        if self.within in ("th", "td"):
            self.cells.append(data)
        if self.within != "style":
            self.text += data

    def handle_endtag(self, tag):
        self.within = None


def report_of(fold: Path, case: dict, tmp_path: Path) -> Reader:
    raw = tmp_path / "raw"
    for folder, suffix, array in (("imagesTr", "_0000", "image"), ("labelsTr", "", "reference")):
        (raw / folder).mkdir(parents=True)
        for query in "abcd":
            save_ras(raw / folder / f"{query}{suffix}.nii.gz", case[array])
    folds = {"A <&> B": fold, "probe": write_model(tmp_path, "FSEFTTrainer_LinearProbe__P__3d_fullres_5shot", case)}
    rows = [{"method": "A <&> B", "Dice": 0.12345, "seconds": 7}, {"method": "probe", "Dice": math.nan}]
    steps = {"Another <draw>:": ['eval "$(fseft env)"', "nnUNetv2_train 4 < /dev/null && echo done"]}
    write_report(tmp_path / "report.html", "Queries <8> & more.", rows, folds, "A <&> B", raw, steps, ["MR: <phantom>"])
    return Reader((tmp_path / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def report(tmp_path, case, fold) -> Reader:
    return report_of(fold, case, tmp_path)


def test_report_is_one_file(report, tmp_path):
    # two learning curves, three overlays, one chart of sizes
    assert len(report.pictures) == 6 and len(set(report.pictures)) == 6
    for picture in report.pictures:
        assert b64decode(picture.partition(",")[2]).startswith(b"\x89PNG")
    assert "MR: <phantom>" in report.text
    assert report.fetched == [] and not {"script", "link", "iframe"} & set(report.tags)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import", re.sub(r"base64,[^\"]+", "", source))
    assert 'name="viewport"' in source and "color-scheme: light dark" in source


def test_report_tables(report):
    """All cells of both tables, names in full."""
    assert report.cells == [
        *("method", "Dice", "seconds"),
        *("A <&> B", "0.123", "7"),
        *("probe", "-"),  # no text in the empty cell
        *("sizes in ml", "prior S", "spread", "support cases", "predicted", "labelled"),
        *("left <kidney> & co", "1.5", "0.2", "4", "0.7", "0.3"),
        *("kidney", "20.0", "0.0", "1", "3.1", "1.6"),
    ]


def test_report_names_cases_and_commands(report):
    for text in ("Queries <8> & more.", "Best, median and worst query: A <&> B", "Another <draw>:"):
        assert text in report.text
    for text in ("best: b, mean Dice 0.850", "median: d, mean Dice 0.600", "worst: c, mean Dice 0.200"):
        assert text in report.text
    assert 'eval "$(fseft env)"\nnnUNetv2_train 4 < /dev/null && echo done' in report.text
    assert "draw" not in report.tags and "kidney" not in report.tags


def test_report_without_a_prior(tmp_path, case, fold):
    RunFile(epochs=RUN.epochs).save(fold)
    report = report_of(fold, case, tmp_path)
    assert "The size prior had no effect in this training." in report.text
    assert len(report.pictures) == 5 and "sizes in ml" not in report.cells


def test_next_steps_of_the_demo():
    """Paths with blanks are quoted, and every command of ours and nnU-Net's is one that is installed."""
    from fsefs_nnunet.nnunet.experiment import Experiment
    from fsefs_nnunet.synthetic.demo import DATASET, next_steps

    lines = [line for block in next_steps(Experiment(Path("/my demo"), DATASET)).values() for line in block]
    assert "export nnUNet_results='/my demo/nnUNet_results'" in lines
    assert any("-i '/my demo/nnUNet_raw/Dataset901_FSEFTDemo/imagesTr' -o '/my demo/predictions'" in x for x in lines)
    assert {line.split()[0] for line in lines} == {"eval", "export", "fseft", "nnUNetv2_train", "nnUNetv2_predict"}


# ---- charts ----


def test_learning_curves_show_the_value_asked_for():
    curves = {"probe": RUN.epochs}
    assert plot_learning_curves(curves, "loss", "t") != plot_learning_curves(curves, "pseudo_dice", "t")


@pytest.mark.parametrize(("predicted", "labelled"), [(10.0, 20.0), (20.0, 10.0)])
def test_sizes_lie_at_their_multiple_of_the_prior(predicted, labelled):
    from matplotlib.image import imread

    sizes = [pd.DataFrame({"liver": [ml]}, ["a.nii.gz"]) for ml in (predicted, labelled)]
    png = plot_sizes({"liver": {"size": 10.0, "tolerance": 0.3}}, *sizes)
    pixels = imread(BytesIO(png))[70:, :, :3]  # below the legend
    # the column of each colour's mark
    at = [np.abs(pixels - to_rgb(colour)).max(-1).min(0).argmin() for colour in ("tab:orange", "tab:cyan")]
    assert (at[0] < at[1]) == (predicted < labelled)
