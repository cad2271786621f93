"""Checkpoints in the layouts of the public backbones, with random values; no published weights are needed."""

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import torch

from fsefs_nnunet.backbones.architectures import ARCHITECTURES
from fsefs_nnunet.backbones.contract import BackboneContract
from fsefs_nnunet.backbones.zoo import ZOO

LAYOUTS = json.loads((Path(__file__).parent / "data" / "published_layouts.json").read_text())


def layout(name: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor in the file `name`, in its order."""
    content = LAYOUTS["files"][name]
    tensors = {}
    for prefix, part in content["parts"]:
        for key, shape in LAYOUTS["parts"][part].items():
            for ours, theirs in content["spelling"].items():
                key = key.replace(ours, theirs)
            dtype, shape = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("float32", shape)
            tensors[prefix + key] = (tuple(shape), getattr(torch, dtype))
    return tensors


def wrapped(name: str, tensors: dict[str, torch.Tensor]) -> dict:
    """`tensors` under the wrapper of the file `name`, beside what training scripts save with them."""
    wrapper = LAYOUTS["files"][name]["wrapper"]
    if wrapper is None:
        return tensors
    moments = {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0)}
    return {"epoch": 3, wrapper: tensors, "optimizer": {"state": {0: moments}, "param_groups": [{"lr": 1e-4}]}}


def meta_content(name: str) -> dict:
    """What reading the file gives, without values."""
    return wrapped(name, {k: torch.empty(s, dtype=t, device="meta") for k, (s, t) in layout(name).items()})


def write_constants(file: Path, name: str) -> None:
    """Write the file `name` at full size, a value of its own for each tensor, which takes next to no space."""
    tensors = {
        key: torch.tensor(i + 1, dtype=dtype).expand(shape)
        for i, (key, (shape, dtype)) in enumerate(layout(name).items())
    }
    torch.save(wrapped(name, tensors), file)


def random_tensors(name: str, width: int = 1) -> dict[str, torch.Tensor]:
    """width: divides the numbers of channels of a U-Net's tensors, so that a test is fast."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, (shape, dtype) in layout(name).items():
        shape = [n // width if n >= 32 else n for n in shape]
        tensors[key] = (
            0.1 * torch.randn(shape, generator=generator) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        )
    return tensors


def write_published(file: Path, name: str, width: int = 1) -> dict[str, torch.Tensor]:
    """Write the file `name`; returns its tensors."""
    tensors = random_tensors(name, width)
    torch.save(wrapped(name, tensors), file)
    return tensors


def narrow_contract(backbone_id: str, features: int) -> BackboneContract:
    """A public backbone's, with fewer features."""
    contract = ZOO[backbone_id].contract({})
    return replace(contract, architecture={**contract.architecture, "features": features})


def narrow_state(backbone_id: str, features: int) -> dict[str, torch.Tensor]:
    """Random weights of a narrow backbone, by our names."""
    contract = narrow_contract(backbone_id, features)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ARCHITECTURES[contract.architecture["kind"]](contract, "last").backbone_state()


def published_swin(state: dict[str, torch.Tensor], transformer: str = "swinViT") -> dict[str, torch.Tensor]:
    """Tensors of a Swin UNETR by their published names, under the spelling `transformer`."""
    spellings = {"network.swinViT": transformer, "network.": "", "head.": "out.conv.conv."}
    made = {}
    for name, tensor in state.items():
        for ours, theirs in spellings.items():
            name = name.replace(ours, theirs)
        made[name] = tensor
    return made


def turned(image: nib.Nifti1Image, axes: str) -> nib.Nifti1Image:
    """The same anatomy, stored along `axes`, with the header that says so."""
    wanted = nib.orientations.axcodes2ornt(axes)
    return image.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(image.affine), wanted))
