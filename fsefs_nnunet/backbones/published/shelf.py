"""What `fseft backbones` prints: which backbones are installed and intact, and which public ones are available."""

from __future__ import annotations

from collections.abc import Sequence

from fsefs_nnunet.backbones.architectures import stage_maps
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.store import find_backbone, known_backbones, load_weights, strays, weights_file
from fsefs_nnunet.backbones.zoo import ZOO, PublishedBackbone
from fsefs_nnunet.cases.readers import reorients
from fsefs_nnunet.errors import InputError
from fsefs_nnunet.files import gigabytes


def show_list() -> None:
    """Damaged backbones, and files that are not backbones, are listed among the others."""
    here = known_backbones()
    for name, file in here.items():
        try:
            contract = find_backbone(name)
        except InputError as error:
            print(f"{name}: {error}")
            continue
        print(
            f"{name}: {len(contract.classes)} classes, SHA-256 {contract.sha256[:12]}, {_size(name)}, {file.parent}; "
            f"{_rights(contract)}"
        )
    for entry in ZOO.values():
        if entry.id not in here:
            size = gigabytes(entry.size) if entry.size else "size unknown"
            print(
                f"{entry.id}: {len(entry.classes)} classes, not installed: {entry.how_to_get}, {size}; {_rights(entry)}"
            )
    _name_strays()


def show_info(backbone_id: str) -> None:
    """Raises InputError for an id that is neither here nor in the zoo."""
    if backbone_id not in known_backbones() and backbone_id in ZOO:
        entry = ZOO[backbone_id]
        print(f"{entry.id} is not installed: {entry.how_to_get}.\nFile: {entry.file}; {entry.link or entry.page}")
        _describe(entry.contract({}))
        return
    contract = find_backbone(backbone_id)
    print(f"{contract.id}: {weights_file(contract.id)}, {_size(contract.id)}\nSHA-256 {contract.sha256}")
    if contract.source:
        print(f"Imported from {contract.source['file']}, SHA-256 {contract.source['sha256']}")
    _describe(contract)


def verify(backbone_ids: Sequence[str]) -> None:
    """Check weights against their contracts; without ids, all of them. Raises InputError that names those that fail."""
    if not backbone_ids:
        _name_strays()
    failures = []
    for name in backbone_ids or known_backbones():
        try:
            load_weights(find_backbone(name))
            print(f"{name}: intact")
        except InputError as error:
            failures.append(str(error))
    if failures:
        raise InputError(" ".join(failures))


def _name_strays() -> None:
    for file in strays():
        print(f"{file} is skipped: it belongs to no backbone.")


def _describe(contract: BackboneContract) -> None:
    architecture, rows = contract.architecture, len(contract.head_classes)
    features = {stages: sum(m.channels for m in maps) for stages, maps in stage_maps(contract).items()}
    spacing = f"{list(contract.spacing)} mm" if contract.spacing else "of the dataset"
    turned = "images turned to RAS" if reorients(contract.image_reader_writer) else "images as stored"
    print(
        f"{contract.description or architecture['kind']}\n"
        f"Architecture {architecture['kind']}, features for an adapter {features}\n"
        f"Classes: {', '.join(contract.classes) or 'none'}\n"
        f"Head: {f'{rows} rows, zero-shot prediction works' if rows else 'none, labels start from fresh weights'}\n"
        f"Preprocessing: {turned}, axes {list(contract.transpose_forward)} of z, y, x, spacing {spacing}"
    )
    for channel, scheme in enumerate(contract.normalization_schemes or ()):
        text = contract.describe_normalization(channel, scheme, contract.use_mask_for_norm[channel])
        print(f"Channel {channel} {contract.channel_names[channel]}: {text}")
    print(
        f"Windows {list(contract.smallest_window)} to {list(contract.patch_size)}, multiples of "
        f"{list(contract.divisor)}"
    )
    print(f"Licence: {contract.licence or 'unknown'}\nCitation: {contract.citation or 'unknown'}")


def _rights(known: BackboneContract | PublishedBackbone) -> str:
    return f"licence {known.licence or 'unknown'}; {known.citation or 'citation unknown'}"


def _size(name: str) -> str:
    file = weights_file(name)
    return gigabytes(file.stat().st_size) if file.exists() else "weights missing"
