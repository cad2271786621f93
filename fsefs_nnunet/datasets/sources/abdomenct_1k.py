from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class AbdomenCT1K(Source):
    """AbdomenCT-1K (github.com/JunMa11/AbdomenCT-1K, arXiv 2010.14808).

    AbdomenCT-1K-ImagePart1 to 3 with Case_00001_0000.nii.gz, Mask with Case_00001.nii.gz. Both kidneys have one value.
    """

    name = "AbdomenCT-1K"
    layout = "AbdomenCT-1K-ImagePart1/Case_00001_0000.nii.gz and Mask/Case_00001.nii.gz"

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("Case_*_0000.nii.gz"), r"Case_(\d+)_0000\.nii\.gz")
        labels = numbered(folder.rglob("Case_*.nii.gz"), r"Case_(\d+)\.nii\.gz")
        return paired(images, labels, "Case_{}")
