"""The decorrelation regularizer D(Z) and its relatives, chosen by name.

Each takes features of one layer and returns a scalar that is 0 when the channels within each group are uncorrelated
(or white, where the form asks for unit variance too). All are computed in at least float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu

from sdecor.whitening import covariance, full_precision, grouped, whitening_matrix

_VARIANCE_FLOOR = 1e-8  # below it a channel counts as constant: it correlates with nothing


def _off_diagonal(m: Tensor) -> Tensor:
    """Entries of ``(..., g, g)`` with the diagonal set to 0."""
    return m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1))


def correlation_matrix(cov: Tensor) -> Tensor:
    """Correlations of each group from its covariance ``(G, g, g)``; rows of constant channels are 0."""
    scale = cov.diagonal(dim1=-2, dim2=-1).clamp_min(_VARIANCE_FLOOR).sqrt()
    return cov / (scale.unsqueeze(-1) * scale.unsqueeze(-2))


def _correlation(x: Tensor) -> Tensor:
    c = correlation_matrix(covariance(x)[1])
    pairs = max(c.shape[-1] * (c.shape[-1] - 1), 1)
    return (_off_diagonal(c).square().sum((-2, -1)) / pairs).mean()


def _zca(x: Tensor) -> Tensor:
    with torch.no_grad():
        mean, cov = covariance(x)
        white = (x - mean) @ whitening_matrix(cov).mT
    return mse_loss(x - mean, white)  # the gradient through the mean is 0: both have mean 0


def _covariance(x: Tensor) -> Tensor:
    cov = covariance(x)[1]
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return ((cov - identity).square().sum((-2, -1)) / cov.shape[-1]).mean()


def _barlow(x: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    c = correlation_matrix(covariance(x)[1])
    on = (1 - c.diagonal(dim1=-2, dim2=-1)).square().sum(-1)
    return (on + off_diagonal_weight * _off_diagonal(c).square().sum((-2, -1))).mean()


def _vicreg(x: Tensor, variance_weight: float = 25.0) -> Tensor:
    unbiased = covariance(x)[1] * (x.shape[1] / (x.shape[1] - 1))
    std = (unbiased.diagonal(dim1=-2, dim2=-1) + 1e-4).sqrt()
    off = _off_diagonal(unbiased).square().sum((-2, -1)) / x.shape[-1]
    return (variance_weight * relu(1 - std).mean(-1) + off).mean()


def _decov(x: Tensor) -> Tensor:
    return (_off_diagonal(covariance(x)[1]).square().sum((-2, -1)) / 2).mean()


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "correlation": _correlation,
    "zca": _zca,
    "covariance": _covariance,
    "barlow": _barlow,
    "vicreg": _vicreg,
    "decov": _decov,
}


def decorrelation(
    z: Tensor, *, kind: str = "correlation", group_size: int | None = 16, layer: str = "features"
) -> Tensor:
    """How far the channels of `z` are from uncorrelated, averaged over groups.

    Args:
        z: Features ``(B, C)`` or ``(B, C, H, W)``; every position of a map counts as a sample.
        kind: One of

            - ``correlation``: mean squared off-diagonal correlation, in [0, 1], blind to scale (our default);
            - ``zca``: mean squared distance to the features' own ZCA-whitened version, which is held fixed;
            - ``covariance``: ``||cov - I||_F^2 / g``;
            - ``barlow``: the redundancy reduction of Barlow Twins with the batch as both views (arXiv:2103.03230);
            - ``vicreg``: variance hinge and covariance term of VICReg (arXiv:2105.04906);
            - ``decov``: half the squared off-diagonal covariances, DeCov (arXiv:1511.06068).
        group_size: Channels per group; None for one group of all channels.
        layer: Name used in error messages.

    Returns:
        Scalar >= 0, float32 or float64.

    Raises:
        ValueError: If `kind` is unknown, or as `sdecor.whitening.grouped`.

    Source:
        The role of the term is that of SaliencyDecor (arXiv:2604.25315); its exact form there is not public.

    Example:
        >>> z = torch.tensor([[1., 1.], [-1., -1.], [1., 1.], [-1., -1.]])
        >>> decorrelation(z, group_size=2)
        tensor(1.)
    """
    if kind not in KINDS:
        raise ValueError(f"unknown decorrelation '{kind}'; known: {', '.join(KINDS)}")
    with torch.autocast(z.device.type, enabled=False):
        return KINDS[kind](grouped(full_precision(z), group_size, layer=layer))
