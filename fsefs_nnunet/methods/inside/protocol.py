"""What a method inside the backbone has to offer."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Inside(Protocol):
    """A method inside the backbone: a dataclass whose fields are its options, each with a default.

    The plans' `arch_kwargs` may hold other values under "options", by the method's name in the registry.

    trains_decoder: whether it serves a backbone whose decoder was never trained; a class without it does not.
    """

    trains_decoder: bool = False

    def prepare(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """Add what is to be added to a frozen backbone, in place, and return what is trained.

        Layers that are added start as the identity, so that step 0 is the backbone's own prediction.

        Returns:
            The trained parameters, none of them the head's, by the names that checkpoints give them; empty if the
            backbone has nothing to train.
        """
