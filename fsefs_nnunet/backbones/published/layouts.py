"""What a published checkpoint holds, recognised by the names and shapes of its tensors alone."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import torch

from fsefs_nnunet.backbones.zoo import (
    ANATOMIX,
    HIGHRES3DNET,
    INFLATED_RESNET,
    LINEAR_HEADS,
    OBELISK,
    SWIN_UNETR,
    UNET,
)
from fsefs_nnunet.errors import InputError

ARCHITECTURE_NAMES = {
    SWIN_UNETR: "Swin UNETR",
    UNET: "3D U-Net of SuPreM",
    OBELISK: "U-Net of OBELISK",
    HIGHRES3DNET: "HighRes3DNet",
    ANATOMIX: "U-Net of anatomix",
    INFLATED_RESNET: "ResNet-152 inflated to 3D",
}

_START = r"^(?:.*\.)?"

# Numbers of anatomix's convolutions in its nn.Sequential, by the place of the block: downwards, then upwards.
_DOWN, _UP = ((0, 3, 6), (10, 13), (17, 20), (24, 27), (31, 34)), ((38, 41), (45, 48), (52, 55), (59, 62, 65))


def _numbered(side: str, blocks: tuple[tuple[int, ...], ...]) -> list[tuple[str, str]]:
    """A convolution and the batch norm after it are numbers 3 k and 3 k + 1 of a block."""
    return [
        (rf"{_START}model\.{number + offset}\.(\w+)", rf"{side}.{block}.{3 * place + offset}.\1")
        for block, numbers in enumerate(blocks)
        for place, number in enumerate(numbers)
        for offset in (0, 1)
    ]


# Published names, with any prefixes of wrappers -> names in the architecture.
_RULES = {
    SWIN_UNETR: [
        (_START + r"(patch_embed\.proj\..*|layers\d\.0\.(?:blocks|downsample)\..*)", r"network.swinViT.\1"),
        (_START + r"((?:encoder|decoder)\d+\..*)", r"network.\1"),
        (_START + r"(?:classifier|out\.conv\.conv)\.(weight|bias)", r"head.\1"),
    ],
    OBELISK: [
        (r"^conv0\.(.*)", r"stem.conv.\1"),
        (r"^batch0\.(.*)", r"stem.norm.\1"),
        *(
            (rf"^{theirs}{s + 1}{layer * str(s + 1)}\.(.*)", rf"down.{s}.{layer}.{ours}.\1")
            for s in range(5)
            for layer in (0, 1)
            for theirs, ours in (("conv", "conv"), ("batch", "norm"))
        ),
        *(
            (rf"^{theirs}6{letter}U\.(.*)", rf"up.{s}.{ours}.\1")
            for s, letter in enumerate(("d", "c", "b", ""))
            for theirs, ours in (("conv", "conv"), ("batch", "norm"))
        ),
        (r"^conv7U\.(.*)", r"head.first.conv.\1"),
        (r"^batch7U\.(.*)", r"head.first.norm.\1"),
        (r"^conv77U\.(.*)", r"head.second.\1"),
    ],
    HIGHRES3DNET: [
        (_START + r"block\.0\.convolutional_block\.1\.(.*)", r"stem.0.\1"),
        (_START + r"block\.0\.convolutional_block\.2\.(.*)", r"stem.1.\1"),
        *(
            (
                rf"{_START}block\.{b + 1}\.dilation_block\.(\d)\.residual_block\.(\d)\.convolutional_block\.{i}\.(.*)",
                rf"blocks.{b}.\1.layers.\2.{own}.\3",
            )
            for b in range(3)
            for i, own in ((0, 0), (3, 2))
        ),
        (_START + r"block\.4\.convolutional_block\.(\d)\.(.*)", r"last.\1.\2"),
        (_START + r"block\.6\.convolutional_block\.(\d)\.(.*)", r"head.\1.\2"),
    ],
    ANATOMIX: [*_numbered("down", _DOWN), *_numbered("up", _UP)],
    INFLATED_RESNET: [
        (r"^conv1\.(.*)", r"stem.0.\1"),
        (r"^bn1\.(.*)", r"stem.1.\1"),
        *(
            (rf"^layer{s + 1}\.(\d+)\.{theirs}{k + 1}\.(.*)", rf"layers.{s}.\1.layers.{k}.{own}.\2")
            for s in range(4)
            for k in range(3)
            for theirs, own in (("conv", 0), ("bn", 1))
        ),
        *((rf"^layer{s + 1}\.(\d+)\.downsample\.(.*)", rf"layers.{s}.\1.shortcut.\2") for s in range(4)),
    ],
    UNET: [
        *((_START + rf"down_tr{64 * 2**s}\.ops\.(.*)", rf"encoder.{s}.\1") for s in range(4)),
        *((_START + rf"up_tr{256 // 2**s}\.ops\.(.*)", rf"decoder.{s}.\1") for s in range(3)),
        *((_START + rf"up_tr{256 // 2**s}\.up_conv\.(.*)", rf"upsample.{s}.\1") for s in range(3)),
    ],
}
_SPELLINGS = {SWIN_UNETR: [(".mlp.fc", ".mlp.linear")], UNET: [(".conv1.", ".conv."), (".bn1.", ".norm.")]}

# Tensors that are not part of the backbone, by the last part of their names and by other parts.
_UNUSED = {
    "relative_position_index": "constants that are computed anew",
    "organ_embedding": "the head that is conditioned on text",
}
_STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_BATCH_NORM = (OBELISK, HIGHRES3DNET, ANATOMIX, INFLATED_RESNET)  # with the statistics of the training

# Tensors that show an architecture's width, and its classes.
_WIDTHS = {
    SWIN_UNETR: ("network.swinViT.patch_embed.proj.weight", "head.weight"),
    UNET: ("decoder.2.1.conv.weight", ""),
    OBELISK: ("head.first.conv.weight", "head.second.weight"),
    HIGHRES3DNET: ("head.0.weight", "head.0.weight"),
    ANATOMIX: ("up.3.6.weight", ""),
    INFLATED_RESNET: ("layers.1.7.layers.2.0.weight", ""),
}
_INPUT_SHOWS_WIDTH = (OBELISK, HIGHRES3DNET)
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
        last, axis = self.tensors.get(_WIDTHS[self.kind][0]), int(self.kind in _INPUT_SHOWS_WIDTH)
        return 0 if last is None or last.dim() <= axis else last.shape[axis]

    @property
    def rows(self) -> int:
        """Classes of the head, 0 without one."""
        head = _WIDTHS[self.kind][1]
        return self.tensors[head].shape[0] if head in self.tensors else 0

    @property
    def encoder_only(self) -> bool:
        return self.kind == SWIN_UNETR and not any(name.startswith("network.decoder") for name in self.tensors)

    def __str__(self) -> str:
        return described(self.kind, self.features, self.rows, self.encoder_only)


def described(kind: str, features: int, rows: int, encoder_only: bool) -> str:
    """E.g. "a Swin UNETR, 48 features, 29 rows of a linear head"."""
    part = "the encoder alone of a " if encoder_only else "a "
    head = "linear head" if kind in LINEAR_HEADS else "head"
    return f"{part}{ARCHITECTURE_NAMES[kind]}, {features} features" + (f", {rows} rows of a {head}" if rows else "")


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
            "folder of an nnU-Net model."
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
        raise InputError(f"{file} holds {best} without its first or last layer: it is incomplete; get it again.")
    strangers = [name for name in best.left_out.get(_OTHER, []) if re.search(_BACKBONE_PARTS, name, re.IGNORECASE)]
    if strangers:
        raise InputError(
            f"{file} is not a plain {ARCHITECTURE_NAMES[best.kind]}: it has {len(strangers)} more tensors inside, e.g. "
            f"{strangers[0]}; this variant is not supported."
        )
    return best


def _state_dicts(content: object, path: tuple[str, ...] = ()) -> dict[str, dict[str, torch.Tensor]]:
    """The state_dicts in a file, tensors by name, by the keys that lead to each state_dict, joined with dots."""
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
            left_out.setdefault(_why_left_out(kind, name), []).append(name)
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
    if _last(name) in (*_UNUSED, _COUNTER) or (_last(name) in _STATISTICS and kind not in _BATCH_NORM):
        return None
    for pattern, replacement in _RULES[kind]:
        if re.fullmatch(pattern, name):
            name = re.sub(pattern, replacement, name)
            for theirs, ours in _SPELLINGS.get(kind, ()):
                name = name.replace(theirs, ours)
            return name
    return None


def _why_left_out(kind: str, name: str) -> str:
    if _last(name) == _COUNTER and kind in _BATCH_NORM:
        return "counters of batch norms, which prediction does not use"
    if _last(name) in (*_STATISTICS, _COUNTER):
        return "running statistics, which the network never uses"
    heads = (why for pattern, why in _HEADS.items() if re.search(pattern, name))
    return _UNUSED.get(_last(name)) or next(heads, _OTHER)
