"""One HTML file on a comparison of methods, from what the trainings left in their folders."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.cases.folders import training_files
from fsefs_nnunet.evaluation.html import render
from fsefs_nnunet.evaluation.overlays import ABDOMEN_HU, save_overlay
from fsefs_nnunet.evaluation.plots import plot_learning_curves, plot_sizes
from fsefs_nnunet.evaluation.tables import best_median_worst, case_dice, counted_sizes
from fsefs_nnunet.labels import foreground
from fsefs_nnunet.methods.run_file import RunFile


def write_report(
    file: Path,
    introduction: str,
    rows: list[dict],
    folds: dict[str, Path],
    adapted: str,
    raw: Path,
    next_steps: dict[str, list[str]],
    advice: list[str],
) -> None:
    """Write tables, learning curves, overlays, sizes and what to run next as one HTML file that loads nothing.

    Args:
        rows: the table of results, as for markdown_table.
        folds: trained and validated fold folder of each method.
        adapted: the method, one of `folds`, whose overlays and sizes are shown.
        raw: nnU-Net's raw folder of the dataset.
        next_steps: shell commands by what they are for.
        advice: which backbone to choose, a sentence for each kind of scan.

    Raises:
        InputError: if a fold's fseft_run.json is missing or damaged.
    """
    fold = folds[adapted]
    images = {case: files["images"][0] for case, files in training_files(raw, dataset_of(fold)).items()}
    page = render(
        "comparison.html",
        introduction=introduction,
        rows=rows,
        curves=_learning_curves(folds),
        adapted=adapted,
        overlays=ranked_overlays(fold / "validation", images, raw / "labelsTr", dataset_of(fold)),
        size_section=size_section(fold, fold / "validation"),
        next_steps=next_steps,
        advice=advice,
    )
    Path(file).write_text(page, encoding="utf-8")


def _learning_curves(folds: dict[str, Path]) -> dict[str, bytes]:
    curves = {method: RunFile.load(fold).epochs for method, fold in folds.items()}
    return {
        "Training loss, without the prior's penalty.": plot_learning_curves(curves, "loss", "training loss"),
        "Pseudo Dice, the mean over the classes.": plot_learning_curves(
            curves, "pseudo_dice", "pseudo Dice on the support"
        ),
    }


def dataset_of(fold: Path) -> dict:
    """dataset.json of the model that a fold's folder belongs to."""
    return json.loads((fold.parent / "dataset.json").read_text("utf-8"))


def ranked_overlays(predictions: Path, images: dict[str, str], labels: Path, dataset_json: dict) -> dict[str, bytes]:
    """PNGs by caption of the best, median and worst case of a folder with nnU-Net's summary.json.

    images: the first channel of each case.

    Empty if no case shows a class, labelled or predicted.
    """
    ending = dataset_json["file_ending"]
    dice = case_dice(predictions / "summary.json")
    overlays, window = {}, ABDOMEN_HU if shows_ct(dataset_json) else None
    for rank, name in best_median_worst(dice).items():
        case, png = name.removesuffix(ending), BytesIO()
        caption = f"{rank}: {case}, mean Dice {dice[name]:.3f}"
        organs = foreground(dataset_json["labels"])
        save_overlay(images[case], predictions / name, png, labels / name, organs, caption, window)
        overlays[caption] = png.getvalue()
    return overlays


def size_section(fold: Path, predictions: Path) -> dict:
    """Charts and rows of a table of the prior and of the predicted and labelled sizes; {} where there was no prior.

    predictions: a folder with nnU-Net's summary.json.
    """
    expected = {
        name: of_class for name, of_class in RunFile.load(fold).prior.items() if of_class and "size" in of_class
    }
    if not expected:
        return {}
    plans = json.loads((fold.parent / "plans.json").read_text("utf-8"))
    reader = PlansManager(plans).image_reader_writer_class()
    predicted, labelled = counted_sizes(predictions / "summary.json", foreground(dataset_of(fold)["labels"]), reader)
    rows = [
        {
            "sizes in ml": name,
            "prior S": f"{of_class['size']:.1f}",
            "spread": f"{of_class['spread']:.1f}",
            "support cases": of_class["num_cases"],
            "predicted": f"{predicted[name].mean():.1f}",
            "labelled": f"{labelled[name].mean():.1f}",
        }
        for name, of_class in expected.items()
    ]
    caption = "Sizes of the segmentations, and of the labels, which only this evaluation uses."
    return {"charts": {caption: plot_sizes(expected, predicted, labelled)}, "rows": rows}
