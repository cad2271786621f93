from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class AMOS22(Source):
    """AMOS 2022 as released after the challenge (zenodo.org/record/7262581); its CT part.

    imagesTr, imagesVa with labelsTr, labelsVa; imagesTs without. Cases up to 500 are CT, later ones MR (AMOS,
    arXiv 2206.08023; nnU-Net's Dataset218_Amos2022_task1.py draws the same line).
    """

    name = "AMOS22"
    layout = "imagesTr, imagesVa with labelsTr, labelsVa, files amos_0001.nii.gz"

    @staticmethod
    def _ct(folder: Path, *subfolders: str) -> dict[str, Path]:
        files = [file for sub in subfolders for file in folder.rglob(f"{sub}/*.nii.gz")]
        return {n: file for n, file in numbered(files, r"amos_(\d{4})\.nii\.gz").items() if int(n) <= 500}

    def cases(self, folder: Path) -> list[Case]:
        images, labels = self._ct(folder, "imagesTr", "imagesVa"), self._ct(folder, "labelsTr", "labelsVa")
        return paired(images, labels, "amos_{}")

    def test_images(self, folder: Path) -> list[Case]:
        return paired(self._ct(folder, "imagesTs"), {}, "amos_{}")
