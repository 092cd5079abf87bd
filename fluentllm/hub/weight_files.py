"""Which of a folder's files make up a checkpoint: one, those that an index names, or all there are. Torch-free."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Layout:
    """How a format's files are named."""

    what: str
    """What errors call them."""
    single: str
    index: str
    pattern: str

    def read_index(self, folder: Path) -> dict[str, str] | None:
        """Tensor → file; None where one file has all, or no index is there. Raises `CheckpointError` for what is no index."""
        index = folder / self.index
        if (folder / self.single).is_file() or not index.is_file():
            return None
        try:
            found: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
            set(found.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} is not an index of {self.what} ({error}).") from error
        return found

    def present(self, folder: Path) -> list[Path]:
        """Its files that are there, also of a download that has not ended."""
        return [file for file in self._named(folder) if file.is_file()]

    def complete(self, folder: Path) -> bool:
        """Are there files, and all that an index names?"""
        named = self._named(folder)
        return bool(named) and all(file.is_file() for file in named)

    def files(self, folder: Path) -> list[Path]:
        """Its files. Raises `CheckpointError` where one that the index names is not there."""
        named = self._named(folder)
        missing = [file.name for file in named if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {len(missing)} of the {len(named)} files that its index names: {', '.join(missing[:8])}.",
                fix="Finish the download.",
            )
        return named

    def _named(self, folder: Path) -> list[Path]:
        if (folder / self.single).is_file():
            return [folder / self.single]
        index = self.read_index(folder)
        if index is not None:
            return [folder / name for name in sorted(set(index.values()))]
        return sorted(folder.glob(self.pattern))


SAFETENSORS = Layout("safetensors files", "model.safetensors", "model.safetensors.index.json", "*.safetensors")
PYTORCH = Layout("PyTorch's files", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model*.bin")
