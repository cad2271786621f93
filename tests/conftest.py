import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden numbers that are too large for the repository."""
    if not os.environ.get("FSEFT_SHARED"):
        pytest.skip("Set FSEFT_SHARED to the folder with golden/*.npz to compare with the published code's numbers.")
    return Path(os.environ["FSEFT_SHARED"])
