"""Which of a folder's files are weights in PyTorch's own format. Torch-free."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PATTERN = "pytorch_model*.bin"


def torch_files(folder: Path) -> list[Path]:
    """One file, those that the index names, or all there are. Raises `CheckpointError` where the index names one that is not
    there."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        return sorted(folder.glob(PATTERN))
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of PyTorch's files ({error}).") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of the {len(names)} files that its index names: {', '.join(missing[:8])}.",
            fix="Finish the download.",
        )
    return [folder / name for name in names]
