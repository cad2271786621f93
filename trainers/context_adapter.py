"""An adapter with more context than the paper's."""

from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer


class FSEFTTrainer_Context(FSEFTTrainer):
    """Context adapter and head with the size prior, trained with channels of the features left out."""

    adapter = "context"
    channel_dropout = 0.1
