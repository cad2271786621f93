from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class CTORG(Source):
    """CT-ORG (The Cancer Imaging Archive, doi.org/10.7937/tcia.2019.tt7f4v7o; Rister et al., Sci Data 2020).

    OrganSegmentations/volume-0.nii.gz and labels-0.nii.gz, float32. Lungs and kidneys have one value for both sides.
    131 of the 140 scans are LiTS's.
    """

    name = "CT-ORG"
    layout = "volume-0.nii.gz next to labels-0.nii.gz"

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("volume-*.nii*"), r"volume-(\d+)\.nii(?:\.gz)?")
        labels = numbered(folder.rglob("labels-*.nii*"), r"labels-(\d+)\.nii(?:\.gz)?")
        return paired(images, labels, "volume-{}")
