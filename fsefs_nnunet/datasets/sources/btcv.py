from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class BTCV(Source):
    """Multi-Atlas Labeling Beyond the Cranial Vault, abdomen (Synapse syn3193805), RawData.zip.

    Training/img/img0001.nii.gz, Training/label/label0001.nii.gz, Testing/img/img0061.nii.gz.
    """

    name = "BTCV"
    layout = "Training/img/img0001.nii.gz and Training/label/label0001.nii.gz"

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("Training/img/*.nii.gz"), r"img(\d+)\.nii\.gz")
        labels = numbered(folder.rglob("Training/label/*.nii.gz"), r"label(\d+)\.nii\.gz")
        return paired(images, labels, "img{}")

    def test_images(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("Testing/img/*.nii.gz"), r"img(\d+)\.nii\.gz")
        return paired(images, {}, "img{}")
