"""The public universal backbones for CT, a row each."""

from __future__ import annotations

from dataclasses import dataclass

from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.labels import BTCV_14, TEMPLATE_29, TEMPLATE_32

SWIN_UNETR, UNET = "swin_unetr", "suprem_unet"  # keys of architectures.ARCHITECTURES
DIVISORS = {SWIN_UNETR: 32, UNET: 8}  # what the architecture asks of a window's sides

_HUGGINGFACE = "https://huggingface.co/MrGiovanni/SuPreM"
_MONAI_RELEASE = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1"
_NO_LICENCE = "unknown, ask the authors"
_CLIP_DRIVEN_LICENCE = "CC BY-NC-ND 4.0 (LICENSE of github.com/ljwztc/CLIP-Driven-Universal-Model)"
_SUPREM_LICENCE = f"Apache-2.0 ({_HUGGINGFACE}), MIT (LICENSE of github.com/MrGiovanni/SuPreM)"
_CLIP_DRIVEN = "Liu et al., CLIP-Driven Universal Model for Organ Segmentation and Tumor Detection, ICCV 2023"
_SUPREM = "Li, Yuille, Zhou, How Well Do Supervised 3D Models Transfer to Medical Imaging Tasks?, ICLR 2024"
_TANG = "Tang et al., Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis, CVPR 2022"


@dataclass(frozen=True)
class Training:
    """How a published backbone saw its images in training; the words are those of BackboneContract.

    hu_window: clipped to and mapped to [0, 1].
    window: voxels per axis of its patches; the smallest and the largest that it is used with.
    """

    spacing: tuple[float, float, float]
    hu_window: tuple[float, float]
    window: tuple[int, int, int]
    channel_names: tuple[str, ...] = ("CT",)
    image_reader_writer: str = "NibabelIOWithReorient"  # RAS
    transpose_forward: tuple[int, int, int] = (2, 1, 0)  # x, y, z

    @property
    def ct_normalization(self) -> dict[str, float]:
        low, high = self.hu_window
        return {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}


ABDOMINAL_CT = Training(spacing=(1.5, 1.5, 1.5), hu_window=(-175.0, 250.0), window=(96, 96, 96))


@dataclass(frozen=True)
class PublishedBackbone:
    """A file that others published.

    training: how it saw its images.
    kind, features: its architecture and the width of the decoder's last stage.
    classes: what it was trained on; with `head`, the rows of its linear head, in order.
    encoder_only: the file has no decoder.
    file: the publisher's name of it. link: where it can be had without a browser. page: where else.
    size, sha256: of the file, 0 and "" where nobody has said them.
    """

    id: str
    training: Training
    kind: str = SWIN_UNETR
    features: int = 48
    classes: tuple[str, ...] = ()
    head: bool = False
    softmax: bool = False
    encoder_only: bool = False
    file: str = ""
    link: str = ""
    page: str = ""
    size: int = 0
    sha256: str = ""
    licence: str = _NO_LICENCE
    citation: str = "unknown"
    description: str = ""

    @property
    def how_to_get(self) -> str:
        return f"fseft backbones download {self.id}" if self.link else f"fseft backbones import {self.id} FILE"

    def contract(self, source: dict) -> BackboneContract:
        """source: what was imported."""
        training = self.training
        return BackboneContract(
            id=self.id,
            architecture={
                "kind": self.kind,
                "features": self.features,
                "head": self.head,
                "encoder_only": self.encoder_only,
            },
            classes=self.classes,
            softmax=self.softmax,
            channel_names=training.channel_names,
            image_reader_writer=training.image_reader_writer,
            transpose_forward=training.transpose_forward,
            spacing=training.spacing,
            normalization_schemes=("CTNormalization",),
            use_mask_for_norm=(False,),
            foreground_intensity_properties_per_channel={"0": training.ct_normalization},
            resampling_fn_data="resample_data_or_seg_to_shape",
            # None would resample thick slices by nearest neighbour along z; the authors' images were trilinear
            resampling_fn_data_kwargs={"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
            patch_size=training.window,
            smallest_window=training.window,
            divisor=(DIVISORS[self.kind],) * 3,
            licence=self.licence,
            citation=self.citation,
            description=self.description,
            source=source,
        )


_ENTRIES = [
    PublishedBackbone(
        "fseft",
        ABDOMINAL_CT,
        classes=TEMPLATE_29,
        head=True,
        file="fseft.pth",
        page="https://drive.google.com/file/d/18yLNxmWGnVifQNeYYwyyu56Cg4tWV9aW/view",
        citation="Silva-Rodríguez, Dolz, Ben Ayed, Towards Foundation Models and Few-Shot Parameter-Efficient "
        "Fine-Tuning for Volumetric Organ Segmentation, Medical Image Analysis 103, 2025",
        description="FSEFT's universal model: 29 structures, supervised on 2,022 CT of nine public assemblies.",
    ),
    PublishedBackbone(
        "clipdriven",
        ABDOMINAL_CT,
        classes=TEMPLATE_32,
        file="supervised_clip_driven_universal_swin_unetr_2100.pth",
        link=f"{_HUGGINGFACE}/resolve/main/supervised_clip_driven_universal_swin_unetr_2100.pth",
        page="https://github.com/ljwztc/CLIP-Driven-Universal-Model (swinunetr.pth)",
        licence=_CLIP_DRIVEN_LICENCE,
        citation=_CLIP_DRIVEN,
        description="CLIP-Driven Universal Model, Swin UNETR; its head is conditioned on text and stays behind.",
    ),
    PublishedBackbone(
        "clipdriven_unet",
        ABDOMINAL_CT,
        kind=UNET,
        features=64,
        classes=TEMPLATE_32,
        file="supervised_clip_driven_universal_unet_2100.pth",
        link=f"{_HUGGINGFACE}/resolve/main/supervised_clip_driven_universal_unet_2100.pth",
        page="https://github.com/ljwztc/CLIP-Driven-Universal-Model (unet.pth)",
        licence=_CLIP_DRIVEN_LICENCE,
        citation=_CLIP_DRIVEN,
        description="CLIP-Driven Universal Model, U-Net; its head is conditioned on text and stays behind.",
    ),
    PublishedBackbone(
        "suprem_swinunetr",
        ABDOMINAL_CT,
        classes=TEMPLATE_32,
        file="supervised_suprem_swinunetr_2100.pth",
        link=f"{_HUGGINGFACE}/resolve/main/supervised_suprem_swinunetr_2100.pth",
        page=_HUGGINGFACE,
        size=758_911_849,
        sha256="b1672096465974502ccd5e2f2e5fce2ce214d6fb9848b23fc24f7b8888ffb4a3",
        licence=_SUPREM_LICENCE,
        citation=_SUPREM,
        description="SuPreM, Swin UNETR; its head is conditioned on text and stays behind.",
    ),
    PublishedBackbone(
        "suprem_unet",
        ABDOMINAL_CT,
        kind=UNET,
        features=64,
        classes=TEMPLATE_32,
        file="supervised_suprem_unet_2100.pth",
        link=f"{_HUGGINGFACE}/resolve/main/supervised_suprem_unet_2100.pth",
        page=_HUGGINGFACE,
        size=233_188_229,
        sha256="c8dc39c86cd8d715e5ef0b5bb4ba4335ba45237127829ea016f75ee8beca0a93",
        licence=_SUPREM_LICENCE,
        citation=_SUPREM,
        description="SuPreM, U-Net; its head is conditioned on text and stays behind.",
    ),
    PublishedBackbone(
        "btcv",
        ABDOMINAL_CT,
        classes=BTCV_14,
        head=True,
        softmax=True,
        file="swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt",
        link=f"{_MONAI_RELEASE}/swin_unetr.base_5000ep_f48_lr2e-4_pretrained.pt",
        page="https://github.com/Project-MONAI/research-contributions/tree/main/SwinUNETR/BTCV",
        citation=_TANG,
        description="Swin UNETR fine-tuned on the 13 organs of BTCV.",
    ),
    PublishedBackbone(
        "selfsup",
        ABDOMINAL_CT,
        encoder_only=True,
        file="model_swinvit.pt",
        link=f"{_MONAI_RELEASE}/model_swinvit.pt",
        page="https://github.com/Project-MONAI/research-contributions/tree/main/SwinUNETR/Pretrain",
        citation=_TANG,
        description="Encoder of Swin UNETR, self-supervised on 5,050 CT; there is no decoder.",
    ),
]
ZOO = {entry.id: entry for entry in _ENTRIES}
