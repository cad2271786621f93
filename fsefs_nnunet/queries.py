"""Unlabelled query volumes: preprocessed as nnU-Net does at prediction, kept beside the training cases."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fsefs_nnunet.errors import InputError


class UnlabelledQueries:
    """Folder `<data identifier>_queries` of the preprocessed dataset: `<case>.npy` (channels, X, Y, Z) float32.

    It lies beside nnU-Net's folder, since nnU-Net wants nothing but its own cases in there and clears it.
    """

    def __init__(self, preprocessed_folder: str | Path):
        self.folder = Path(f"{preprocessed_folder}_queries")

    @property
    def cases(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.npy"))

    def load(self, case: str) -> np.ndarray:
        return np.load(self.folder / f"{case}.npy")

    def preprocess(
        self, images: dict[str, list[str]], plans_manager, configuration_manager, dataset_json: dict
    ) -> None:
        """Preprocess `images`, case -> one file per channel, and forget the queries of earlier calls.

        Raises:
            InputError: if an image holds NaN or infinite values.
        """
        from tqdm import tqdm

        self.folder.mkdir(parents=True, exist_ok=True)
        for case in set(self.cases) - images.keys():
            (self.folder / f"{case}.npy").unlink()
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        for case, files in tqdm(images.items(), desc="preprocessing queries"):
            data, _, _ = preprocessor.run_case(files, None, plans_manager, configuration_manager, dataset_json)
            if not np.isfinite(data).all():
                raise InputError(f"{files[0]} holds NaN or infinite values: repair the image or leave it out.")
            part = self.folder / f"{case}.part"
            with open(part, "wb") as f:
                np.save(f, data.astype(np.float32, copy=False))
            os.replace(part, self.folder / f"{case}.npy")


def images_in(folder: Path, dataset_json: dict) -> dict[str, list[str]]:
    """Cases of a folder in nnU-Net's naming, `<case>_0000<file ending>` and so on per channel.

    Raises:
        InputError: if the folder has no such image, or a case lacks a channel or has one too many.
    """
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    first = sorted(Path(folder).glob(f"*_0000{ending}"))
    if not first:
        raise InputError(f"{folder} has no images named <case>_0000{ending}: nnU-Net's naming is wanted.")
    cases = {}
    for file in first:
        case = file.name[: -len(f"_0000{ending}")]
        cases[case] = [str(file.with_name(f"{case}_{channel:04d}{ending}")) for channel in range(channels)]
        for name in cases[case]:
            if not Path(name).exists():
                raise InputError(f"{name} is missing: every case needs {channels} channel(s).")
        if (odd := file.with_name(f"{case}_{channels:04d}{ending}")).exists():
            raise InputError(f"{odd} is a channel too many: the dataset has {channels}. Move it away.")
    return cases
