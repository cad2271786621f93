"""What the public backbones cost on a CPU, with random weights in the published layouts and one real CT.

    FSEFT_SHARED=FOLDER python benchmarks/published_backbones.py --work /data/published window volume step adapt

FOLDER/data/TotalSegmentator_example/s0000 is the CT with its masks. Of the four parts,
  window  times one window of Swin UNETR, with plain and fused attention, without and with the allocator's settings;
  volume  plans and preprocesses the CT for suprem_unet and fseft, and runs them over it;
  step    times one training step from the bank and one of the published recipe, and extrapolates a 5-shot adaptation;
  adapt   adapts suprem_unet and fseft to the 192 mm around the organs of the CT, with the same region, turned and
          noisy, as query: trains, predicts, exports.
`--quick` takes small windows and a piece of the CT: it shows that the parts work, its figures say nothing. Every
measurement runs in a process of its own and leaves a line of JSON in results.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time

import nibabel as nib
import numpy as np
import torch

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.store import find_backbone, save_backbone
from fsefs_nnunet.backbones.zoo import ZOO
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.nnunet.experiment import ALLOCATOR, Experiment

ORGANS = ("spleen", "kidney_right", "kidney_left", "liver", "stomach", "pancreas", "aorta", "gallbladder", "duodenum")
BACKBONES = ("suprem_unet", "fseft")
DATASET, REGION = "Dataset611_OneCT", "Dataset612_OneCTRegion"
REGION_VOXELS = 64  # of 3 mm, per axis
# published: one step a support volume and epoch, 200 epochs at most; ours: as FSEFTPlanner plans five shots
SHOTS, EPOCHS, STEPS_FROM_BANK, VIEWS = 5, 200, 800, 12
PATCHES = 6  # windows a step of the published recipe


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def random_backbone(backbone_id: str, folder: Path) -> None:
    """What importing the public file gives, with the values of a fresh network instead of trained ones."""
    torch.manual_seed(0)
    contract = ZOO[backbone_id].contract({})
    save_backbone(contract, build_architecture(contract, "last").backbone_state(), folder)


# ---- measurements: each runs in a process of its own and returns a dictionary ----


def time_window(backbone_id: str, size: int, fused: bool) -> dict:
    backbone = FrozenBackbone(backbone_id, "last")
    for module in backbone.module.modules():
        if hasattr(module, "use_flash_attention"):
            module.use_flash_attention = fused
    window = torch.rand((1, 1, size, size, size), generator=torch.Generator().manual_seed(0))
    wall, cpu, before = [], [], peak_gb()
    for _ in range(3):
        start = perf_counter(), process_time()
        (features,) = backbone(window)
        wall.append(perf_counter() - start[0]), cpu.append(process_time() - start[1])
    return {
        "seconds": min(wall),
        "cpu seconds": min(cpu),
        "peak GB before": before,  # PyTorch, MONAI and the weights
        "peak GB": peak_gb(),
        "mean": features.mean().item(),
        "std": features.std().item(),
        "checksum": features.double().abs().sum().item(),
    }


def time_volume(image_file: str, backbone_id: str) -> dict:
    """The preprocessed CT through the backbone, as the feature bank does it."""
    from fsefs_nnunet.features.tiling import Tiling
    from fsefs_nnunet.features.windows import run_windows

    backbone = FrozenBackbone(backbone_id, "last")
    image = torch.from_numpy(np.load(image_file))
    tiling = Tiling.of(image.shape[1:], backbone.contract.patch_size, backbone.maps)
    start = perf_counter(), process_time()
    slabs = [slab.maps[0].clone() for slab in run_windows(backbone, image, tiling, torch.device("cpu"))]
    features = torch.cat(slabs, 1)[(slice(None), *tiling.inside)]
    return {
        "seconds": perf_counter() - start[0],
        "cpu seconds": process_time() - start[1],
        "image shape": list(image.shape),
        "image range": [image.min().item(), image.max().item()],
        "features shape": list(features.shape),
        "features range": [features.min().item(), features.max().item()],
        "features std": features.std().item(),
        "stored GB in fp16": features.numel() * 2 / 1e9,
    }


def time_step(backbone_id: str, size: int, patches: int) -> dict:
    """One step of each recipe: spatial adapter on the published features, a head for one organ, soft Dice, AdamW."""
    from fsefs_nnunet.backbones.architectures import stage_maps
    from fsefs_nnunet.losses.soft_dice import SoftDiceLoss
    from fsefs_nnunet.methods.network import AdaptedNetwork

    contract = find_backbone(backbone_id)
    features, crop = stage_maps(contract)["last"][0].channels, min(32, size)
    network = AdaptedNetwork(1, 2, backbone_id, contract.sha256, "spatial", "last", features, seed=0)
    loss, optimizer = SoftDiceLoss(False), torch.optim.AdamW(network.parameters(), 1e-4)

    def step(forward, shape: tuple[int, ...], times: int) -> float:
        """CPU seconds; `times` inputs one after another, which costs what a batch does and takes less memory."""
        target = torch.zeros((shape[0], 1, *shape[2:]))
        target[..., : shape[-1] // 4] = 1
        start = process_time()
        optimizer.zero_grad()
        for _ in range(times):
            loss(forward(torch.rand(shape)), target).backward()
        optimizer.step()
        return process_time() - start

    return {
        "cpu seconds, published step": step(network, (1, 1, size, size, size), patches),
        "cpu seconds, step from the bank": min(
            step(network.adapt, (2, features, crop, crop, crop), 1) for _ in range(5)
        ),
    }


MEASUREMENTS = {"window": time_window, "volume": time_volume, "step": time_step}


class Benchmark:
    """The parts, with what they share in `work`."""

    def __init__(self, work: Path, source: Path, quick: bool):
        self.work, self.source, self.quick = work.resolve(), source, quick
        self.backbones = self.work / "backbones"
        self.experiment = Experiment(self.work, DATASET, "FSEFTPlans_suprem_unet")
        self.backbones_measured = BACKBONES[:1] if quick else BACKBONES
        self.work.mkdir(parents=True, exist_ok=True)
        for backbone_id in BACKBONES:
            if not (self.backbones / f"{backbone_id}.json").exists():
                random_backbone(backbone_id, self.backbones)

    def measure(self, kind: str, allocator: bool = True, **arguments) -> dict:
        """Run a measurement in a process of its own, print it, and add it to results.jsonl."""
        environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
        environment |= {"fseft_backbones": str(self.backbones), **(ALLOCATOR if allocator else {})}
        command = [sys.executable, __file__, "--measure", kind, json.dumps(arguments)]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8", check=True)
        return self.record(kind, {**arguments, "allocator": allocator, **json.loads(result.stdout.splitlines()[-1])})

    def record(self, part: str, values: dict) -> dict:
        line = {"part": part, "quick": self.quick, "threads": torch.get_num_threads(), **values}
        print(json.dumps(line), flush=True)
        with open(self.work / "results.jsonl", "a") as f:
            f.write(json.dumps(line) + "\n")
        return line

    # ---- the parts ----

    def window(self) -> None:
        size = 64 if self.quick else 96
        for fused, allocator in ((False, False), (True, False), (False, True), (True, True)):
            self.measure("window", allocator, backbone_id="fseft", size=size, fused=fused)
        self.measure("window", backbone_id="suprem_unet", size=size, fused=False)

    def volume(self) -> None:
        self.prepare(self.experiment, BACKBONES, 48 if self.quick else None)
        for backbone_id in self.backbones_measured:
            self.measure("volume", image_file=str(self.preprocessed_image(backbone_id)), backbone_id=backbone_id)

    def step(self) -> None:
        size, patches = (32, 1) if self.quick else (96, PATCHES)
        for backbone_id in self.backbones_measured:
            values = self.measure("step", backbone_id=backbone_id, size=size, patches=patches)
            window = self.measure("window", backbone_id=backbone_id, size=size, fused=True)["cpu seconds"]
            published = values["cpu seconds, published step"]
            banked = values["cpu seconds, step from the bank"]
            windows = self.windows_of_the_ct()
            self.record(
                "extrapolation",
                {
                    "backbone_id": backbone_id,
                    "shots": SHOTS,
                    "published steps": SHOTS * EPOCHS,
                    "published hours": SHOTS * EPOCHS * published / 3600,
                    "steps from the bank": STEPS_FROM_BANK,
                    "windows of a volume like the CT": windows,
                    "hours to fill the bank, no views": SHOTS * windows * window / 3600,
                    "hours to fill the bank": SHOTS * (windows + VIEWS) * window / 3600,
                    "hours to train from it": STEPS_FROM_BANK * banked / 3600,
                },
            )

    def adapt(self) -> None:
        for backbone_id in self.backbones_measured:
            region = Experiment(self.work, REGION, f"FSEFTPlans_{backbone_id}")
            self.prepare(region, (backbone_id,), 48 if self.quick else REGION_VOXELS)
            self.adapt_to(region, backbone_id)

    def adapt_to(self, region: Experiment, backbone_id: str) -> None:
        """One case is the support, the other one the query; what is timed is wall time of nnU-Net's commands."""
        plans = region.preprocessed / f"{region.plans}.json"
        content = json.loads(plans.read_text())
        # without views the first step is the zero-shot one plus fresh rows
        content["configurations"]["3d_fullres_1shot"]["fseft_views"] = 0
        plans.write_text(json.dumps(content))
        environment, trainer, configuration = self.environment(), "FSEFTTrainer", "3d_fullres_1shot"
        start = perf_counter()
        fold = region.train(trainer, configuration, **environment)
        trained = perf_counter() - start
        output = self.work / f"predictions_{backbone_id}"
        region.predict(trainer, configuration, region.raw / "imagesTr", output, **environment)
        predicted = perf_counter() - start - trained
        exported = self.work / f"model_{backbone_id}.zip"
        arguments = ("-d", REGION, "-c", configuration, "-tr", trainer, "-p", region.plans, "-f", "0")
        region.run("nnUNetv2_export_model_to_zip", *arguments, "-o", exported, **environment)
        summary = json.loads((fold / "validation" / "summary.json").read_text())
        self.record(
            "adapt",
            {
                "backbone_id": backbone_id,
                "seconds to train": trained,
                "seconds to predict two volumes": predicted,
                "checkpoint MB": (fold / "checkpoint_final.pth").stat().st_size / 1e6,
                "zip MB": exported.stat().st_size / 1e6,
                "Dice of the query, random backbone": summary["foreground_mean"]["Dice"],
                "peak GB of the training": RunFile.load(fold).peak_memory,
            },
        )

    # ---- the data ----

    def environment(self) -> dict[str, str]:
        return {"fseft_backbones": str(self.backbones)}

    def prepare(self, experiment: Experiment, backbones: tuple[str, ...], size: int | None) -> None:
        """The CT and its masks as nnU-Net dataset, planned and preprocessed for each backbone."""
        if not (experiment.raw / "dataset.json").exists():
            write_dataset(experiment.raw, self.source, size)
        for backbone_id in backbones:
            if not list(experiment.preprocessed.glob(f"FSEFTPlans_{backbone_id}_3d_fullres")):
                arguments = (
                    "-d",
                    experiment.dataset,
                    "-b",
                    backbone_id,
                    "-np",
                    "1",
                    "--shots",
                    "1",
                    "--num_queries",
                    "1",
                )
                start = perf_counter()
                experiment.run("fseft", "plan_and_preprocess", *arguments, **self.environment())
                self.record("preparation", {"backbone_id": backbone_id, "seconds": perf_counter() - start})

    def preprocessed_image(self, backbone_id: str) -> Path:
        from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

        folder = str(self.experiment.preprocessed / f"FSEFTPlans_{backbone_id}_3d_fullres")
        file = self.work / f"{backbone_id}.npy"
        np.save(file, infer_dataset_class(folder)(folder).load_case("ct")[0][:].astype(np.float32))
        return file

    def windows_of_the_ct(self) -> int:
        from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

        image = nib.load(self.source / "ct.nii.gz")
        shape = np.round(np.array(image.shape) * image.header.get_zooms() / 1.5).astype(int)
        steps = compute_steps_for_sliding_window(tuple(int(n) for n in np.maximum(shape, 96)), (96,) * 3, 0.5)
        return int(np.prod([len(axis) for axis in steps]))


def write_dataset(raw: Path, source: Path, size: int | None) -> None:
    """Case `ct`, and case `turned`: the same anatomy stored in another orientation, with noise.

    size: voxels per axis around the organs' centre, None for all.
    """
    image = nib.load(source / "ct.nii.gz")
    labels = np.zeros(image.shape, np.uint8)
    for number, name in enumerate(ORGANS, 1):
        labels[nib.load(source / "segmentations" / f"{name}.nii.gz").get_fdata() > 0] = number
    array = image.get_fdata()
    if size is not None:
        centre = np.argwhere(labels > 0).mean(0).astype(int)
        starts = np.clip(centre - size // 2, 0, np.array(image.shape) - size)
        box = tuple(slice(a, a + size) for a in starts)
        array, labels = array[box], labels[box]
    noisy = array + np.random.default_rng(0).normal(0, 20, array.shape)
    wanted = nib.orientations.axcodes2ornt("LPS" if nib.aff2axcodes(image.affine) != ("L", "P", "S") else "RAS")
    turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted)
    for folder in ("imagesTr", "labelsTr"):
        (raw / folder).mkdir(parents=True, exist_ok=True)
    for case, voxels in (("ct", array), ("turned", noisy)):
        for file, content in (
            (raw / "imagesTr" / f"{case}_0000.nii.gz", np.round(voxels).astype(np.int16)),
            (raw / "labelsTr" / f"{case}.nii.gz", labels),
        ):
            volume = nib.Nifti1Image(content, image.affine)
            nib.save(volume.as_reoriented(turn) if case == "turned" else volume, file)
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{name: i for i, name in enumerate(ORGANS, 1)}},
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(content))


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        result = MEASUREMENTS[sys.argv[2]](**json.loads(sys.argv[3]))
        print(json.dumps({"peak GB": peak_gb(), **result}))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("window", "volume", "step", "adapt")
    parser.add_argument("parts", nargs="*", choices=[*parts, []], default=list(parts))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if "FSEFT_SHARED" not in os.environ:
        sys.exit("Set FSEFT_SHARED to the folder with data/TotalSegmentator_example.")
    source = Path(os.environ["FSEFT_SHARED"]) / "data" / "TotalSegmentator_example" / "s0000"
    benchmark = Benchmark(args.work, source, args.quick)
    for part in args.parts:
        getattr(benchmark, part)()


if __name__ == "__main__":
    main()
