"""Turns a published checkpoint into a backbone: every tensor of the architecture matched, or nothing is stored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.decoder_tuning import untrained_decoder
from fsefs_nnunet.backbones.frozen import ARCHITECTURES
from fsefs_nnunet.backbones.published import ARCHITECTURE_NAMES, PublishedContent, recognise
from fsefs_nnunet.backbones.store import check_id, save_backbone, sha256_of
from fsefs_nnunet.backbones.zoo import SWIN_UNETR, ZOO, PublishedBackbone
from fsefs_nnunet.errors import InputError

DECODER_SEED = 12345


def import_published(backbone_id: str, file: Path, target: Path) -> BackboneContract:
    """Store the checkpoint `file` as backbone `backbone_id` in folder `target`, and print what was taken.

    An id of the zoo says what the file must hold; under another id it is stored as what its content shows, without
    class names, which no such file carries.

    Raises:
        InputError: for a damaged, unsafe or unknown file, another architecture, width or head than the id's, and for
            anything but all tensors of the backbone.
    """
    check_id(backbone_id)
    file = Path(file)
    content = recognise(str(file), read_checkpoint(file))
    entry = ZOO.get(backbone_id) or PublishedBackbone(
        backbone_id, content.kind, content.features, encoder_only=content.encoder_only
    )
    _refuse_other_content(file, content, entry)
    if content.embedded_classes not in (None, len(entry.classes)):
        entry = replace(entry, classes=())  # trained on other classes than the published list
    contract = entry.contract({"file": file.name, "sha256": sha256_of(file)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DECODER_SEED)  # an encoder's decoder is random, and the same for everyone
        backbone = ARCHITECTURES[entry.kind](contract, "last")
    own = backbone.backbone_state()
    published = own if not entry.encoder_only else {n: t for n, t in own.items() if n.startswith("network.swinViT.")}
    _refuse_partial(file, content, entry, published)
    backbone.load_backbone_state({name: content.tensors.get(name, tensor) for name, tensor in own.items()})
    contract = save_backbone(contract, backbone.backbone_state(), target)
    _report(file, contract, content, published)
    return contract


def _refuse_other_content(file: Path, content: PublishedContent, entry: PublishedBackbone) -> None:
    architecture = (content.kind, content.features, content.encoder_only)
    same_head = (
        entry.id not in ZOO
        or content.rows == (len(entry.classes) if entry.head else 0)
        # beside a head that is conditioned on text, rows of a linear one mean nothing, and are left out
        or (not entry.head and content.embedded_classes is not None)
    )
    if architecture == (entry.kind, entry.features, entry.encoder_only) and same_head:
        return
    alike = [e for e in ZOO.values() if (e.kind, e.features) == (content.kind, content.features)]
    ids = [e.id for e in alike if e.encoder_only == content.encoder_only and e.head * len(e.classes) == content.rows]
    head = f", {len(entry.classes)} rows of a linear head" if entry.head else ""
    part = "the encoder alone of a " if entry.encoder_only else "a "
    raise InputError(
        f"{file} holds {content}; {entry.id!r} is {part}{ARCHITECTURE_NAMES[entry.kind]}, {entry.features} features"
        f"{head}: import it as {' or '.join(ids) or 'a backbone of another name'}, or take the file of {entry.id!r}."
    )


def _refuse_partial(
    file: Path, content: PublishedContent, entry: PublishedBackbone, own: dict[str, torch.Tensor]
) -> None:
    name = ARCHITECTURE_NAMES[entry.kind]
    missing = sorted(own.keys() - content.tensors.keys())
    if missing:
        raise InputError(
            f"{file} lacks {len(missing)} of the {len(own)} tensors of a {name}, e.g. {missing[0]}: it is incomplete, "
            "take it from its publisher again."
        )
    unknown = sorted(content.tensors.keys() - own.keys() - {"head.weight", "head.bias"})
    wrong = [key for key in own if content.tensors[key].shape != own[key].shape]
    if unknown or wrong:
        odd = unknown[0] if unknown else f"{wrong[0]} of shape {tuple(content.tensors[wrong[0]].shape)}"
        raise InputError(
            f"{file} is another {name} than the public ones: {len(unknown)} tensors are unknown and {len(wrong)} have "
            f"another shape, e.g. {odd}."
        )
    broken = [key for key in own if not torch.isfinite(content.tensors[key]).all()]
    if broken:
        raise InputError(f"{file} holds NaN or infinite weights, e.g. {broken[0]}: take it from its publisher again.")


def _report(file: Path, contract: BackboneContract, content: PublishedContent, own: dict[str, torch.Tensor]) -> None:
    print(
        f"{file}: {content}. All {len(own)} tensors of the backbone matched, {sum(t.numel() for t in own.values())} "
        "numbers."
    )
    left_out = dict(content.left_out)
    if content.rows and not contract.head_classes:
        left_out["rows of a head whose classes the file does not name"] = ["head.weight", "head.bias"]
    for why, names in left_out.items():
        print(f"Left out, {why}: {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''}).")
    print(f"Classes: {', '.join(contract.classes) or 'unknown'}.")
    if not contract.head_classes:
        print("No row of a linear head: labels start fresh, and there is no zero-shot prediction.")
    if contract.encoder_only:
        print(untrained_decoder(contract))
    known = ZOO.get(contract.id)
    if known is None and contract.architecture["kind"] == SWIN_UNETR:
        print(
            "Patch merging in the order of the public checkpoints: a network that you trained with a recent MONAI has "
            "another one, and its features would be wrong here."
        )
    if known and known.sha256 not in ("", contract.source["sha256"]):
        print(f"The file is not the known {known.file}: its SHA-256 differs.")
    print(f"Licence: {contract.licence}\nCitation: {contract.citation}")
