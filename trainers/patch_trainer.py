"""Training on nnU-Net's own patches of the support cases, with nnU-Net's loaders and augmentation."""

from __future__ import annotations

import random

import numpy as np
import torch

from fsefs_nnunet.trainers.kshot_trainer import KShotTrainer
from fsefs_nnunet.trainers.time_budget import TimeBudgetTrainer


class PatchTrainer(KShotTrainer, TimeBudgetTrainer):
    """Trains for the method's epochs, or for `fseft_train_minutes` (environment variable).

    The online validation, and with it checkpoint_best, looks at the support alone. Without worker processes
    (`nnUNet_n_proc_DA=0`) patches are a function of fold and epoch, so that `--c` continues as if nothing had happened;
    workers draw theirs anew.
    """

    def get_tr_and_val_datasets(self):
        support = self.do_split()[0]
        return tuple(self.dataset_class(self.preprocessed_dataset_folder, list(support)) for _ in range(2))

    def on_train_start(self):
        support = self.do_split()[0]
        self.print_to_log_file(
            f"{len(support)} labelled support cases (all the labels that this training uses): {support}."
        )
        super().on_train_start()

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        # nnU-Net's loaders draw from the global generators
        fold = 2**16 if self.fold == "all" else self.fold
        draws = np.random.default_rng((self.settings.get("fseft_seed", 0), fold, self.current_epoch))
        np.random.seed(draws.integers(2**32))
        torch.manual_seed(draws.integers(2**32))
        random.seed(int(draws.integers(2**32)))
