from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source, numbered, paired


class FLARE22(Source):
    """The 50 labelled cases of MICCAI FLARE 2022 (flare22.grand-challenge.org), FLARE22_LabeledCase50.

    images/FLARE22_Tr_0001_0000.nii.gz, labels/FLARE22_Tr_0001.nii.gz. Values as in the challenge's list (1 liver,
    2 right kidney ... 13 left kidney; the same in U-Mamba's Dataset701_AbdomenCT). The images without labels are not
    converted: 2000 of them are other datasets' cases.
    """

    name = "FLARE22"
    layout = "images/FLARE22_Tr_0001_0000.nii.gz and labels/FLARE22_Tr_0001.nii.gz"

    def cases(self, folder: Path) -> list[Case]:
        images = numbered(folder.rglob("images/*.nii.gz"), r"FLARE22_Tr_(\d+)_0000\.nii\.gz")
        labels = numbered(folder.rglob("labels/*.nii.gz"), r"FLARE22_Tr_(\d+)\.nii\.gz")
        return paired(images, labels, "FLARE22_Tr_{}")
