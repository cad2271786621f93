"""Makes the embedded backbone `phantom` again: assembly -> plans -> preprocessing -> FSEFTPretrainer -> safetensors.

    python benchmarks/pretrain_phantom.py --work /data/phantom --minutes 120

Needs nothing but this package. Stages that are done are not done again; training resumes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

DATASET = "Dataset900_PhantomAssembly"
PLANS = "FSEFTPretrainingPlans"
FEATURES = [16, 32, 64, 128]


def environment(work: Path, minutes: float) -> dict[str, str]:
    folders = {f"nnUNet_{name}": str(work / name) for name in ("raw", "preprocessed", "results")}
    import fsefs_nnunet

    shims = Path(fsefs_nnunet.__file__).parent / "shims"
    # glibc returns the large activations to the system and fetches them again at every step, unless told to keep them
    # and oneDNN builds its kernels anew for windows whose shape fell out of its cache
    keep = {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16384",
        "MALLOC_TRIM_THRESHOLD_": str(2**32),
        "MALLOC_MMAP_THRESHOLD_": str(2**32),
        "MALLOC_TOP_PAD_": str(2**28),
    }
    return {
        **os.environ,
        **keep,
        **folders,
        "nnUNet_extTrainer": str(shims),
        "nnUNet_n_proc_DA": "1",
        "fseft_train_minutes": str(minutes),
    }


def write_plans(cases: int, held_out: int, size: int) -> None:
    """Stock nnU-Net plans with the small architecture, the CT window and the whole volume as patch."""
    from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, preprocess
    from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw

    from fsefs_nnunet.synthetic.datasets import HELD_OUT
    from fsefs_nnunet.synthetic.phantom import HU_WINDOW

    extract_fingerprints([900], num_processes=2)
    plans = ExperimentPlanner(900, plans_name=PLANS).plan_experiment()
    low, high = HU_WINDOW
    plans["foreground_intensity_properties_per_channel"]["0"].update(
        percentile_00_5=low, percentile_99_5=high, mean=low, std=high - low
    )
    plans["image_reader_writer"] = "NibabelIOWithReorient"
    plans["transpose_forward"] = plans["transpose_backward"] = [2, 1, 0]
    configuration = plans["configurations"]["3d_fullres"]
    stages = len(FEATURES)
    configuration.update(batch_size=2, patch_size=[size] * 3, normalization_schemes=["CTNormalization"])
    configuration["architecture"]["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=FEATURES,
        kernel_sizes=[[3] * 3] * stages,
        strides=[[1] * 3] + [[2] * 3] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    plans["configurations"] = {"3d_fullres": configuration}
    folder = Path(nnUNet_preprocessed) / DATASET
    save_json(plans, str(folder / f"{PLANS}.json"), sort_keys=False)
    sources = load_json(str(Path(nnUNet_raw) / DATASET / "dataset.json"))["sources"]
    train = [case for name, source in sources.items() if name != HELD_OUT for case in source["cases"]]
    save_json([{"train": train, "val": sources[HELD_OUT]["cases"]}], str(folder / "splits_final.json"))
    preprocess([900], PLANS, ("3d_fullres",), [2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and results (about 3 GB)")
    parser.add_argument("--minutes", type=float, default=120, help="training time")
    parser.add_argument("--cases", type=int, default=1600, help="training phantoms")
    parser.add_argument("--held_out", type=int, default=32, help="phantoms of the final validation")
    parser.add_argument("--size", type=int, default=64, help="voxels per axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-device", default="cpu", help="as nnUNetv2_train")
    args = parser.parse_args()
    env = environment(args.work.resolve(), args.minutes)
    os.environ.update(env)

    from fsefs_nnunet.synthetic.datasets import write_pretraining_assembly

    raw = Path(env["nnUNet_raw"]) / DATASET
    if not (raw / "dataset.json").exists():
        write_pretraining_assembly(raw, args.cases, args.held_out, args.seed, size=args.size)
    preprocessed = Path(env["nnUNet_preprocessed"]) / DATASET / "nnUNetPlans_3d_fullres"
    done = len(list(preprocessed.parent.glob("*/*.pkl")))
    if done < args.cases + args.held_out:
        write_plans(args.cases, args.held_out, args.size)
    train = Path(sys.executable).parent / "nnUNetv2_train"
    trained = Path(env["nnUNet_results"]) / DATASET / f"FSEFTPretrainer__{PLANS}__3d_fullres" / "fold_0"
    resume = ["--c"] if any((trained / f"checkpoint_{name}.pth").exists() for name in ("latest", "final")) else []
    command = ["900", "3d_fullres", "0", "-tr", "FSEFTPretrainer", "-p", PLANS, "-device", args.device, *resume]
    subprocess.run([train, *command], env=env, check=True)
    store(trained, args)


def store(trained: Path, args: argparse.Namespace) -> None:
    """Convert the training's result, with what it was made of and how well it does."""
    import json

    from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model

    summary = json.loads((trained / "validation" / "summary.json").read_text())
    labels = json.loads((trained.parent / "dataset.json").read_text())["labels"]
    names = [name for name in labels if name != "background"]
    keys = [str(tuple(labels[name])) if isinstance(labels[name], list) else str(labels[name]) for name in names]
    dice = {name: round(summary["mean"][key]["Dice"], 3) for name, key in zip(names, keys)}
    contract = import_nnunet_model(
        "phantom",
        trained.parent,
        args.work / "backbones",
        open_spacing=True,
        licence="Apache-2.0",
        citation="fsefs_nnunet",
        description="Synthetic abdominal CT and random contrasts; partially labelled sources, Eq. (1) of FSEFT.",
        training={
            "command": f"python benchmarks/pretrain_phantom.py --minutes {args.minutes:g} --cases {args.cases} "
            f"--held_out {args.held_out} --size {args.size} --seed {args.seed}",
            "held_out_dice": dice,
            "held_out_mean_dice": round(summary["foreground_mean"]["Dice"], 3),
        },
    )
    add_drifted_dice(contract, args)
    print(f"{args.work / 'backbones'}: {contract.id}, mean Dice {contract.training['held_out_mean_dice']}")


def add_drifted_dice(contract, args: argparse.Namespace) -> None:
    """Put the Dice on CT-like phantoms of a scanner outside of the training's drift into the card."""
    import numpy as np
    import torch

    from fsefs_nnunet.backbones.frozen import FrozenBackbone
    from fsefs_nnunet.backbones.store import save_backbone
    from fsefs_nnunet.synthetic.datasets import DEMO_DRIFT, TEMPLATE
    from fsefs_nnunet.synthetic.phantom import HU_WINDOW, make_phantom, pretraining_config

    os.environ["fseft_backbones"] = str(args.work / "backbones")
    backbone = FrozenBackbone(contract.id, "last")
    low, high = HU_WINDOW
    dice = []
    for i in range(args.held_out):
        seed = (args.seed, args.cases + args.held_out + i)  # the next ones after the held-out phantoms
        config = replace(pretraining_config(seed, (args.size,) * 3), drift=DEMO_DRIFT, appearance="ct")
        phantom = make_phantom(seed, config)
        image = torch.from_numpy((np.clip(phantom.image, low, high) - low) / (high - low))[None, None]
        with torch.no_grad():
            predicted = (backbone.head(backbone(image)[0])[0] > 0).numpy()
        organs = [np.isin(phantom.labels, values) for values in TEMPLATE.values()]
        dice.append([2 * (p & t).sum() / (p.sum() + t.sum()) if t.any() else np.nan for p, t in zip(predicted, organs)])
    means = {name: round(float(mean), 3) for name, mean in zip(TEMPLATE, np.nanmean(dice, 0))}
    drifted = {"drift": DEMO_DRIFT, "dice": means, "mean_dice": round(float(np.mean(list(means.values()))), 3)}
    card = replace(contract, training={**contract.training, "outside_the_training_ranges": drifted})
    save_backbone(card, backbone.module.backbone_state(), args.work / "backbones")


if __name__ == "__main__":
    main()
