"""Training on nnU-Net's own patches of the support cases, with nnU-Net's loaders and augmentation."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from torch import nn

from fsefs_nnunet.cases.pile import pile_cases
from fsefs_nnunet.cases.preprocessed import require_finite, require_labels
from fsefs_nnunet.cases.splits import fold_seed
from fsefs_nnunet.device import reduced_precision
from fsefs_nnunet.labels import foreground_names
from fsefs_nnunet.methods.run_file import RunFile
from fsefs_nnunet.trainers.kshot_trainer import KShotTrainer
from fsefs_nnunet.trainers.time_budget import StopTraining, TimeBudgetTrainer

TRUE_SHARE, TRUE_CASES_ALONE = 0.3, 0.8  # see PatchTrainer.drawn_cases
LAST_EPOCHS, HARDLY_FOUND = 5, 0.05  # epochs of online validation; a class whose best Dice in them is lower is missed
GIVES_UP_AT = 1 / 3  # of the training, see PatchTrainer


def missed_classes(dice: Sequence[Sequence[float]], names: Sequence[str]) -> list[str]:
    """Names of the classes that the last epochs hardly found.

    dice: by epoch and class; NaN if no patch of the epoch showed the class.
    """
    last = np.array(dice[-LAST_EPOCHS:], float)
    return [n for n, of in zip(names, last.T) if np.isfinite(of).any() and np.nanmax(of) < HARDLY_FOUND]


class Float32Loss(nn.Module):
    """nnU-Net's loss in float32: under autocast on CPUs, unlike on CUDA, softmax returns bfloat16."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, output: torch.Tensor | list[torch.Tensor], target) -> torch.Tensor:
        """output: of the network, a list under deep supervision."""
        return self.loss([o.float() for o in output] if isinstance(output, (list, tuple)) else output.float(), target)


class PatchTrainer(KShotTrainer, TimeBudgetTrainer):
    """Trains for the method's epochs or for a time, see TimeBudgetTrainer.

    With the environment variable `fseft_gives_up` set to 1, which `fseft adapt` does, a training ends after a third if
    it has hardly found a class by then.

    The online validation, and with it checkpoint_best, looks at the support alone. Without worker processes
    (`nnUNet_n_proc_DA=0`) patches are a function of fold and epoch, so that `--c` continues as if nothing had happened;
    workers draw new ones.
    """

    def get_tr_and_val_datasets(self):
        cases = self.drawn_cases()
        return tuple(self.dataset_class(self.preprocessed_dataset_folder, list(cases)) for _ in range(2))

    def true_and_pile(self) -> tuple[list[str], list[str]]:
        """Support cases with true labels, and those of a student's pile, which a model has labelled."""
        support, labelled_by_model = self.do_split()[0], pile_cases(self.preprocessed_dataset_folder_base)
        true = [case for case in support if case not in labelled_by_model]
        return true, [case for case in support if case in labelled_by_model]

    @property
    def sees_pile(self) -> bool:
        true, pile = self.true_and_pile()
        return bool(pile) and not (true and self.progress() >= TRUE_CASES_ALONE)

    def drawn_cases(self) -> list[str]:
        """Support cases that patches are drawn from, as often as they are listed.

        True cases are repeated until they are TRUE_SHARE of a student's cases, and the last part of its training is
        theirs alone: a student must not learn the teacher's mistakes.
        """
        true, pile = self.true_and_pile()
        if not self.sees_pile or not true:
            return true or pile
        return true * max(1, round(len(pile) * TRUE_SHARE / (1 - TRUE_SHARE) / len(true))) + pile

    @property
    def seed(self) -> int:
        """Of the patches."""
        return 0

    def _build_loss(self):
        return Float32Loss(super()._build_loss())

    def divisor(self) -> Sequence[int]:
        """The factor by which the network's coarsest feature map is smaller than the patch, per axis."""
        return np.prod(self.configuration_manager.pool_op_kernel_sizes, axis=0).tolist()

    def train_step(self, batch: dict) -> dict:
        depth = batch["data"].shape[2] // self.divisor()[0]
        with reduced_precision(self.device, depth):  # as the steps from the feature bank
            return super().train_step(batch)

    def prepare_training(self) -> None:
        super().prepare_training()
        support, pile = self.run.support, self.run.pile
        self.refuse_broken_cases([*support, *pile])
        self.print_to_log_file(
            f"{len(support)} labelled support cases (all the labels that this training uses): {support}."
            + (f" {len(pile)} more were labelled by a model." if pile else "")
        )

    def describe_run(self) -> RunFile:
        run = super().describe_run()
        run.support, run.pile = self.true_and_pile()
        run.budget_seconds, run.budget_clock = self.budget_seconds(), self.budget_clock()
        return run

    def refuse_broken_cases(self, cases: list[str]) -> None:
        """One NaN turns all weights into NaN; nnU-Net's own preprocessing lets it pass."""
        folder = self.preprocessed_dataset_folder
        dataset = infer_dataset_class(folder)(folder, list(cases))

        def label_maps() -> Iterator[tuple[str, np.ndarray]]:  # one case in memory at a time
            for case in cases:
                image, segmentation = (part[:] for part in dataset.load_case(case)[:2])
                require_finite(image, [f"The preprocessed image of {case} in {folder}"] * len(image))
                yield case, segmentation

        require_labels(label_maps(), self.label_manager.ignore_label)

    def on_train_start(self):
        self.found: list[np.ndarray] = []  # Dice of the online validation by epoch, of this process
        super().on_train_start()
        self.draws_from_pile = self.sees_pile
        self.may_give_up = os.environ.get("fseft_gives_up") == "1" and self.progress() < GIVES_UP_AT

    def on_validation_epoch_end(self, val_outputs: list[dict]):
        super().on_validation_epoch_end(val_outputs)
        tp, fp, fn = (np.sum([output[f"{of}_hard"] for output in val_outputs], 0) for of in ("tp", "fp", "fn"))
        # nnU-Net's online Dice of a class that no patch shows is 0 if one voxel is taken for it
        self.found.append(np.where(tp + fn > 0, 2 * tp / np.maximum(2 * tp + fp + fn, 1), np.nan))

    def missed(self) -> list[str]:
        """Names of the classes that the last epochs hardly found."""
        names = foreground_names(self.dataset_json["labels"], self.label_manager.has_regions)
        return missed_classes(self.found, names)

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.may_give_up and self.progress() >= GIVES_UP_AT and len(self.found) >= LAST_EPOCHS:
            self.may_give_up = False
            if missed := self.missed():
                self.run.gave_up = True
                raise StopTraining(f"hardly found after a third of the training: {', '.join(missed)}")

    def on_train_end(self):
        if self.found:  # none for a training that was continued after its end
            self.run.missed = self.missed()
        if self.run.missed:
            self.print_to_log_file(
                f"WARNING: {', '.join(self.run.missed)}: hardly found at the end, even in patches of the support. "
                "Train longer, or with FSEFTTrainer_Context, which needs fewer steps.",
                also_print_to_console=True,
            )
        super().on_train_end()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        self.run.gave_up = False  # a training that did is continued
        if self.draws_from_pile and not self.sees_pile:
            self.draws_from_pile = False
            self.print_to_log_file("From here on, patches are drawn from the true cases alone.")
            self.close_loaders(self.dataloader_train, self.dataloader_val)
            self.dataloader_train, self.dataloader_val = self.get_dataloaders()
        self.seed_draws(self.current_epoch)

    def seed_draws(self, epoch: int) -> None:
        """nnU-Net's loaders draw from the global generators."""
        draws = np.random.default_rng((self.seed, fold_seed(self.fold), epoch))
        np.random.seed(draws.integers(2**32))
        torch.manual_seed(draws.integers(2**32))
        random.seed(int(draws.integers(2**32)))

    @staticmethod
    def close_loaders(*loaders: object) -> None:
        """End the workers of loaders that are no longer used, if they have any."""
        for loader in loaders:
            if isinstance(loader, (MultiThreadedAugmenter, NonDetMultiThreadedAugmenter)):
                loader._finish()
