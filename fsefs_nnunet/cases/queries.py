"""Unlabelled query volumes: preprocessed as nnU-Net does at prediction, kept beside the training cases."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np

from fsefs_nnunet.cases.preprocessed import require_finite
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
            InputError: if an image cannot be read or holds NaN or infinite values; the earlier queries stay then.
        """
        from tqdm import tqdm

        made = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(made, ignore_errors=True)  # of a call that was interrupted
        made.mkdir(parents=True)
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        reader = plans_manager.image_reader_writer_class()
        try:
            for case, files in tqdm(images.items(), desc="preprocessing queries"):
                image, properties = read_image(reader, files)
                data, _, _ = preprocessor.run_case_npy(
                    image, None, properties, plans_manager, configuration_manager, dataset_json
                )
                np.save(made / f"{case}.npy", data.astype(np.float32, copy=False))
            self._replace_by(made)
        finally:
            shutil.rmtree(made, ignore_errors=True)

    def _replace_by(self, made: Path) -> None:
        self.folder.mkdir(exist_ok=True)
        new = [file.name for file in made.iterdir()]
        for name in new:
            os.replace(made / name, self.folder / name)
        for case in self.cases:
            if f"{case}.npy" not in new:
                (self.folder / f"{case}.npy").unlink()


def read_image(reader, files: list[str]) -> tuple[np.ndarray, dict]:
    """Image (channels, X, Y, Z) and properties, as nnU-Net's `reader` gives them.

    Raises:
        InputError: if a channel is missing or too many, or it cannot be read, or it holds NaN or infinite values, some
            of which normalisation would hide.
    """
    require_channels(files)
    try:
        image, properties = reader.read_images(files)
    except Exception as error:  # each of the libraries that read images has errors of its own
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{', '.join(files)} cannot be read ({reason}): repair it, or leave the case out.") from error
    require_finite(image, files)
    return image, properties


def images_in(folder: Path, dataset_json: dict) -> dict[str, list[str]]:
    """Cases of a folder in nnU-Net's naming, `<case>_0000<file ending>` and so on per channel, there or not.

    Raises:
        InputError: if the folder has no such image.
    """
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    first = sorted(Path(folder).glob(f"*_0000{ending}"))
    if not first:
        raise InputError(f"{folder} has no images named <case>_0000{ending}: nnU-Net's naming is wanted.")
    cases = {}
    for file in first:
        case = file.name[: -len(f"_0000{ending}")]
        cases[case] = [str(file.with_name(f"{case}_{channel:04d}{ending}")) for channel in range(channels)]
    return cases


def require_channels(files: list[str]) -> None:
    """Raises InputError if one of a case's files is missing, or a further channel lies beside them."""
    for file in files:
        if not Path(file).exists():
            raise InputError(f"{file} is missing: every case needs {len(files)} channel(s).")
    first = Path(files[0])
    odd = first.with_name(re.sub(r"_0000(?=\.)", f"_{len(files):04d}", first.name))
    if odd != first and odd.exists():
        raise InputError(f"{odd} is a channel too many: the dataset has {len(files)}. Move it away.")
