"""Whether two versions of this software train the same adapters: a small training of each method, bit by bit.

    python benchmarks/same_adapters.py --work /data/same --out before.json   # with one version installed
    python benchmarks/same_adapters.py --work /data/same --out after.json    # with the other
    python benchmarks/same_adapters.py --compare before.json after.json

Phantoms, one thread, fixed seeds. The raw dataset in WORK is written once and used by both, by a version that has this
script: run that one first where the other is older. Plans, features and trainings are made anew, by nnU-Net's functions
and our commands alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

DATASET = "Dataset903_FSEFTSame"
SUPPORT, QUERIES, EPOCHS = 2, 2, 4
BANK = ("FSEFTTrainer_LinearProbe", "FSEFTTrainer_Adapter", "FSEFTTrainer_AdapterIN", "FSEFTTrainer")
TRAINERS = (*BANK, "FSEFTTrainer_Context", "FSEFTTrainer_FTLast", "FSEFTTrainer_Decoder", "FSEFTTrainer_FT")
CONFIGURATION = "3d_fullres_2shot"
SHORT = {"fseft_steps_per_epoch": 2, "fseft_views": 4, "fseft_crop_size": [16, 16, 16], "fseft_prior_from_epoch": 2}


def prepare(work: Path) -> None:
    """Dataset, plans with short trainings, preprocessing."""
    raw = work / "nnUNet_raw" / DATASET
    if not (raw / "dataset.json").exists():
        from fsefs_nnunet.synthetic.datasets import write_demo_dataset

        write_demo_dataset(raw, SUPPORT + QUERIES)
    for folder in ("nnUNet_preprocessed", "nnUNet_results"):
        shutil.rmtree(work / folder, ignore_errors=True)
        (work / folder).mkdir(parents=True)
    command = Path(sys.executable).with_name("fseft")
    numbers = ("--shots", str(SUPPORT), "--num_queries", str(QUERIES))
    subprocess.run([command, "plan_and_preprocess", "-d", DATASET, *numbers, "-np", "1"], check=True)
    file = work / "nnUNet_preprocessed" / DATASET / "FSEFTPlans.json"
    plans = json.loads(file.read_text("utf-8"))
    for configuration in plans["configurations"].values():
        if "fseft_backbone" in configuration:
            configuration.update(SHORT)
    file.write_text(json.dumps(plans))


def train(trainer_name: str) -> dict[str, str]:
    """SHA-256 of each trained tensor, by name."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    configuration = f"{CONFIGURATION}_scratch" if trainer_name == "FSEFTTrainer_Scratch" else CONFIGURATION
    torch.manual_seed(0)  # stock nnU-Net draws its first weights from the global generator
    trainer = get_trainer_from_args(DATASET, configuration, 0, trainer_name, "FSEFTPlans", device=torch.device("cpu"))
    trainer.num_epochs = EPOCHS
    trainer.num_iterations_per_epoch = min(2, trainer.num_iterations_per_epoch)
    trainer.run_training()
    return {
        name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in trainer.network.state_dict().items()
    }


def compare(before: dict, after: dict) -> list[str]:
    """Methods whose weights differ, or that one of the two lacks."""
    return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--trainers", nargs="+", default=[*TRAINERS, "FSEFTTrainer_Scratch"])
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    args = parser.parse_args()
    if args.compare:
        before, after = (json.loads(file.read_text("utf-8")) for file in args.compare)
        different = compare(before, after)
        print(f"{len(before)} methods, different: {', '.join(different) or 'none'}.")
        sys.exit(bool(different))
    if not (args.work and args.out):
        parser.error("give --work and --out, or --compare")
    work = args.work.resolve()
    os.environ.update({name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")})
    os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1", nnUNet_compile="f", fseft_final_validation="0")
    prepare(work)
    shown = subprocess.run([Path(sys.executable).with_name("fseft"), "env"], check=True, capture_output=True, text=True)
    os.environ["nnUNet_extTrainer"] = shown.stdout.split("=", 1)[1].strip()
    import torch

    torch.set_num_threads(1)
    args.out.write_text(json.dumps({name: train(name) for name in args.trainers}, indent=1))


if __name__ == "__main__":
    main()
