"""Ensembles of seeds on one support, beside single models: Dice of labelled queries.

    FSEFT_SHARED=FOLDER python benchmarks/seeds.py --work /data/equal_time --data hippocampus --shots 5 --seeds 3

Each seed is a configuration of its own, `3d_fullres_<K>shot_seed<N>`, which differs in views, crops and first weights;
`nnUNetv2_ensemble` takes the mean of their probabilities. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from statistics import mean

from equal_time import dice_of, prepare, query_images
from real_data import REAL

from fsefs_nnunet.files import read_json, write_atomically
from fsefs_nnunet.methods.registry import METHODS, configuration_of
from fsefs_nnunet.nnunet.experiment import Experiment


def add_seeds(experiment: Experiment, shots: int, seeds: int) -> list[str]:
    file = experiment.preprocessed / f"{experiment.plans}.json"
    plans, base = read_json(file), configuration_of(shots)
    architecture = plans["configurations"][base]["architecture"]
    names = [configuration_of(shots, f"_seed{seed}") for seed in range(1, seeds + 1)]
    for seed, name in enumerate(names, 1):
        kwargs = {**architecture["arch_kwargs"], "seed": seed}
        seeded = {"fseft_seed": seed, "architecture": {**architecture, "arch_kwargs": kwargs}}
        plans["configurations"][name] = {"inherits_from": base, **seeded}
    write_atomically(file, json.dumps(plans, indent=4))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", choices=REAL, required=True)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--fold", type=int, default=0, help="draw of the support")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", choices=METHODS, default="context")
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)))
    args = parser.parse_args()
    os.sched_setaffinity(0, {args.core})
    experiment, trainer = prepare(args.work.resolve(), args.data), METHODS[args.method].trainer
    images = query_images(experiment)
    folders = []
    for name in add_seeds(experiment, args.shots, args.seeds):
        folder = experiment.train(trainer, name, args.fold, fseft_final_validation="0") / "probabilities"
        model = ("-d", experiment.dataset, "-c", name, "-tr", trainer, "-p", experiment.plans, "-f", str(args.fold))
        what = ("-i", images, "-o", folder, "--save_probabilities", "--continue_prediction")
        experiment.run("nnUNetv2_predict", *what, *model, "-device", experiment.device, "-npp", "2", "-nps", "2")
        folders.append(folder)
    together = experiment.work / f"ensemble_{args.method}_{args.shots}shot_fold{args.fold}"
    experiment.run("nnUNetv2_ensemble", "-i", *folders, "-o", together, "-np", "2")
    single = [dice_of(folder, experiment)["mean"] for folder in folders]
    print(f"single models {', '.join(f'{dice:.4f}' for dice in single)}, mean {mean(single):.4f}")
    print(f"ensemble of {args.seeds} {dice_of(together, experiment)['mean']:.4f}")


if __name__ == "__main__":
    main()
