"""Zero-shot validation during pretraining: whole held-out volumes, Dice by class and source."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from fsefs_nnunet.backbones.maps import FeatureMap
from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.features.volume import VolumeFeatures
from fsefs_nnunet.files import write_atomically

FILE = "zero_shot.csv"
COLUMNS = ("epoch", "source", "class", "cases", "Dice")


def first_cases(sources: dict[str, dict], held_out: list[str], most: int) -> dict[str, list[str]]:
    """At most `most` held-out cases of each source of dataset.json; sources without any are left out."""
    known = set(held_out)
    cases = {name: [case for case in source["cases"] if case in known][:most] for name, source in sources.items()}
    return {name: some for name, some in cases.items() if some}


class LogitMap(nn.Module):
    """A segmentation network in the form of a backbone whose only map is its logits."""

    def __init__(self, network: nn.Module, label_manager: LabelManager):
        super().__init__()
        self.network, self.maps = network, [FeatureMap(label_manager.num_segmentation_heads)]

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        """image (B, input_channels, X, Y, Z) -> one map (B, outputs, X, Y, Z)."""
        with reduced_precision(image.device):
            return [self.network(image).float()]


def volume_dice(trainer: nnUNetTrainer, case: str) -> np.ndarray:
    """Dice (K,) of each region in the preprocessed volume of a case; NaN for one that neither side shows."""
    # DDP's wrapper expects every process to call it equally often
    network = trainer.network.module if trainer.is_ddp else trainer.network
    data, segmentation, *_ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
    window = trainer.configuration_manager.patch_size
    features = VolumeFeatures(LogitMap(network, trainer.label_manager), data[:], window, trainer.device)
    planes = [(slab.maps[0] > 0).cpu() for slab in features.slabs()]
    predicted = torch.cat(planes, 1)[(slice(None), *features.tiling.inside)]
    regions = ConvertSegmentationToRegionsTransform(trainer.label_manager.foreground_regions, channel_in_seg=0)
    true = regions(segmentation=torch.from_numpy(segmentation[:]))["segmentation"].bool()
    both, either = ((predicted & true).sum((1, 2, 3)), predicted.sum((1, 2, 3)) + true.sum((1, 2, 3)))
    return (2 * both / either).numpy()  # 0 / 0 is NaN


class SourceValidation(nnUNetTrainer):
    """Segments a few held-out cases of each source every few epochs, and writes zero_shot.csv and a table in the log.

    Needs `region_names` and `masks` of FSEFTPretrainer. The time is not counted as training. Fold `all` holds nothing
    out, so there the cases are training cases.
    """

    zero_shot_every = 10  # epochs
    zero_shot_cases = 4  # of each source, the first ones

    def on_epoch_start(self):
        if self.current_epoch and self.current_epoch % self.zero_shot_every == 0:
            self.validate_zero_shot()
        super().on_epoch_start()

    def validate_zero_shot(self) -> None:
        train, held_out = self.do_split()
        groups = first_cases(self.dataset_json["sources"], held_out, self.zero_shot_cases)
        if not groups:
            return
        cases = [case for group in groups.values() for case in group]
        self.network.eval()
        if self.is_ddp:
            parts = [None] * dist.get_world_size()
            mine = cases[self.local_rank :: len(parts)]
            dist.all_gather_object(parts, {case: volume_dice(self, case) for case in mine})
            dice = {case: value for part in parts for case, value in part.items()}
        else:
            dice = {case: volume_dice(self, case) for case in cases}
        if self.local_rank == 0:
            rows = self.by_source(groups, dice)
            seen = "training cases" if set(cases) & set(train) else "held-out cases"
            self.print_to_log_file(f"Zero-shot Dice after {self.current_epoch} epochs, {seen}, whole volumes:")
            for row in rows:
                self.print_to_log_file("  {source}, {class}: {Dice} ({cases})".format(**row))
            self.add_rows(Path(self.output_folder) / FILE, rows)

    def by_source(self, groups: dict[str, list[str]], dice: dict[str, np.ndarray]) -> list[dict]:
        """Means over the cases of each source that show the class, for the classes that it annotates."""
        rows = []
        for source, cases in groups.items():
            for k, name in enumerate(self.region_names):
                values = [dice[case][k] for case in cases if self.masks[case][k] and not np.isnan(dice[case][k])]
                if values:
                    mean = round(float(np.mean(values)), 4)
                    rows.append(dict(zip(COLUMNS, (self.current_epoch, source, name, len(values), mean))))
        return rows

    def add_rows(self, file: Path, rows: list[dict]) -> None:
        """A training that continued from an earlier epoch has already measured later ones: they are replaced."""
        earlier = []
        if os.path.exists(file):
            with open(file, newline="") as f:
                earlier = [row for row in csv.DictReader(f) if int(row["epoch"]) < self.current_epoch]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(earlier + rows)
        write_atomically(file, text.getvalue())
