"""The workshop's adapter, with instance norm."""

from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer


class FSEFTTrainer_AdapterIN(FSEFTTrainer):
    """The residual block with instance norm and the head, without the size prior; recipe of v1."""

    adapter = "spatial_in"
    use_size_prior = False
    initial_lr_of_method = 1e-2
    weight_decay_of_method = 1e-5
