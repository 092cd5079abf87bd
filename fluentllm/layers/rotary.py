"""Rotary position embedding: tables of cosines and sines for every position, with the scaling kinds of public checkpoints.

Built once a model from its config; a forward pass looks its rows up once (`rows`) and every layer uses them. Formulas are those
of the papers as Transformers' `modeling_rope_utils` states them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..core.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.protocols import BuildContext

KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config's rope settings under their present names, from `rope_parameters` (Transformers 5) or `rope_scaling` and
    `rope_theta` (before). Raises `CheckpointError` for a scaling kind that is not known, by name, and for a base or a part that
    rotates which is no positive number."""
    name = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    given = config.get(name) or {}
    if not isinstance(given, Mapping):
        raise CheckpointError(
            f"config.json: {name} is {given!r}, not an object.", fix="Take config.json from the model's publisher."
        )
    found = dict(given)
    kind = found.pop("type", None)
    found.setdefault("rope_type", kind or "default")
    if found["rope_type"] is None:
        found["rope_type"] = "default"
    if any(isinstance(value, dict) for value in found.values()):
        raise CheckpointError("config.json gives each kind of layer its own rope_parameters, which is not supported.")
    if found["rope_type"] not in KINDS:
        raise CheckpointError(
            f"config.json asks for rope scaling {found['rope_type']!r}, which is not supported.",
            fix=f"Supported are {', '.join(KINDS)}.",
        )
    if "mrope_section" in found:
        raise CheckpointError("config.json asks for rope scaling 'mrope' (mrope_section), which is not supported.")
    if found.get("rope_theta") is None:
        found["rope_theta"] = config.get("rope_theta") or 10000.0
    if found.get("partial_rotary_factor") is None:
        found["partial_rotary_factor"] = config.get("partial_rotary_factor") or 1.0
    if found.get("original_max_position_embeddings") is None:
        found["original_max_position_embeddings"] = (
            config.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
    for key in ("rope_theta", "partial_rotary_factor"):
        found[key] = _number(found, key)
    return found


def inverse_frequencies(rope: Mapping[str, Any], dim: int, max_position: int) -> tuple[Tensor, float]:
    """`rope` from `rope_parameters` → ([dim / 2] float32, factor on cosines and sines).

    dynamic (NTK) equals default up to `max_position_embeddings`;
    longer contexts are refused by `assembly.choices.max_model_len`.
    """
    kind = rope["rope_type"]
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    frequencies = 1.0 / (float(rope["rope_theta"]) ** exponents)
    if kind == "linear":
        return frequencies / _number(rope, "factor"), 1.0
    if kind == "llama3":
        return _llama3(frequencies, rope), 1.0
    if kind == "yarn":
        return _yarn(frequencies, rope, dim, max_position)
    return frequencies, 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 · mscale · ln(factor) + 1 (YaRN, section 3.4)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(frequencies: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    factor, low, high = (_number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    original = _number(rope, "original_max_position_embeddings")
    wavelength = 2 * math.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    scaled = torch.where(wavelength > original / low, frequencies / factor, blended)
    return torch.where(wavelength < original / high, frequencies, scaled)


def _yarn(frequencies: Tensor, rope: Mapping[str, Any], dim: int, max_position: int) -> tuple[Tensor, float]:
    """YaRN, sections 3.2 (ramp between interpolated and kept frequencies) and 3.4 (attention factor)."""
    original = _number(rope, "original_max_position_embeddings")
    factor = _number(rope, "factor") if rope.get("factor") is not None else max_position / original
    theta = float(rope["rope_theta"])

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (dimension(_number(rope, key, default)) for key, default in (("beta_fast", 32), ("beta_slow", 1)))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    mixed = frequencies / factor * (1 - kept) + frequencies * kept
    attention_factor = rope.get("attention_factor")
    if attention_factor is None:
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            mscale, all_dim = _number(rope, "mscale"), _number(rope, "mscale_all_dim")
            return mixed, yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
        return mixed, yarn_mscale(factor)
    return mixed, _number(rope, "attention_factor")


def _number(rope: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """`default`: for one that is missing or 0."""
    value = rope.get(key) or default
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(
            f"config.json: rope scaling {rope['rope_type']!r} needs {key}, a positive number; found {rope.get(key)!r}.",
            fix="Take config.json from the model's publisher.",
        )
    return float(value)


class Rotary:
    """cos and sin of positions 0 … max_positions - 1 for heads whose first `dim` values rotate, laid out for `Ops.rotary`:
    out = x · cos + partner(x) · sin, with the sign of the sine in the table.

    interleaved: pairs are (2i, 2i + 1) instead of (i, i + dim / 2).
    """

    def __init__(
        self, ctx: BuildContext, config: Mapping[str, Any], dim: int, max_position: int, *, interleaved: bool = False
    ) -> None:
        """`dim` is the number of values a head rotates; `max_position` the longest context of the checkpoint."""
        self.dim = dim
        self.interleaved = interleaved
        self.parameters = rope_parameters(config)
        frequencies, factor = inverse_frequencies(self.parameters, dim, int(config["max_position_embeddings"]))
        positions = torch.arange(ctx.max_positions or max_position, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if interleaved:
            tables = torch.stack((cos, cos), -1).flatten(1), torch.stack((-sin, sin), -1).flatten(1)
        else:
            tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        # Side by side, so that a pass looks both up in one launch.
        self._tables = torch.stack(tables).to(ctx.device, ctx.dtype).unsqueeze(2)
        self._rotary = ctx.ops.rotary

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T] int64 → cos and sin, [T, 1, dim] each. Once a forward pass."""
        cos, sin = self._tables.index_select(1, positions)
        return cos, sin

    def __call__(self, x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """x [T, H, D], D ≥ dim → rotated, the same shape."""
        return self._rotary(x, rows[0], rows[1], interleaved=self.interleaved)
