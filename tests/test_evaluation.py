import json
import math

import nibabel as nib
import numpy as np
import pytest

from fsefs_nnunet.evaluation.overlays import _load, save_overlay
from fsefs_nnunet.evaluation.tables import markdown_table, mean_dice

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


def test_overlay_of_an_empty_segmentation(tmp_path, case):
    case["segmentation"] = np.zeros_like(case["segmentation"])
    files = write(tmp_path / "ras", case, save_ras)
    assert coloured(picture(files, tmp_path / "a.png")) == 0
    assert coloured(picture(files, tmp_path / "b.png", reference_file=files["reference"])) > 100


def test_overlay_refuses_another_cases_segmentation(tmp_path, case):
    case["segmentation"] = case["segmentation"][:-1]
    files = write(tmp_path / "ras", case, save_ras)
    with pytest.raises(ValueError, match="not one case"):
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
