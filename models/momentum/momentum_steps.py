"""The steps of MomentumSMoE, one small function per variant (arXiv 2410.14574, section 3 and E).

x is the hidden state `[B, S, H]`, u the output of the sparse layer `[B, S, H]`, p the momentum
`[B, S, n, H]`, n = 2 (real and imaginary part) for complex momentum and 1 otherwise. The sign is
such that mu = 0, gamma = 1 is the plain residual x + u. Everything is in the type of the model.
"""

import torch
from torch import Tensor

from .configuration_momentum import MomentumConfig, Rates


def accumulated(update: Tensor, momentum: Tensor, rates: Rates) -> Tensor:
    """p' = u + mu p, `[B, S, 1, H]`: heavy ball, equation 10."""
    return update.unsqueeze(2) + rates.mu * momentum


def accumulated_complex(update: Tensor, momentum: Tensor, rates: Rates) -> Tensor:
    """p' = u + mu p with complex mu and p, `[B, S, 2, H]`."""
    real, imaginary = momentum.unbind(2)
    new_real = update + rates.mu * real - rates.mu_imaginary * imaginary
    return torch.stack([new_real, rates.mu * imaginary + rates.mu_imaginary * real], dim=2)


def adam_direction(update: Tensor, beta1: float, beta2: float, epsilon: float) -> Tensor:
    """First step of Adam from means of zero, `[B, S, H]`: equation 15 without correction.

    (1 - beta1) u / sqrt((1 - beta2) u^2 + epsilon), that is 3.16 sign(u) for the usual betas.
    """
    wide = update.float()
    mean, square = (1 - beta1) * wide, (1 - beta2) * wide * wide
    return (mean / (square + epsilon).sqrt()).to(update.dtype)


def looked_ahead(hidden: Tensor, momentum: Tensor, rates: Rates, gamma: float | Tensor) -> Tensor:
    """y = x + look_ahead gamma p, `[B, S, H]`: what the router sees, equation 16."""
    if rates.look_ahead == 0:
        return hidden
    return hidden + rates.look_ahead * (gamma * momentum[:, :, 0])


def advanced(
    config: MomentumConfig,
    hidden: Tensor,
    update: Tensor,
    momentum: Tensor,
    gamma: float | Tensor,
    *,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """x' `[B, S, H]` and p' `[B, S, n, H]` behind one sparse layer; `first`: of the model."""
    kind = config.momentum_kind
    accumulate = accumulated_complex if kind == "complex" else accumulated
    momentum = accumulate(update, momentum, config.rates)
    if kind == "adam" and first:
        return _adam_step(config, hidden, update, gamma), momentum
    direction = momentum[:, :, 0]
    if kind == "sign":
        direction = direction.sign()
    return hidden + gamma * direction, momentum


def _adam_step(
    config: MomentumConfig, hidden: Tensor, update: Tensor, gamma: float | Tensor
) -> Tensor:
    """(1 - kappa) x + gamma times the direction."""
    betas = config.adam_beta1, config.adam_beta2
    kept = 1.0 - float(config.adam_decay or 0.0)
    return kept * hidden + gamma * adam_direction(update, *betas, config.adam_epsilon)
