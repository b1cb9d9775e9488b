"""Configuration of MomentumSMoE models. Imports no torch.

The file is copied beside the weights and loaded by transformers, so it imports nothing but
transformers and the standard library.
"""

from typing import NamedTuple

from transformers import MixtralConfig

STYLES = ("pre_ln", "post_ln")
KINDS = ("heavy_ball", "adam", "robust", "nag", "sign", "complex")


class Rates(NamedTuple):
    """The coefficients of one step; p is the momentum, u the output of the sparse layer.

    y = x + look_ahead gamma p;  p' = u(y) + mu p;  x' = x + gamma p'
    """

    mu: float
    gamma: float
    look_ahead: float = 0.0
    mu_imaginary: float = 0.0


class MomentumConfig(MixtralConfig):  # type: ignore[misc]  # transformers has no types
    """A Mixtral configuration with what the momentum over depth needs.

    Attributes:
        block_style: `pre_ln` is Mixtral's block; `post_ln` is the block of the paper's released
            code, with LayerNorm behind attention, momentum step and a second residual.
        momentum_kind: `heavy_ball` (equation 10), `adam` (equation 15; first sparse layer, heavy
            ball behind it), `robust` (equations 16 to 18), `nag`, `sign`, `complex`.
        mu, gamma: momentum and step; `robust` derives its own. `nag` looks ahead by mu.
        mu_imaginary: imaginary part of mu, for `complex`.
        learnable_step: every sparse layer has a gamma of its own that is trained.
        adam_beta1, adam_beta2, adam_epsilon: the first layer's running means start at zero and are
            not corrected for it; epsilon is under the root, as in the released code.
        adam_decay: the share of x that the Adam step drops (kappa); by default all of it in
            `post_ln`, as in the released code, and nothing in `pre_ln`.
        robust_p, robust_k, robust_l: convergence rate, condition number and smoothness.
        dense_layers: layers with one feed-forward network; momentum passes them unchanged.

    Raises:
        ValueError: an unknown style or kind, or momentum that diverges.
    """

    model_type = "momentum_smoe"
    _auto_class = "AutoConfig"  # save_pretrained then puts this file beside the weights

    block_style: str = "pre_ln"
    momentum_kind: str = "heavy_ball"
    mu: float | int = 0.7
    mu_imaginary: float | int = 0.0
    gamma: float | int = 1.0
    learnable_step: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_decay: float | int | None = None
    robust_p: float = 0.2
    robust_k: float = 1.25
    robust_l: float | int = 1.0
    dense_layers: list[int] | None = None

    def __post_init__(self, **kwargs: object) -> None:
        """Defaults that hang on others, and a check."""
        if self.adam_decay is None:
            self.adam_decay = 1.0 if self.block_style == "post_ln" else 0.0
        self.dense_layers = sorted(set(self.dense_layers or ()))
        super().__post_init__(**kwargs)
        _check(self)

    @property
    def rates(self) -> Rates:
        """The coefficients of all sparse layers (of all but the first for `adam`)."""
        if self.momentum_kind == "robust":
            return robust_rates(self.robust_p, self.robust_k, self.robust_l)
        ahead = self.mu if self.momentum_kind == "nag" else 0.0
        imaginary = self.mu_imaginary if self.momentum_kind == "complex" else 0.0
        return Rates(self.mu, self.gamma, ahead, imaginary)

    @property
    def momentum_parts(self) -> int:
        """Tensors that the momentum consists of: real and imaginary part, or one."""
        return 2 if self.momentum_kind == "complex" else 1

    @property
    def sparse_layers(self) -> list[int]:
        """Layers with experts, in ascending order."""
        dense = set(self.dense_layers or ())
        return [index for index in range(self.num_hidden_layers) if index not in dense]

    @property
    def error_gains(self) -> dict[int, float]:
        """Sparse layer -> how much of an error in its output reaches the last layer's x.

        gamma (1 - mu^n) / (1 - mu) for n sparse layers from it on; exact where what lies between
        does not react to the error. The plain residual has gain 1 throughout.
        """
        rates, layers = self.rates, self.sparse_layers
        mu = complex(rates.mu, rates.mu_imaginary)
        gains = [sum(mu**i for i in range(n)) for n in range(len(layers), 0, -1)]
        return {k: rates.gamma * g.real for k, g in zip(layers, gains, strict=True)}


def robust_rates(p: float, k: float, smoothness: float) -> Rates:
    """Equation 18 of arXiv 2410.14574: gamma, mu and alpha from p, k = L/m and L."""
    rest = (1 - p) ** 2 * (1 + p)
    return Rates(
        mu=k * p**3 / (k - 1),
        gamma=k * rest / smoothness,
        look_ahead=p**3 / ((k - 1) * rest),
    )


def _check(config: MomentumConfig) -> None:
    if config.block_style not in STYLES:
        raise ValueError(f"block_style is {config.block_style!r}; known are {', '.join(STYLES)}")
    if config.momentum_kind not in KINDS:
        raise ValueError(f"momentum_kind is {config.momentum_kind!r}; known: {', '.join(KINDS)}")
    rates = config.rates
    if not abs(complex(rates.mu, rates.mu_imaginary)) < 1:
        raise ValueError(f"momentum grows without bound: |mu| must be below 1, found {rates}")
    if config.block_style == "post_ln" and config.router_jitter_noise:
        raise ValueError("post_ln blocks have no jitter: it would change the residual as well")
