"""Starting a pretraining from the weights of a backbone."""

from __future__ import annotations

import torch
from torch import nn

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.store import find_backbone, load_weights
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.labels import match_labels

HEAD = "decoder.seg_layers."


@torch.no_grad()
def start_from(network: nn.Module, backbone_id: str, classes: list[str]) -> str:
    """Copy the weights of a backbone into one of nnU-Net's U-Nets, tensor by tensor, where name and shape are the same.

    Rows of the last head are copied by the names of their classes.

    Args:
        network: with the parameter names of PlainConvUNet or ResidualEncoderUNet.
        classes: of the head's rows.

    Returns:
        what was covered, in a sentence.

    Raises:
        InputError: for an unknown backbone, damaged weights, and where less than half of the numbers fit.
    """
    contract = find_backbone(backbone_id)
    weights = load_weights(contract)
    own = {name: tensor for name, tensor in network.named_parameters() if not name.startswith(HEAD)}
    fitting = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
    copied, total = (sum(own[name].numel() for name in names) for names in (fitting, own))
    if 2 * copied < total:
        raise InputError(
            f"Backbone {backbone_id!r} covers {copied:,} of the network's {total:,} weights: give the plans its "
            f"architecture, {contract.architecture.get('arch_kwargs', contract.architecture)}."
        )
    for name in fitting:
        own[name].copy_(weights[name])
    rows = _copy_head(network, weights, contract, classes)
    random = [name for name in own if name not in fitting]
    rest = f"; random: {', '.join(random[:3])}{' ...' if len(random) > 3 else ''}" if random else ""
    return (
        f"Training starts from backbone {backbone_id}: {len(fitting)} of {len(own)} tensors, {copied / total:.1%} of "
        f"the weights{rest}. Rows of the head: {', '.join(rows) or 'none'}."
    )


def _copy_head(
    network: nn.Module, weights: dict[str, torch.Tensor], contract: BackboneContract, classes: list[str]
) -> list[str]:
    """Returns the classes whose rows were copied."""
    head = network.decoder.seg_layers[-1]
    last = f"{HEAD}{len(network.decoder.seg_layers) - 1}"
    known = weights.get(f"{last}.weight")
    # rows that compete mean something different from sigmoids
    if contract.softmax or known is None or known.shape[1:] != head.weight.shape[1:]:
        return []
    matches = match_labels(classes, contract.head_classes)
    for name, there in matches.items():
        row, source = classes.index(name), contract.head_classes.index(there)
        head.weight[row] = known[source]
        head.bias[row] = weights[f"{last}.bias"][source]
    return list(matches)
