"""What a published checkpoint holds, found out by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from fsefs_nnunet.backbones.zoo import SWIN_UNETR, UNET
from fsefs_nnunet.errors import InputError

ARCHITECTURE_NAMES = {SWIN_UNETR: "Swin UNETR", UNET: "3D U-Net of SuPreM"}

# Published names, whatever wrappers put before them -> names in SwinUNETRBackbone and SuPreMUNetBackbone.
_START = r"^(?:.*\.)?"
_RULES = {
    SWIN_UNETR: [
        (_START + r"(patch_embed\.proj\..*|layers\d\.0\.(?:blocks|downsample)\..*)", r"network.swinViT.\1"),
        (_START + r"((?:encoder|decoder)\d+\..*)", r"network.\1"),
        (_START + r"(?:classifier|out\.conv\.conv)\.(weight|bias)", r"head.\1"),
    ],
    UNET: [
        *((_START + rf"down_tr{64 * 2**s}\.ops\.(.*)", rf"encoder.{s}.\1") for s in range(4)),
        *((_START + rf"up_tr{256 // 2**s}\.ops\.(.*)", rf"decoder.{s}.\1") for s in range(3)),
        *((_START + rf"up_tr{256 // 2**s}\.up_conv\.(.*)", rf"upsample.{s}.\1") for s in range(3)),
    ],
}
_SPELLINGS = {SWIN_UNETR: [(".mlp.fc", ".mlp.linear")], UNET: [(".conv1.", ".conv."), (".bn1.", ".norm.")]}

# Tensors that are no part of the backbone: by the last part of their names, and by others.
_UNUSED = {
    "relative_position_index": "constants that are computed anew",
    "running_mean": "running statistics, which the network never uses",
    "running_var": "running statistics, which the network never uses",
    "num_batches_tracked": "running statistics, which the network never uses",
    "organ_embedding": "the head that is conditioned on text",
}
_HEADS = {
    r"(^|\.)(controller|precls_conv|GAP|text_to_vision)\.": "the head that is conditioned on text",
    r"(^|\.)(norm|rotation_head|contrastive_head|convTrans3d)\.": "heads of the self-supervised tasks",
}
_DEPTH = 4  # of wrappers around a state_dict
_OTHER = "not part of the backbone"
# a tensor here that no rule knows belongs to another architecture
_BACKBONE_PARTS = r"(^|\.)(swin_?vit|patch_embed|layers\d\w*|encoder\d+|decoder\d+|down_tr\d+|up_tr\d+)\."


@dataclass(frozen=True)
class PublishedContent:
    """Tensors of a checkpoint by the names of the backbone of `kind`; why others were left out.

    embedded_classes: how many classes a head that is conditioned on text knows, None without one.
    """

    kind: str
    tensors: dict[str, torch.Tensor]
    left_out: dict[str, list[str]] = field(default_factory=dict)
    embedded_classes: int | None = None

    @property
    def features(self) -> int:
        last = "network.swinViT.patch_embed.proj.weight" if self.kind == SWIN_UNETR else "decoder.2.1.conv.weight"
        return self.tensors[last].shape[0] if last in self.tensors else 0

    @property
    def rows(self) -> int:
        """Classes of the linear head, 0 without one."""
        return self.tensors["head.weight"].shape[0] if "head.weight" in self.tensors else 0

    @property
    def encoder_only(self) -> bool:
        return self.kind == SWIN_UNETR and not any(name.startswith("network.decoder") for name in self.tensors)

    def __str__(self) -> str:
        part = "the encoder alone of a " if self.encoder_only else "a "
        head = f", {self.rows} rows of a linear head" if self.rows else ""
        return f"{part}{ARCHITECTURE_NAMES[self.kind]}, {self.features} features{head}"


def recognise(file: str, content: object) -> PublishedContent:
    """Unwrap what `read_checkpoint` gave and rename its tensors.

    Raises:
        InputError: if it holds no known architecture, a part that the architecture does not have, a tensor twice, or
            two networks.
    """
    state_dicts = _state_dicts(content)
    found = [(key, _renamed(file, kind, tensors)) for key, tensors in state_dicts.items() for kind in _RULES]
    best_key, best = max(found, key=lambda item: len(item[1].tensors), default=("", None))
    if best is None or not best.tensors:
        names = ", ".join(ARCHITECTURE_NAMES.values())
        raise InputError(
            f"{file} holds none of the known architectures ({names}): give a checkpoint of a public backbone, or the "
            "folder of a nnU-Net model."
        )
    # a teacher and its student, for example: their order in the file says nothing
    rivals = [
        key
        for key, other in found
        if key != best_key and (other.features or other.tensors.keys() & best.tensors.keys())
    ]
    if rivals:
        raise InputError(
            f"{file} holds two networks, under {best_key!r} and {rivals[0]!r}: save the state_dict of one alone."
        )
    if not best.features:
        raise InputError(f"{file} holds {best} without its first or last layer: it is incomplete, get it again.")
    strangers = [name for name in best.left_out.get(_OTHER, []) if re.search(_BACKBONE_PARTS, name, re.IGNORECASE)]
    if strangers:
        raise InputError(
            f"{file} is no plain {ARCHITECTURE_NAMES[best.kind]}: it has {len(strangers)} more tensors inside, e.g. "
            f"{strangers[0]}; this variant is not supported."
        )
    return best


def _state_dicts(content: object, path: tuple[str, ...] = ()) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by name, of a file that is a state_dict or holds it under any keys, by these, joined with dots."""
    if not isinstance(content, dict) or len(path) > _DEPTH:
        return {}
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, torch.Tensor)}
    found = {".".join(path): named} if named else {}
    for key, value in content.items():
        found |= _state_dicts(value, (*path, str(key)))
    return found


def _renamed(file: str, kind: str, tensors: dict[str, torch.Tensor]) -> PublishedContent:
    published: dict[str, str] = {}
    left_out: dict[str, list[str]] = {}
    for name in tensors:
        own = _own_name(kind, name)
        if own is None:
            left_out.setdefault(_why_left_out(name), []).append(name)
        elif own in published:
            raise InputError(
                f"{file} holds two networks: {published[own]} and {name} are the same tensor of each; save one alone."
            )
        else:
            published[own] = name
    embeddings = (tensor.shape[0] for name, tensor in tensors.items() if _last(name) == "organ_embedding")
    return PublishedContent(
        kind, {own: tensors[name] for own, name in published.items()}, left_out, next(embeddings, None)
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _own_name(kind: str, name: str) -> str | None:
    if _last(name) in _UNUSED:
        return None
    for pattern, replacement in _RULES[kind]:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, replacement, name)
            for theirs, ours in _SPELLINGS[kind]:
                name = name.replace(theirs, ours)
            return name
    return None


def _why_left_out(name: str) -> str:
    heads = (why for pattern, why in _HEADS.items() if re.search(pattern, name))
    return _UNUSED.get(_last(name)) or next(heads, _OTHER)
