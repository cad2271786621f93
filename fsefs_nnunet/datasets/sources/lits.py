from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class LiTS(Source):
    """Liver Tumor Segmentation benchmark (competitions.codalab.org/competitions/17094, arXiv 1901.04056).

    volume-0.nii and segmentation-0.nii in "Training Batch 1" and "Training Batch 2", test-volume-0.nii. Value 1 is
    the liver without its tumours (2).
    """

    name = "LiTS"
    layout = "volume-0.nii next to segmentation-0.nii, in one or several folders"

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("volume-*.nii*"), r"volume-(\d+)\.nii(?:\.gz)?")
        labels = numbered(folder.rglob("segmentation-*.nii*"), r"segmentation-(\d+)\.nii(?:\.gz)?")
        return paired(images, labels, "volume-{}")

    def test_images(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("test-volume-*.nii*"), r"test-volume-(\d+)\.nii(?:\.gz)?")
        return paired(images, {}, "test-volume-{}")
