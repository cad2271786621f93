"""The head alone."""

from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer


class FSEFTTrainer_LinearProbe(FSEFTTrainer):
    """The head alone, on all of the backbone's features."""

    adapter = "linear_probe"
    use_size_prior = False
    initial_lr_of_method = 1e-2
