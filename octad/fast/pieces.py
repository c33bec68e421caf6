"""A rank's part of a parameter: where it lies in the whole, who else holds it, how the whole comes back.

    piece = Piece(mesh, (Shard(0),), shape)
    piece.wrap(values)                  # this rank's values as a DTensor of the whole: to save, to gather

Optimisers work on plain local tensors (elementwise arithmetic needs no more); only what has to see the whole, a
checkpoint or Muon's matrix, gets a DTensor, which torch.distributed puts together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Piece:
    """A part of a parameter of `shape`, placed on the dimensions of a mesh."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size

    @property
    def copies(self) -> int:
        """How many ranks hold this same part."""
        sizes = zip(self.mesh.shape, self.placements, strict=True)
        return math.prod(size for size, placement in sizes if isinstance(placement, Replicate))

    @property
    def first(self) -> int:
        """The number of this part's first row (the first expert, for a stack) in the whole."""
        start, rows = 0, self.shape[0]
        for n, placement in enumerate(self.placements):
            if placement == Shard(0):
                step = math.ceil(rows / self.mesh.size(n))
                start, rows = start + step * self.mesh.get_local_rank(n), step
        return start

    def splits_matrices(self) -> bool:
        """True where a stack's single matrices are cut, not only the stack."""
        return any(isinstance(p, Shard) and p.dim > 0 for p in self.placements)

    def matrix(self) -> Piece:
        """One matrix of a stack that `splits_matrices`, on the mesh dimensions that cut it."""
        cut = next(n for n, p in enumerate(self.placements) if isinstance(p, Shard) and p.dim > 0)
        mesh = self.mesh if self.mesh.ndim == 1 else self.mesh[str((self.mesh.mesh_dim_names or ())[cut])]
        placement = self.placements[cut]
        assert isinstance(placement, Shard)
        return Piece(mesh, (Shard(placement.dim - 1),), self.shape[1:])

    @property
    def place(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where this part begins in each dimension of the whole, and its shape."""
        return placed(self.shape, self.mesh, self.placements)

    def wrap(self, values: torch.Tensor) -> DTensor:
        """This rank's values, in the place that they have in the whole; shares their memory."""
        stride = torch.empty(self.shape, device="meta").stride()
        return DTensor.from_local(
            values, self.mesh, self.placements, run_check=False, shape=self.shape, stride=stride
        )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's own values, sharing memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(values: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Local values in the form of another tensor, plain or distributed."""
    if not isinstance(tensor, DTensor):
        return values
    return DTensor.from_local(
        values,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def place_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where this rank's part of a tensor begins in each dimension, and its shape."""
    if not isinstance(tensor, DTensor):
        return (0,) * tensor.dim(), tuple(tensor.shape)
    return placed(tensor.shape, tensor.device_mesh, tuple(tensor.placements))


def placed(
    shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same of a part that is described."""
    own, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(starts), tuple(own)


def first_of_copies(tensor: DTensor) -> bool:
    """Whether this rank is the first of those that hold the same part."""
    coordinates = tensor.device_mesh.get_coordinate() or ()
    pairs = zip(tensor.placements, coordinates, strict=True)
    return not any(isinstance(placement, Replicate) and at for placement, at in pairs)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of it, on every rank; every rank has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
