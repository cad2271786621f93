from __future__ import annotations

from pathlib import Path

from fsefs_nnunet.datasets.source import Case, Source


class KiTS(Source):
    """Kidney Tumor Segmentation challenges 2019, 2021, 2023 (kits-challenge.org).

    case_00000/imaging.nii.gz with segmentation.nii.gz; 2021 has aggregated_MAJ_seg.nii.gz instead, the majority of the
    annotators. Plain values: 1 kidney without its masses, 2 tumour, 3 cyst (not in 2019).
    """

    name = "KiTS"
    layout = "case_00000/imaging.nii.gz and case_00000/segmentation.nii.gz (aggregated_MAJ_seg.nii.gz in 2021)"

    def cases(self, folder: Path) -> list[Case]:
        cases = []
        for case in sorted(path for path in folder.rglob("case_?????") if path.is_dir()):
            image = case / "imaging.nii.gz"
            labels = (case / "segmentation.nii.gz", case / "aggregated_MAJ_seg.nii.gz")
            label = next((file for file in labels if file.exists()), None)
            if label or image.exists():
                cases.append(Case(case.name, image if image.exists() else None, label))
        return cases
