"""FSEFTPretrainer on tiny volumes, end to end: the sources, zero-shot validation, starting weights, resuming, DDP."""

import csv
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from fsefs_nnunet.backbones.frozen import FrozenBackbone
from fsefs_nnunet.backbones.published.nnunet_models import import_nnunet_model
from fsefs_nnunet.backbones.store import find_backbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.trainers.pretrainer import FSEFTPretrainer
from fsefs_nnunet.trainers.source_validation import first_cases

LABELS = {"background": 0, "organs": [1, 2, 3], "spleen": 1, "stomach": 2, "kidney_left": 3}
SOURCES = {
    "A": {"classes": ["spleen"], "cases": ["case_0", "case_1", "case_6"]},
    "B": {"classes": ["stomach", "kidney_left"], "cases": ["case_2", "case_3", "case_4", "case_5", "case_7"]},
}
TRAIN, HELD_OUT = [f"case_{i}" for i in range(6)], ["case_6", "case_7"]
UNET = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 2,
        "strides": [[1, 1, 1], [2, 2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}


class Short(FSEFTPretrainer):
    """Two steps an epoch, zero-shot validation after each."""

    smallest_window = 16
    zero_shot_every = 1

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 1


@pytest.fixture
def assembly(workspace, monkeypatch):
    """The tiny dataset, preprocessed, as an assembly of two sources with stock plans for a small U-Net."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    content = {**workspace.dataset_json(), "labels": LABELS, "regions_class_order": [1, 1, 2, 3], "sources": SOURCES}
    for folder in (workspace.raw, workspace.preprocessed):
        (folder / "dataset.json").write_text(json.dumps(content))
    plans = json.loads((workspace.preprocessed / "FSEFTPlans.json").read_text())
    configuration = plans["configurations"]["3d_fullres"] | {"architecture": UNET, "batch_size": 2}
    configuration["patch_size"] = [24, 20, 22]
    plans |= {"plans_name": "Stock", "configurations": {"3d_fullres": configuration}}
    (workspace.preprocessed / "Stock.json").write_text(json.dumps(plans))
    (workspace.preprocessed / "splits_final.json").write_text(json.dumps([{"train": TRAIN, "val": HELD_OUT}]))
    return workspace


def make_trainer(assembly, epochs=2, fold=0):
    plans = json.loads((assembly.preprocessed / "Stock.json").read_text())
    dataset_json = json.loads((assembly.preprocessed / "dataset.json").read_text())
    np.random.seed(0)
    torch.manual_seed(0)
    trainer = Short({**plans, "continue_training": False}, "3d_fullres", fold, dataset_json, torch.device("cpu"))
    trainer.num_epochs = epochs
    return trainer


def zero_shot_rows(trainer) -> list[dict]:
    with open(f"{trainer.output_folder}/zero_shot.csv", newline="") as file:
        return list(csv.DictReader(file))


def log_of(trainer) -> str:
    with open(trainer.log_file) as file:
        return file.read()


@pytest.mark.slow
def test_pretraining(assembly, tmp_path, monkeypatch):
    """Training, its table of classes and sources, resuming, the summary's masks, and the result as a backbone."""
    trainer = make_trainer(assembly)
    trainer.run_training()
    rows = zero_shot_rows(trainer)
    assert [(r["epoch"], r["source"], r["class"], r["cases"]) for r in rows] == [
        ("1", "A", "spleen", "1"),
        ("1", "B", "stomach", "1"),
        ("1", "B", "kidney_left", "1"),
    ]
    assert "held-out cases, whole volumes" in log_of(trainer)

    again = make_trainer(assembly, epochs=3)
    again.initialize()
    again.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    again.run_training()
    assert again.current_epoch == 3
    assert [r["epoch"] for r in zero_shot_rows(again)] == ["1"] * 3 + ["2"] * 3

    again.perform_actual_validation()
    summary = json.loads(open(f"{trainer.output_folder}/validation/summary.json").read())
    annotated = {
        case["prediction_file"].split("/")[-1][:6]: {k for k, m in case["metrics"].items() if m["n_ref"] == m["n_ref"]}
        for case in summary["metric_per_case"]
    }
    assert annotated == {"case_6": {"1"}, "case_7": {"2", "3"}}

    import_nnunet_model("mine", os.path.dirname(trainer.output_folder), tmp_path / "backbones")
    monkeypatch.setenv("fseft_backbones", str(tmp_path / "backbones"))
    monkeypatch.setenv("fseft_start_from", "mine")
    warm = make_trainer(assembly, fold="all")
    warm.initialize()
    assert "mine: 14 of 14 tensors, 100.0% of the weights. Rows of the head: organs, spleen, stomach" in log_of(warm)
    state = again.network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in warm.network.state_dict().items())
    backbone = FrozenBackbone("mine", "last")
    assert torch.equal(backbone.head.weight, warm.network.decoder.seg_layers[-1].weight)


def test_zero_shot_dice_is_that_of_whole_volumes(assembly):
    """A network that gives the first class's true mask has Dice 1 there, and 2n / (n + N) for a class it paints all."""
    trainer = make_trainer(assembly)
    trainer.initialize()
    truth = {}
    for case in HELD_OUT:
        _, segmentation, *_ = trainer.dataset_class(trainer.preprocessed_dataset_folder, [case]).load_case(case)
        truth[case] = torch.from_numpy(segmentation[:][0])

    class Everything(torch.nn.Module):
        def forward(self, image):
            return torch.ones(image.shape[0], 4, *image.shape[2:])

    trainer.network = Everything()
    trainer.current_epoch = 7
    trainer.validate_zero_shot()
    dice = {(r["source"], r["class"]): float(r["Dice"]) for r in zero_shot_rows(trainer)}
    for case, source, name in (("case_6", "A", "spleen"), ("case_7", "B", "stomach"), ("case_7", "B", "kidney_left")):
        labels = truth[case]
        size = int((labels == LABELS[name]).sum())
        assert dice[source, name] == pytest.approx(2 * size / (size + labels.numel()), abs=1e-4)
    assert len(dice) == 3


def test_first_cases():
    assert first_cases(SOURCES, TRAIN, 2) == {"A": ["case_0", "case_1"], "B": ["case_2", "case_3"]}
    assert first_cases(SOURCES, ["case_7"], 2) == {"B": ["case_7"]}


def test_rows_measured_before_an_interruption_are_replaced(assembly, tmp_path):
    trainer = make_trainer(assembly)
    file = tmp_path / "zero_shot.csv"
    for epoch, dice in ((1, 0.1), (2, 0.2), (2, 0.3)):
        trainer.current_epoch = epoch
        trainer.add_rows(file, [{"epoch": epoch, "source": "A", "class": "spleen", "cases": 1, "Dice": dice}])
    with open(file, newline="") as f:
        assert [(row["epoch"], row["Dice"]) for row in csv.DictReader(f)] == [("1", "0.1"), ("2", "0.3")]


def test_another_architecture_is_no_start(assembly, monkeypatch):
    monkeypatch.setenv("fseft_start_from", "phantom")
    with pytest.raises(InputError, match=r"'phantom' covers 0 of the network's [\d,]+ weights: give the plans its"):
        make_trainer(assembly).initialize()


def test_the_head_starts_by_the_names_of_its_classes(assembly, monkeypatch):
    """The embedded backbone's architecture with other classes: all but the head is its, and the rows that it knows."""
    contract = find_backbone("phantom")
    plans = json.loads((assembly.preprocessed / "Stock.json").read_text())
    architecture = {key: value for key, value in contract.architecture.items() if key != "kind"}
    plans["configurations"]["3d_fullres"] |= {"architecture": architecture, "patch_size": [32, 32, 32]}
    (assembly.preprocessed / "Stock.json").write_text(json.dumps(plans))
    monkeypatch.setenv("fseft_start_from", "phantom")
    trainer = make_trainer(assembly)
    trainer.initialize()
    assert "100.0% of the weights. Rows of the head: spleen, kidney_left." in log_of(trainer)
    head, known = trainer.network.decoder.seg_layers[-1], FrozenBackbone("phantom", "last").head
    for row, name in ((1, "spleen"), (3, "kidney_left")):
        source = contract.head_classes.index(name)
        assert torch.equal(head.weight[row], known.weight[source]) and head.bias[row] == known.bias[source]
    assert not any(torch.equal(head.weight[2], row) for row in known.weight)


# nnU-Net puts DDP on GPUs; what the processes must agree on is the same on CPUs
RANK = """
import json, sys
import torch, torch.distributed as dist
from in_process import threads_for_workers
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as module
from test_pretraining import Short

class OnCPU(Short):
    device = property(lambda self: torch.device("cpu"), lambda self, value: None)

with threads_for_workers():
    dist.init_process_group("gloo")
    DDP = module.DDP
    module.DDP = lambda network, device_ids: DDP(network)
    plans, dataset = (json.loads(open(file).read()) for file in sys.argv[1:3])
    trainer = OnCPU({**plans, "continue_training": False}, "3d_fullres", 0, dataset)
    trainer.num_epochs = 100
    trainer.run_training()
    trainer.perform_actual_validation()
    sums = [float(p.double().sum()) for p in trainer.network.parameters()]
    print("RESULT", json.dumps([trainer.current_epoch, trainer.optimizer.param_groups[0]["lr"], sums]), flush=True)
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_train_one_network(assembly, tmp_path, monkeypatch):
    """DDP with a time budget: the same epochs, learning rate and weights in both; one table, one summary."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "fseft_train_minutes": "0.06",
        "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    files = [str(assembly.preprocessed / name) for name in ("Stock.json", "dataset.json")]
    ranks = [
        subprocess.Popen(
            [sys.executable, script, *files],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    results = [line for output in outputs for line in output.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2 and results[0] == results[1]
    epochs = json.loads(results[0].removeprefix("RESULT "))[0]
    fold = assembly.results / "OnCPU__Stock__3d_fullres" / "fold_0"
    table = fold / "zero_shot.csv"  # from the second epoch on: a slow machine's budget may end before
    rows = list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []
    assert [row["epoch"] for row in rows] == [str(e) for e in range(1, epochs) for _ in range(3)]
    assert {row["source"] for row in rows} == {"A", "B"} if epochs > 1 else not rows
    assert len(json.loads((fold / "validation" / "summary.json").read_text())["metric_per_case"]) == 2
