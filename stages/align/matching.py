"""Permutation alignment of experts (MC-SMoE section 3.1; Git Re-Basin, arXiv 2209.04836).

An expert's neurons can be reordered without changing its function, so two experts are comparable
only after the neurons of one were matched to those of the other. With one hidden layer that is a
single linear assignment problem, solved exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.expert import Expert
from stages.align.activations import activation_gain, joint_gain
from stages.align.config import Criterion
from stages.errors import StatisticsError


def matching_gain(reference: Expert, target: Expert) -> Tensor:
    """[I, I] fp32: gain of putting target neuron j in the place of reference neuron i.

    gain = W1r W1t' + W3r W3t' + W2r' W2t (+ outer products of the biases). Maximising its trace
    under a permutation minimises the squared distance of the experts, because the norms of the
    rows do not depend on the order. The half-precision cost of other code can overflow.
    """
    gain = reference.down.float().T @ target.down.float()
    for ours, theirs in zip(reference.neuron_rows(), target.neuron_rows(), strict=True):
        a, b = ours.float(), theirs.float()
        gain += torch.outer(a, b) if a.ndim == 1 else a @ b.T
    return gain


def assignment(gain: Tensor) -> Tensor:
    """[I] int64: the permutation p that maximises sum_i gain[i, p[i]].

    When the row maxima already form a permutation nothing can beat them and no solver is needed,
    which is the common case for experts that descend from one another.
    """
    best = gain.argmax(dim=1)
    if len(set(best.tolist())) == gain.shape[0]:
        return best
    import lap

    _, columns, _ = lap.lapjv(-gain.double().numpy(force=True))
    return torch.from_numpy(columns).to(dtype=torch.int64, device=gain.device)


def align(
    reference: Expert,
    target: Expert,
    by: Criterion = "weights",
    activations: tuple[Tensor, Tensor] | None = None,
) -> Expert:
    """`target` with its neurons in the order that lies nearest to `reference`; see `gain`."""
    return target.permuted(assignment(gain(by, reference, target, activations)))


def gain(
    by: Criterion,
    reference: Expert,
    target: Expert,
    activations: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[I, I] gain by the criterion of the config.

    Args:
        activations: [N, I] of the reference and of the target on the same tokens; not read by
            `weights`.

    Raises:
        StatisticsError: the criterion needs activations and there are none.
    """
    if by == "weights":
        return matching_gain(reference, target)
    if activations is None:
        raise StatisticsError(
            f"align.by={by} needs what neurons do on sampled tokens, and none were taken",
            "set calibrate.sample.tokens (4096), or align.by=weights",
        )
    if by == "activations":
        return activation_gain(*activations)
    return joint_gain(reference, target, *activations)


def squared_distance(a: Expert, b: Expert) -> float:
    """Sum of squared differences over all tensors, fp32 products summed in fp64."""
    pairs = zip(a.tensors().values(), b.tensors().values(), strict=True)
    return sum(float((x.float() - y.float()).square().sum(dtype=torch.float64)) for x, y in pairs)
