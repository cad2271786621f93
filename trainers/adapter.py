"""The paper's adapter alone."""

from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer


class FSEFTTrainer_Adapter(FSEFTTrainer):
    """Spatial adapter and head without the size prior."""

    use_size_prior = False
