"""Whether features tell organs: a linear probe on every other slice of one CT, Dice on the slices between.

    FSEFT_SHARED=FOLDER python benchmarks/probe_within_case.py astra --work /data/probe

FOLDER/data/TotalSegmentator_example is a CT with masks. The backbone is one of the store; its maps are blended over
windows and upsampled linearly. It is no measure of adaptation: training and test voxels lie in one patient.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch.nn.functional import cross_entropy, grid_sample

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.features.tiling import Tiling
from fsefs_nnunet.features.windows import run_windows
from fsefs_nnunet.files import read_json
from fsefs_nnunet.nnunet.experiment import Experiment
from fsefs_nnunet.planners.fseft_planner import default_plans_name

DATASET, ORGANS = "Dataset090_TotalSegmentator", ["liver", "spleen", "kidney_right", "kidney_left"]
TRAINING_VOXELS, STEPS, RATE = 100_000, 300, 1e-2


def preprocessed_case(experiment: Experiment, backbone_id: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Image (1, X, Y, Z) and label map (X, Y, Z) as the backbone's plans make them, and its window."""
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "TotalSegmentator_example"
    if not experiment.raw.exists():
        number = experiment.dataset[7:10]
        experiment.run("fseft", "convert", "TotalSegmentator", "-i", source, "-d", number, "--classes", *ORGANS)
    folder = experiment.preprocessed / f"{experiment.plans}_3d_fullres"
    if not folder.exists():
        options = ("--shots", "1", "--num_queries", "0", "-np", "1")
        experiment.run("fseft", "plan_and_preprocess", "-d", experiment.dataset, "-b", backbone_id, *options)
    dataset = infer_dataset_class(str(folder))(str(folder))
    image, labels = dataset.load_case(dataset.identifiers[0])[:2]
    plans = read_json(experiment.preprocessed / f"{experiment.plans}.json")["configurations"]
    window = plans["3d_fullres_1shot"]["patch_size"]
    return torch.from_numpy(image[:]).float(), torch.from_numpy(labels[0].astype(np.int64)), window


class Features:
    """The blended maps of a volume, read at any of its voxels."""

    def __init__(self, backbone: FrozenBackbone, image: torch.Tensor, window: list[int]):
        self.tiling = Tiling.of(image.shape[1:], window, backbone.maps)
        slabs = [slab.maps for slab in run_windows(backbone, image, self.tiling, torch.device("cpu"))]
        self.maps = [torch.cat(parts, 1)[None] for parts in zip(*slabs)]

    def at(self, voxels: torch.Tensor) -> torch.Tensor:
        """voxels (N, 3) -> features (N, C)."""
        places = (voxels + torch.tensor(self.tiling.before) + 0.5) / torch.tensor(self.tiling.padded) * 2 - 1
        grid = places.flip(-1)[None, None, None]
        read = (grid_sample(m, grid, padding_mode="border", align_corners=False) for m in self.maps)
        return torch.cat([values[0, :, 0, 0].T for values in read], 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--stages", default="last")
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    experiment = Experiment(args.work.resolve(), DATASET, default_plans_name(args.backbone))
    image, labels, window = preprocessed_case(experiment, args.backbone)
    torch.manual_seed(0)
    features = Features(FrozenBackbone(args.backbone, args.stages), image, window)
    voxels = torch.stack(torch.meshgrid(*(torch.arange(n) for n in labels.shape), indexing="ij"), -1)
    training = voxels[:, :, ::2].reshape(-1, 3)
    training = training[torch.randperm(len(training))[:TRAINING_VOXELS]]
    x, y = features.at(training), labels[tuple(training.T)].clamp(min=0)
    mean, std = x.mean(0), x.std(0).clamp(min=1e-6)
    probe = torch.nn.Linear(x.shape[1], len(ORGANS) + 1)
    optimizer = torch.optim.Adam(probe.parameters(), RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        cross_entropy(probe((x - mean) / std), y).backward()
        optimizer.step()
    found, true = [], labels[:, :, 1::2]
    with torch.no_grad():
        for plane in voxels[:, :, 1::2]:
            found.append(probe((features.at(plane.reshape(-1, 3)) - mean) / std).argmax(1).reshape(plane.shape[:-1]))
    found = torch.stack(found)
    for k, organ in enumerate(ORGANS, 1):
        dice = 2 * ((found == k) & (true == k)).sum() / ((found == k).sum() + (true == k).sum()).clamp(min=1)
        print(f"{args.backbone}, {args.stages}: {organ} {dice:.3f}", flush=True)


if __name__ == "__main__":
    main()
