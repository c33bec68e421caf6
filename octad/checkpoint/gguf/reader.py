"""GGUFSource: the weights of a GGUF file under the names, shapes and row order that the hub's checkpoints
use.

    source = GGUFSource("SmolLM2-135M-Instruct.Q4_1.gguf")
    source.config, source.read("model.layers.0.self_attn.q_proj.weight")

Two things differ from a hub checkpoint besides names and quantisation. llama.cpp's converter interleaves the
two rotary halves of each head in the q and k rows of the llama architecture (it rotates neighbours,
transformers rotates halves); they are put back here. And the experts of a layer are one stacked tensor; they
are read one by one. Values are dequantised by the `gguf` package, a few million at a time, so that memory
stays near the size of the tensor returned.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octad.checkpoint.gguf.header import GGUFHeader, GGUFTensor
from octad.checkpoint.gguf.metadata import INTERLEAVED, ROPE_FACTORS, config_of
from octad.checkpoint.names import EMBEDDING, FINAL_NORM, HEAD, expert_name, router_name, tensor_plan
from octad.checkpoint.source import TensorInfo
from octad.dist import dtype_name
from octad.errors import CheckpointError
from octad.fingerprint import fingerprint
from octad.model.config import ModelConfig
from octad.model.families import Part

GLOBAL_NAMES = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
_IGNORED = re.compile(r"(blk\.\d+\.)?(rope_freqs|attn_rot_embd)\.weight")
_INERT = re.compile(r"\.shared_expert(_gate)?\.")  # "llama" has none, a mixture of Qwen2 models must
_LAYER = re.compile(r"blk\.(?P<layer>\d+)\.(?P<part>\w+?)(?:\.(?P<expert>\d+))?\.(?P<kind>weight|bias)")
_SINGLE: Mapping[str, Part] = {"ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down"}
_STACKED: Mapping[str, Part] = {f"{part}_exps": name for part, name in _SINGLE.items()}
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_CHUNK = 1 << 22  # values dequantised at a time: 16 MiB of float32


@dataclass(frozen=True)
class _Piece:
    """Where a hub tensor lies: a GGUF tensor, or one expert of a stacked one; `heads` > 0 where rows are
    interleaved.
    """

    tensor: str  # "" where the file leaves out what is zero
    expert: int | None
    shape: tuple[int, ...]
    heads: int = 0


class GGUFSource:
    """A TensorSource over one GGUF file. `dtype`: of what `read` returns; by default that of each tensor in a file of F32
    and F16, else bfloat16. With `exact`, each tensor's own in any file, and float32 for quantised ones, which holds
    whatever they stand for.

    Raises CheckpointError for a file that is damaged, of another architecture, or does not hold what its
    metadata say.
    """

    directory: Path | None = None

    def __init__(
        self,
        path: str | Path,
        label: str | None = None,
        dtype: torch.dtype | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.path = Path(path)
        self.label = label or str(path)
        self.header = GGUFHeader.read(self.path)
        self._codec = _Codec.load()
        self._check_extents()
        types = {self._codec.type_name(tensor.type) for tensor in self.header.tensors.values()}
        plain = types <= {"F32", "F16"}
        self._asked = dtype if dtype or exact or plain else torch.bfloat16
        self.config = self._read_config()
        self._pieces = self._map_names()
        self._check_plan()
        self._digest: dict[str, Any] | None = None

    def names(self) -> list[str]:
        """Hub names, in the order of the file."""
        return list(self._pieces)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of what `read` returns."""
        piece = self._piece(name)
        if not piece.tensor:
            return TensorInfo(piece.shape, self.native_dtype)
        return TensorInfo(piece.shape, self._dtype_of(self.header.tensors[piece.tensor]))

    def read(self, name: str) -> torch.Tensor:
        """Read, dequantise, put interleaved rows back, in the dtype that `info` tells."""
        piece = self._piece(name)
        if not piece.tensor:
            return torch.zeros(piece.shape, dtype=self.native_dtype)
        tensor = self.header.tensors[piece.tensor]
        values = self._dequantised(tensor, piece).view(piece.shape)
        return deinterleave(values, piece.heads) if piece.heads else values

    def extent(self, name: str) -> None:
        """None: the bytes in the file are quantised, or of another layout."""

    def provenance(self) -> Mapping[str, Any]:
        """Kind, label, and the file's name, bytes and SHA-256 (read once, then remembered)."""
        if self._digest is None:
            self._digest = fingerprint(self.path)
        return {"kind": "gguf", "label": self.label, "files": [self._digest]}

    # ---- opening -------------------------------------------------------------------------------------------

    def _check_extents(self) -> None:
        """Every tensor is of a type that can be dequantised and lies inside the file."""
        for name, tensor in self.header.tensors.items():
            end = tensor.offset + self._codec.nbytes(tensor.type, tensor.shape, f"{self.path}: {name}")
            if end > self.header.size:
                size = self.header.size
                raise CheckpointError(
                    f"{self.path}: truncated: {name} ends at byte {end} of {size}; fetch it again"
                )

    def _dtype_of(self, tensor: GGUFTensor) -> torch.dtype:
        """What the tensor's values are read in."""
        return self._asked or FLOATS.get(self._codec.type_name(tensor.type), torch.float32)

    @property
    def native_dtype(self) -> torch.dtype:
        """The type that a model of these weights has by itself: the embeddings', bfloat16 where they are quantised."""
        embedding = self.header.tensors.get("token_embd.weight")
        kind = self._codec.type_name(embedding.type) if embedding is not None else ""
        return self._asked or FLOATS.get(kind, torch.bfloat16)

    def _read_config(self) -> ModelConfig:
        factors = None
        if (tensor := self.header.tensors.get(ROPE_FACTORS)) is not None:
            factors = self._dequantised(
                tensor, _Piece(ROPE_FACTORS, None, tensor.shape), torch.float32
            ).tolist()
        return config_of(self.header, factors, dtype_name(self.native_dtype))

    def _map_names(self) -> dict[str, _Piece]:
        pieces: dict[str, _Piece] = {}
        for name, tensor in self.header.tensors.items():
            if not _IGNORED.fullmatch(name):
                pieces.update(self._hub_pieces(name, tensor))
        if self._architecture == "llama" and self.config.shared_expert_intermediate_size:
            plan = tensor_plan(self.config).items()
            pieces |= {name: _Piece("", None, tuple(shape)) for name, shape in plan if _INERT.search(name)}
        return pieces

    @property
    def _architecture(self) -> str:
        return str(self.header.metadata["general.architecture"])

    def _hub_pieces(self, name: str, tensor: GGUFTensor) -> dict[str, _Piece]:
        """Hub names of one GGUF tensor: one, or one per expert."""
        if name in GLOBAL_NAMES:
            return {GLOBAL_NAMES[name]: _Piece(name, None, tensor.shape)}
        match = _LAYER.fullmatch(name)
        if match is None:
            raise self._no_place(name)
        layer, part, kind, family = int(match["layer"]), match["part"], match["kind"], self.config.model_type
        if match["expert"] is not None:
            return self._expert_piece(name, tensor, match)
        if part == "ffn_gate_inp" and self.config.is_moe:
            return {router_name(family, layer): _Piece(name, None, tensor.shape)}
        if stacked := _STACKED.get(part):
            if not self.config.is_moe or kind != "weight":
                raise self._no_place(name)
            return {
                expert_name(family, layer, e, stacked): _Piece(name, e, tensor.shape[1:])
                for e in range(tensor.shape[0])
            }
        if part not in LAYER_NAMES:
            raise self._no_place(name)
        shape = (
            (1, *tensor.shape) if part == "ffn_gate_inp_shexp" and len(tensor.shape) == 1 else tensor.shape
        )
        return {
            f"model.layers.{layer}.{LAYER_NAMES[part]}.{kind}": _Piece(
                name, None, shape, self._interleaved(part)
            )
        }

    def _expert_piece(self, name: str, tensor: GGUFTensor, match: re.Match[str]) -> dict[str, _Piece]:
        """Files of before April 2024 hold one tensor per expert: blk.0.ffn_gate.7.weight."""
        part = _SINGLE.get(match["part"])
        if part is None or not self.config.is_moe or match["kind"] != "weight":
            raise self._no_place(name)
        hub = expert_name(self.config.model_type, int(match["layer"]), int(match["expert"]), part)
        return {hub: _Piece(name, None, tensor.shape)}

    def _interleaved(self, part: str) -> int:
        if self._architecture not in INTERLEAVED:
            return 0
        return {"attn_q": self.config.num_attention_heads, "attn_k": self.config.num_key_value_heads}.get(
            part, 0
        )

    def _no_place(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {name} has no place in a {self.config.model_type} model")

    def _check_plan(self) -> None:
        """The tensors are exactly those that the configuration calls for."""
        plan = dict(tensor_plan(self.config))
        if self.config.tie_word_embeddings:
            plan.pop(HEAD, None)
        for name, shape in plan.items():
            if name not in self._pieces:
                raise CheckpointError(f"{self.path}: the tensor for {name} {list(shape)} is missing")
            if (found := self._pieces[name].shape) != tuple(shape):
                source = self._pieces[name].tensor
                raise CheckpointError(
                    f"{self.path}: {source} is {list(found)}; the metadata call for {list(shape)}"
                )
        for name in self._pieces.keys() - plan.keys():
            raise self._no_place(self._pieces[name].tensor)

    # ---- reading -------------------------------------------------------------------------------------------

    def _piece(self, name: str) -> _Piece:
        if name not in self._pieces:
            raise CheckpointError(f"{self.label}: there is no tensor {name}")
        return self._pieces[name]

    def _dequantised(
        self, tensor: GGUFTensor, piece: _Piece, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """The values of a piece, flat, in `dtype`; dequantised in runs of whole rows."""
        row = tensor.shape[-1]
        rows = int(np.prod(piece.shape, dtype=np.int64)) // row
        row_bytes = self._codec.nbytes(tensor.type, (row,), piece.tensor)
        start = tensor.offset + (piece.expert or 0) * rows * row_bytes
        out = torch.empty(rows * row, dtype=dtype or self._dtype_of(tensor))
        step = max(1, _CHUNK // row)
        with self.path.open("rb") as file:
            file.seek(start)
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw = np.frombuffer(_read_exactly(file, count * row_bytes, self.path), dtype=np.uint8)
                values = self._codec.dequantise(raw.reshape(count, row_bytes), tensor.type)
                out[first * row : (first + count) * row] = torch.from_numpy(values).view(-1)
        return out


def deinterleave(values: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo the converter's interleaving of rotary halves: rows (h, i, half) -> (h, half, i). [H*K, ...] ->
    [H*K, ...].

    Source: `permute` in llama.cpp's conversion of LlamaForCausalLM.
    """
    rows, rest = values.shape[0], values.shape[1:]
    return values.view(heads, rows // heads // 2, 2, *rest).transpose(1, 2).reshape(values.shape).contiguous()


def _read_exactly(file: Any, count: int, path: Path) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    done = 0
    while done < count:
        if not (got := file.readinto(view[done:])):
            raise CheckpointError(f"{path}: truncated while it was being read")
        done += got
    return data


@dataclass(frozen=True)
class _Codec:
    """The parts of the `gguf` package that are used: block sizes by type id, and dequantisation."""

    sizes: Mapping[int, tuple[int, int]]
    labels: Mapping[int, str]
    function: Callable[[Any, Any], Any]

    @classmethod
    def load(cls) -> _Codec:
        """Import `gguf`; CheckpointError says how to install it."""
        try:
            from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError as error:
            raise CheckpointError(
                "reading GGUF files needs the gguf package: pip install 'octad[gguf]'"
            ) from error
        sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
        labels = {int(kind): kind.name for kind in GGMLQuantizationType}
        return cls(sizes, labels, lambda data, kind: dequantize(data, GGMLQuantizationType(kind)))

    def type_name(self, kind: int) -> str:
        """F32, Q4_K, ..."""
        return self.labels.get(kind, f"type {kind}")

    def nbytes(self, kind: int, shape: tuple[int, ...], where: str) -> int:
        """Bytes of a tensor. CheckpointError for an unknown type or rows that are no whole number of blocks."""
        if kind not in self.sizes:
            raise CheckpointError(
                f"{where}: {self.type_name(kind)} is not known to the installed gguf package"
            )
        block, size = self.sizes[kind]
        if 0 in shape or shape[-1] % block:
            name = self.type_name(kind)
            raise CheckpointError(
                f"{where}: rows of {shape[-1]} are no whole number of {name} blocks of {block}"
            )
        count = 1
        for dimension in shape:
            count *= dimension
        return count // block * size

    def dequantise(self, data: Any, kind: int) -> Any:
        """Rows of bytes -> rows of float32."""
        try:
            return np.ascontiguousarray(self.function(data, kind), dtype=np.float32)
        except (NotImplementedError, ValueError) as error:
            raise CheckpointError(f"{self.type_name(kind)} values cannot be dequantised: {error}") from error
