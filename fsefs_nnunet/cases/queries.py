"""Unlabelled query volumes: preprocessed as nnU-Net does at prediction, kept next to the training cases."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fsefs_nnunet.cases.dataset_json import shows_ct
from fsefs_nnunet.cases.headers import warnings_of
from fsefs_nnunet.cases.images import is_constant, lacks_air, offset_warning, read_headers, read_image
from fsefs_nnunet.errors import InputError


class UnlabelledQueries:
    """Folder `<data identifier>_queries` of the preprocessed dataset: `<case>.npy` (channels, X, Y, Z) float32.

    It lies next to nnU-Net's folder, since nnU-Net expects nothing but its own cases in there and clears it.
    """

    def __init__(self, preprocessed_folder: str | Path):
        self.folder = Path(f"{preprocessed_folder}_queries")

    @property
    def cases(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.npy"))

    def file(self, case: str) -> Path:
        return self.folder / f"{case}.npy"

    def load(self, case: str) -> np.ndarray:
        return np.load(self.file(case))

    def shape_of(self, case: str) -> tuple[int, ...]:
        """(X, Y, Z)."""
        return np.load(self.file(case), mmap_mode="r").shape[1:]

    def preprocess(
        self, images: dict[str, list[str]], plans_manager, configuration_manager, dataset_json: dict
    ) -> None:
        """Preprocess `images`, case -> one file per channel, replacing the queries of earlier calls.

        Raises:
            InputError: if an image cannot be read, or holds NaN, infinite values or a single value; the earlier
                queries are kept in that case.
        """
        reader = plans_manager.image_reader_writer_class()
        headers = [header for files in images.values() for header in read_headers(files, type(reader).__name__)[0]]
        for warning in warnings_of(headers):
            print(f"Warning: {warning}")
        made = self.folder.with_name(f"{self.folder.name}.part")
        shutil.rmtree(made, ignore_errors=True)  # left by an interrupted call
        made.mkdir(parents=True)
        preprocessor = configuration_manager.preprocessor_class(verbose=False)
        try:
            for case, files in tqdm(images.items(), desc="preprocessing queries"):
                image, properties = read_image(reader, files)
                if shows_ct(dataset_json) and lacks_air(image):
                    tqdm.write(f"Warning: {offset_warning(files[:1])}")
                if is_constant(image):
                    raise InputError(f"{files[0]} is constant ({image[0].min():g}): leave it out.")
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
