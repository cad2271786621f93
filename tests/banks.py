"""Small feature banks."""

from functools import partial

import numpy as np
import torch

from fsefs_nnunet.features.bank import EntryKey, FeatureBank, Request
from fsefs_nnunet.features.layout import whole_layout

CPU = torch.device("cpu")
WINDOW = (16, 16, 16)


def whole(case, shape):
    return whole_layout(shape)


def requests(cases, images, layout=whole):
    """Of `cases`, with what images(case) gives, kept as layout(case, shape) says."""
    return [Request(case, partial(images, case), partial(layout, case)) for case in cases]


def make_images(cases="ab"):
    rng = np.random.default_rng(0)
    return {case: rng.uniform(0, 1, (1, 16, 16, 20)).astype(np.float32) for case in cases}


def make_bank(root, backbone):
    return FeatureBank(root, backbone, "last", WINDOW, CPU)


def store(bank, case, features, layout=None):
    """Put features (C, X, Y, Z) of our own into a bank."""
    bank.folder.mkdir(parents=True, exist_ok=True)
    key = EntryKey(bank.recipe, case, "", layout or whole_layout(features.shape[1:]))
    bank._write(key, features)
    assert bank._open(key)
