"""What nnU-Net finds through the environment variable nnUNet_extTrainer: the installed package's own classes."""

from fsefs_nnunet.trainers.adapter import FSEFTTrainer_Adapter  # noqa: F401
from fsefs_nnunet.trainers.adapter_in import FSEFTTrainer_AdapterIN  # noqa: F401
from fsefs_nnunet.trainers.context_adapter import FSEFTTrainer_Context  # noqa: F401
from fsefs_nnunet.trainers.fine_tuning import (  # noqa: F401
    FSEFTTrainer_Decoder,
    FSEFTTrainer_FT,
    FSEFTTrainer_FTLast,
)
from fsefs_nnunet.trainers.fseft_trainer import FSEFTTrainer  # noqa: F401
from fsefs_nnunet.trainers.linear_probe import FSEFTTrainer_LinearProbe  # noqa: F401
from fsefs_nnunet.trainers.pretrainer import FSEFTPretrainer  # noqa: F401
from fsefs_nnunet.trainers.scratch import FSEFTTrainer_Scratch  # noqa: F401
