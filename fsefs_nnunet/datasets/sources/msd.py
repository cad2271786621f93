from __future__ import annotations

import json
import re
from pathlib import Path

from nnunetv2.dataset_conversion.convert_MSD_dataset import split_4d_nifti

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired
from fsefs_nnunet.datasets.volumes import read_header
from fsefs_nnunet.errors import InputError


class MSD(Source):
    """One task of the Medical Segmentation Decathlon (medicaldecathlon.com, arXiv 1902.09063).

    TaskXX_Name with dataset.json, imagesTr, labelsTr, imagesTs, as nnUNetv2_convert_MSD_dataset takes it. 4D images
    are split into channels by nnU-Net's own function; 3D ones stay as they are. Labels that mean nothing without their
    task get the organ's name: "cancer" of Task03 is liver_tumor.
    """

    name = "MSD"
    layout = "one task, TaskXX_Name, with dataset.json, imagesTr, labelsTr"

    @staticmethod
    def _json(folder: Path) -> dict:
        file = folder / "dataset.json"
        try:
            content = json.loads(file.read_text("utf-8"))
            return {key: {int(i): str(name) for i, name in content[key].items()} for key in ("labels", "modality")}
        except FileNotFoundError:
            raise InputError(f"{file} is missing: give the folder of {MSD.layout}.") from None
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{file} does not give labels and modality as the Decathlon does: {error}.") from error

    def dataset_name(self, folder: Path) -> str:
        return folder.name.split("_", 1)[-1]

    def channels(self, folder: Path) -> dict[int, str]:
        return self._json(folder)["modality"]

    def table(self, folder: Path) -> dict[str, int]:
        task = re.match(r"Task\d\d", folder.name)
        names = self.row["names"].get(task[0], {}) if task else {}
        return {names.get(name, name): value for value, name in self._json(folder)["labels"].items() if value}

    def cases(self, folder: Path) -> list[Case]:
        self._json(folder)
        return paired(self._files(folder / "imagesTr"), self._files(folder / "labelsTr"))

    def test_images(self, folder: Path) -> list[Case]:
        return paired(self._files(folder / "imagesTs"), {})

    @staticmethod
    def _files(folder: Path) -> dict[str, Path]:
        return numbered(folder.glob("*.nii.gz"), r"(.+)\.nii\.gz")

    def image_files(self, image: Path, scratch: Path) -> list[Path]:
        if len(read_header(image).shape) == 3:
            return [image]
        try:
            split_4d_nifti(str(image), str(scratch))
        except RuntimeError as error:
            raise InputError(f"{image} cannot be split into channels: {str(error).splitlines()[-1]}") from error
        return sorted(scratch.glob(f"{image.name[:-7]}_????.nii.gz"))
