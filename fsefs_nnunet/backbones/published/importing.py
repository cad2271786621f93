"""Turns a published checkpoint into a backbone: every tensor of the architecture matched, or nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fsefs_nnunet.backbones.architectures import build_architecture
from fsefs_nnunet.backbones.checkpoints import read_checkpoint
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.published.layouts import ARCHITECTURE_NAMES, PublishedContent, described, recognise
from fsefs_nnunet.backbones.state import require_finite
from fsefs_nnunet.backbones.store import check_id, save_backbone
from fsefs_nnunet.backbones.untrained_decoder import untrained_decoder
from fsefs_nnunet.backbones.zoo import SWIN_UNETR, ZOO, PublishedBackbone
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import sha256_of

DECODER_SEED = 12345


@dataclass(frozen=True)
class ReadCheckpoint:
    """A checkpoint as a backbone: its contract, all its tensors, and those of them that were in the file."""

    file: Path
    content: PublishedContent
    contract: BackboneContract
    tensors: dict[str, torch.Tensor]
    published: dict[str, torch.Tensor]


def import_published(backbone_id: str, file: Path, target: Path) -> BackboneContract:
    """Store the checkpoint `file` as backbone `backbone_id` in folder `target`, and print what was taken.

    Raises:
        InputError: as read_published does, and if the folder cannot be written.
    """
    return store_published(read_published(backbone_id, file), target)


def read_published(backbone_id: str, file: Path) -> ReadCheckpoint:
    """Match the checkpoint `file` with the backbone `backbone_id`.

    An id of the zoo says what the file must hold; under another id it is stored as what its content shows, without
    class names, which no such file carries.

    Raises:
        InputError: for a damaged, unsafe or unknown file, the known file of another backbone, another architecture,
            width or head than the id's, and unless the tensors are exactly those of the backbone.
    """
    check_id(backbone_id)
    file = Path(file)
    content = recognise(str(file), read_checkpoint(file))
    sha256 = sha256_of(file)
    _refuse_known_file_of_another(backbone_id, file, sha256)
    # a file of a known layout is assumed to have been trained like the public ones
    alike = next(known for known in ZOO.values() if known.kind == content.kind)
    entry = ZOO.get(backbone_id) or PublishedBackbone(
        backbone_id, alike.training, content.kind, content.features, encoder_only=content.encoder_only
    )
    _refuse_other_content(file, content, entry)
    if content.embedded_classes not in (None, len(entry.classes)):
        entry = replace(entry, classes=())  # trained on other classes than the published list
    contract = entry.contract({"file": file.name, "sha256": sha256, "left_out": _left_out(content, entry)})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(DECODER_SEED)  # the decoder added to an encoder is random, but the same for everyone
        backbone = build_architecture(contract, "last")
    own = backbone.backbone_state()
    published = own if not entry.encoder_only else {n: t for n, t in own.items() if n.startswith("network.swinViT.")}
    _refuse_partial(file, content, entry, published)
    require_finite(str(file), {name: content.tensors[name] for name in published})
    backbone.load_backbone_state({name: content.tensors.get(name, tensor) for name, tensor in own.items()})
    return ReadCheckpoint(file, content, contract, backbone.backbone_state(), published)


def store_published(checkpoint: ReadCheckpoint, target: Path) -> BackboneContract:
    """Write what was read into folder `target`, and print what was taken. Raises InputError if it cannot be written."""
    contract = save_backbone(checkpoint.contract, checkpoint.tensors, target)
    _report(replace(checkpoint, contract=contract))
    return contract


def _left_out(content: PublishedContent, entry: PublishedBackbone) -> dict[str, list[str]]:
    """Names of the tensors that the backbone does not take, by reason."""
    if content.rows and not entry.head:
        rows = sorted(name for name in content.tensors if name.startswith("head."))
        return {**content.left_out, "rows of a head whose classes the file does not name": rows}
    return content.left_out


def _refuse_known_file_of_another(backbone_id: str, file: Path, sha256: str) -> None:
    others = [entry.id for entry in ZOO.values() if entry.sha256 == sha256 and entry.id != backbone_id]
    if backbone_id in ZOO and others:
        raise InputError(f"{file} is the file of {others[0]}, according to its SHA-256: import it as {others[0]}.")


def _refuse_other_content(file: Path, content: PublishedContent, entry: PublishedBackbone) -> None:
    architecture = (content.kind, content.features, content.encoder_only)
    same_head = (
        entry.id not in ZOO
        or content.rows == (len(entry.classes) if entry.head else 0)
        # next to a head that is conditioned on text, rows of a linear one mean nothing, and are left out
        or (not entry.head and content.embedded_classes is not None)
    )
    if architecture == (entry.kind, entry.features, entry.encoder_only) and same_head:
        return
    ids = _ids_of_layout(content)
    wanted = described(entry.kind, entry.features, entry.head * len(entry.classes), entry.encoder_only)
    raise InputError(
        f"{file} holds {content}; {entry.id!r} is {wanted}: import it as "
        f"{' or '.join(ids) or 'a backbone of another name'}, or take the file of {entry.id!r}."
    )


def _ids_of_layout(content: PublishedContent) -> list[str]:
    """Public backbones whose files have the content's architecture, width and rows."""
    alike = [e for e in ZOO.values() if (e.kind, e.features) == (content.kind, content.features)]
    return [e.id for e in alike if e.encoder_only == content.encoder_only and e.head * len(e.classes) == content.rows]


def _refuse_partial(
    file: Path, content: PublishedContent, entry: PublishedBackbone, own: dict[str, torch.Tensor]
) -> None:
    name = ARCHITECTURE_NAMES[entry.kind]
    missing = sorted(own.keys() - content.tensors.keys())
    if missing:
        raise InputError(
            f"{file} lacks {len(missing)} of the {len(own)} tensors of a {name}, e.g. {missing[0]}: it is incomplete; "
            "take it from its publisher again."
        )
    unknown = sorted(name for name in content.tensors.keys() - own.keys() if not name.startswith("head."))
    wrong = [key for key in own if content.tensors[key].shape != own[key].shape]
    if unknown or wrong:
        odd = unknown[0] if unknown else f"{wrong[0]} of shape {tuple(content.tensors[wrong[0]].shape)}"
        raise InputError(
            f"{file} is a different {name} from the public ones: {len(unknown)} tensors are unknown and {len(wrong)} "
            f"have another shape, e.g. {odd}."
        )


def _report(checkpoint: ReadCheckpoint) -> None:
    contract, tensors = checkpoint.contract, checkpoint.published.values()
    print(
        f"{checkpoint.file}: {checkpoint.content}. All {len(tensors)} tensors of the backbone matched, "
        f"{sum(t.numel() for t in tensors)} numbers."
    )
    for why, names in contract.source["left_out"].items():
        print(f"Left out, {why}: {len(names)} ({names[0]}{', ...' if len(names) > 1 else ''}).")
    print(f"Classes: {', '.join(contract.classes) or 'unknown'}.")
    if contract.head_classes and not contract.linear_head:
        print("Its head is more than a 1^3 convolution: zero-shot prediction works, labels start from fresh weights.")
    if not contract.head_classes:
        print("No head: labels start from fresh weights, and there is no zero-shot prediction.")
    if contract.encoder_only:
        print(untrained_decoder(contract))
    known = ZOO.get(contract.id)
    if known is None and contract.architecture["kind"] == SWIN_UNETR:
        print(
            "Patch merging in the order of the public checkpoints: a network that you trained with a recent MONAI uses "
            "another one, and its features would be wrong here."
        )
    if known and known.sha256 != contract.source["sha256"]:
        _report_doubts(known, checkpoint.content)
    print(f"Licence: {contract.licence}\nCitation: {contract.citation}")


def _report_doubts(known: PublishedBackbone, content: PublishedContent) -> None:
    """Print what is uncertain about a file whose SHA-256 does not prove what it is."""
    if known.sha256:
        print(f"The file is not the known {known.file}: its SHA-256 differs.")
    others = [id for id in _ids_of_layout(content) if id != known.id]
    if others:
        print(
            f"Files of {' and '.join(others)} have the same layout: nothing in this one shows that it is the file of "
            f"{known.id}."
        )
