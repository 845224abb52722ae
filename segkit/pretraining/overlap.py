"""How much the views of a group have in common, which limits what a matching can find.

Where a view overlaps with another image's as much as with that of its own image, no matching is right. G is the number
of groups, N of their images.
"""

import torch
from torch import Tensor

from segkit.pretraining.solver import solve
from segkit.pretraining.views import cell_positions
from segkit.training.task import Batch

_POINTS = 8  # points along each axis of a view by which overlaps are counted


def view_overlaps(batch: Batch, nodes: int) -> Tensor:
    """Overlaps (G, N, N) of view i of "first" with view a of "second": what both show over what either shows, 0 to 1.

    Views of different cases, modalities or slices have none. Counted on 8 points along each axis of a view.
    """
    patch = batch["first"].shape[2:]
    dims = len(patch)

    def by_group(values: Tensor) -> Tensor:
        return values.reshape(-1, nodes, *values.shape[1:])

    points = cell_positions(batch["first_frame"], patch, (_POINTS,) * dims) + batch["origin"][:, None]
    matrix, corner = batch["second_frame"][..., :-1], batch["second_frame"][..., -1] + batch["origin"]
    # For each point of view i, in mm in its case, the voxel of view a: (G, N, N, points, dims).
    offset = by_group(points)[:, :, None] - by_group(corner)[:, None, :, None]
    voxel = offset @ by_group(torch.linalg.inv(matrix)).mT[:, None]
    is_inside = ((voxel >= -0.5) & (voxel <= voxel.new_tensor(patch) - 0.5)).all(-1)
    first, second = (by_group(torch.linalg.det(batch[f"{view}_frame"][..., :-1]).abs()) for view in ("first", "second"))
    common = is_inside.float().mean(-1) * first[:, :, None]
    overlap: Tensor = common / (first[:, :, None] + second[:, None] - common)
    for numbers in map(by_group, (batch["stack"], batch["place"])[: 4 - dims]):  # crops overlap, slices do not
        overlap = overlap * (numbers[:, :, None] == numbers[:, None])
    return overlap


def overlap_measures(batch: Batch, nodes: int) -> dict[str, float]:
    """Means over the images of groups: `own` overlap of both views, `other`, the largest with another image's.

    `oracle` is the share of images that are matched rightly by the true overlaps.
    """
    overlaps = view_overlaps(batch, nodes).cpu()
    own = overlaps.diagonal(dim1=1, dim2=2)
    others = overlaps - torch.diag_embed(own + 1)
    is_right = torch.from_numpy(solve(overlaps.numpy(), None)) == torch.arange(nodes)
    return {
        "own": float(own.mean()),
        "other": float(others.amax(2).mean()),
        "oracle": float(is_right.float().mean()),
    }
