"""All converters by name."""

from __future__ import annotations

from fsefs_nnunet.datasets.source import Source
from fsefs_nnunet.datasets.sources.abdomenct_1k import AbdomenCT1K
from fsefs_nnunet.datasets.sources.amos22 import AMOS22
from fsefs_nnunet.datasets.sources.btcv import BTCV
from fsefs_nnunet.datasets.sources.chaos import CHAOS
from fsefs_nnunet.datasets.sources.ct_org import CTORG
from fsefs_nnunet.datasets.sources.flare22 import FLARE22
from fsefs_nnunet.datasets.sources.kits import KiTS
from fsefs_nnunet.datasets.sources.lits import LiTS
from fsefs_nnunet.datasets.sources.msd import MSD
from fsefs_nnunet.datasets.sources.totalsegmentator import TotalSegmentator
from fsefs_nnunet.datasets.tables import nearest
from fsefs_nnunet.errors import InputError

SOURCES = (TotalSegmentator, FLARE22, AMOS22, BTCV, MSD, LiTS, KiTS, CHAOS, CTORG, AbdomenCT1K)


def find_source(name: str) -> Source:
    """The converter called `name`, in any case. Raises InputError for an unknown one and names the nearest."""
    names = [source.name for source in SOURCES]
    for source in SOURCES:
        if source.name.lower() == name.lower():
            return source()
    raise InputError(f"No converter {name!r}.{nearest(name, names)} There are: {', '.join(names)}.")
