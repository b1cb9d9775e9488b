"""Checkpoints whose weights are stored in 4 or 8 bits, seen as the bfloat16 ones they stand for.

Two schemes are decoded on read, tensor by tensor: MXFP4 as GPT-OSS is published (OCP Microscaling
Formats 1.0: blocks of 32 four-bit floats with one power of two), and FP8 E4M3 with one float per
block of a matrix as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3). Everything else is
refused. What is written is not quantised again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.checkpoint import FLOAT_BYTES, FLOAT_NAMES, Checkpoint, Piece, TensorInfo
from models.errors import CheckpointError

if TYPE_CHECKING:
    import torch

# The 16 values of E2M1; the highest bit is the sign.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_SCALE_BIAS = 127
_REMEDY = "use the checkpoint in bfloat16, or one that is quantised with mxfp4 or block-wise fp8"


@dataclass(frozen=True)
class Packed:
    """The stored tensors of one decoded tensor; `block` is None for MXFP4."""

    values: str
    scales: str
    block: tuple[int, int] | None = None


@dataclass(frozen=True)
class Dequantised(Checkpoint):
    """A quantised checkpoint that reads as if it were stored in `dtype`."""

    stored: Checkpoint
    packed: dict[str, Packed]
    dtype: str

    def read_pieces(self, pieces: Iterable[Piece]) -> dict[Piece, torch.Tensor]:
        """See `Checkpoint`; quantised tensors are decoded."""
        wanted = list(dict.fromkeys(pieces))
        raw = self.stored.read_pieces(part for piece in wanted for part in self._sources(piece))
        return {piece: self._decoded(piece, raw) for piece in wanted}

    def stream(self, infos: Sequence[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """See `Checkpoint`; the scales may lie in another file."""
        return ((info, self.read([info.name])[info.name]) for info in infos)

    def _sources(self, piece: Piece) -> list[Piece]:
        name, index = piece
        found = self.packed.get(name)
        if found is None:
            return [piece]
        return [(found.values, index), (found.scales, index)]

    def _decoded(self, piece: Piece, raw: dict[Piece, torch.Tensor]) -> torch.Tensor:
        import torch

        found = self.packed.get(piece[0])
        if found is None:
            return raw[piece]
        kind: torch.dtype = getattr(torch, FLOAT_NAMES[self.dtype])
        values, scales = (raw[part] for part in self._sources(piece))
        if found.block is None:
            return decode_mxfp4(values, scales, kind)
        return decode_fp8(values, scales, found.block, kind)


def dequantised(stored: Checkpoint) -> Checkpoint:
    """The checkpoint itself, or a view of it whose quantised tensors are decoded when read.

    Raises:
        CheckpointError: another kind of quantisation, or scales that are missing.
    """
    scheme = stored.config.get("quantization_config")
    if not isinstance(scheme, dict):
        return stored
    method = str(scheme.get("quant_method"))
    if method == "mxfp4":
        packed = _find_mxfp4(stored)
    elif method == "fp8" and "e4m3" in str(scheme.get("fmt") or "e4m3"):
        packed = _find_fp8(stored, scheme.get("weight_block_size"))
    else:
        raise CheckpointError(
            f"{stored.folder} is quantised with {method}, which is not decoded", _REMEDY
        )
    return _view(stored, packed)


def decode_mxfp4(blocks: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[..., R, G, 16] bytes and [..., R, G] exponents (uint8) -> [..., 32 G, R].

    The low half of a byte is the first of its two values. The last axes are swapped, because that
    is how GPT-OSS holds its matrices once they are decoded.
    """
    import torch

    table = torch.tensor(_FP4, dtype=torch.float32)
    pairs = torch.stack([blocks & 0xF, blocks >> 4], dim=-1).flatten(-2)  # [..., R, G, 32]
    exponents = scales.to(torch.int32).unsqueeze(-1) - _SCALE_BIAS
    values = torch.ldexp(table[pairs.long()], exponents)
    return values.to(dtype).flatten(-2).transpose(-2, -1).contiguous()


def decode_fp8(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """[O, I] fp8 times the scale of its block; scales [ceil(O / b0), ceil(I / b1)]."""
    rows, columns = values.shape
    spread = scales.float().repeat_interleave(block[0], dim=0)[:rows]
    spread = spread.repeat_interleave(block[1], dim=1)[:, :columns]
    return (values.float() * spread).to(dtype)


def _find_mxfp4(stored: Checkpoint) -> dict[str, Packed]:
    names = [n.removesuffix("_blocks") for n in stored.tensors if n.endswith("_blocks")]
    return {name: Packed(f"{name}_blocks", f"{name}_scales") for name in names}


def _find_fp8(stored: Checkpoint, block: Any) -> dict[str, Packed]:
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(b, int) for b in block)):
        raise CheckpointError(
            f"{stored.folder} is quantised to fp8 with weight_block_size={block}; only scales per"
            " block of a matrix are decoded",
            _REMEDY,
        )
    names = [info.name for info in stored.tensors.values() if info.dtype == "F8_E4M3"]
    return {name: Packed(name, f"{name}_scale_inv", (block[0], block[1])) for name in names}


def _view(stored: Checkpoint, packed: dict[str, Packed]) -> Dequantised:
    lost = sorted(each.scales for each in packed.values() if each.scales not in stored.tensors)
    if lost:
        raise CheckpointError(
            f"{len(lost)} scale(s) of quantised tensors are missing, first {lost[0]}",
            "download the checkpoint again",
        )
    used = {name for each in packed.values() for name in (each.values, each.scales)}
    kind = _type_of(stored.config)
    tensors = {n: info for n, info in stored.tensors.items() if n not in used}
    for name, each in packed.items():
        tensors[name] = _decoded_info(name, each, stored, kind)
    config = {k: v for k, v in stored.config.items() if k != "quantization_config"}
    return Dequantised(
        stored.folder,
        dict(sorted(tensors.items())),
        config,
        stored.files,
        stored,
        packed,
        kind,
        origin=stored.origin,
    )


def _type_of(config: dict[str, Any]) -> str:
    """The floating type that the model was made for; bfloat16 when config.json is silent."""
    named = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    return next((short for short, name in FLOAT_NAMES.items() if name == named), "BF16")


def _decoded_info(name: str, packed: Packed, stored: Checkpoint, kind: str) -> TensorInfo:
    values, scales = stored.tensors[packed.values], stored.tensors[packed.scales]
    shape: tuple[int, ...] = values.shape
    if packed.block is None:
        grid = shape[:-1]
        shape = (*shape[:-3], 2 * math.prod(shape[-2:]), *shape[-3:-2])
    else:
        grid = tuple(-(-n // b) for n, b in zip(shape, packed.block, strict=False))
    if scales.shape != grid or len(values.shape) < 2:
        raise CheckpointError(
            f"{packed.scales} has shape {list(scales.shape)}, {packed.values} of shape"
            f" {list(values.shape)} needs {list(grid)}",
            "download the checkpoint again",
        )
    return TensorInfo(name, values.file, kind, shape, math.prod(shape) * FLOAT_BYTES[kind])
