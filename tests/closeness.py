"""How near one tensor is to another."""

from torch import Tensor


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """The norm of the difference by the second one's norm, in float64 on a CPU."""
    ours, theirs = (tensor.detach().cpu().double() for tensor in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()
