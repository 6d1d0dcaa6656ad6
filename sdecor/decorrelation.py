"""The decorrelation regularizer D(Z) and its relatives, chosen by name.

A penalty takes the features of one layer in groups, ``(G, N, g)`` of at least float32 (`sdecor.whitening.grouped`), and
gives a scalar that is 0 when the channels within each group are uncorrelated, or white where it asks for unit variance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, relu

from sdecor import processes
from sdecor.registers import PENALTIES
from sdecor.whitening import covariance, full_precision, grouped, require_tensors, whitened

penalty = PENALTIES.register
_VARIANCE_FLOOR = 1e-8  # below it a channel counts as constant: it correlates with nothing


def _squares_off_diagonal(m: Tensor) -> Tensor:
    """Sum of the squared entries of ``(..., g, g)`` off the diagonal."""
    return (m - torch.diag_embed(m.diagonal(dim1=-2, dim2=-1))).square().sum((-2, -1))


def correlation_matrix(cov: Tensor) -> Tensor:
    """Correlations of each group from its covariance ``(G, g, g)``; rows of constant channels are 0.

    Below a standard deviation of 1e-4 a channel is divided by that, and not by its own.
    """
    scale = cov.diagonal(dim1=-2, dim2=-1).clamp_min(_VARIANCE_FLOOR).sqrt()
    return cov / (scale.unsqueeze(-1) * scale.unsqueeze(-2))


@penalty(label="squared correlation")
def correlation(x: Tensor) -> Tensor:
    """Mean squared off-diagonal correlation, in [0, 1]; our default.

    It is blind to scale down to a standard deviation of 1e-4: a channel below that counts the less, the smaller it is.
    """
    c = correlation_matrix(covariance(x)[1])
    pairs = max(c.shape[-1] * (c.shape[-1] - 1), 1)
    return (_squares_off_diagonal(c) / pairs).mean()


@penalty(label="distance to ZCA", source="arXiv:1804.08450")
def zca(x: Tensor) -> Tensor:
    """Mean squared distance to the features' own ZCA-whitened version, which is held fixed."""
    with torch.no_grad():
        white, mean = whitened(x), processes.mean(x.mean(1, keepdim=True))
    return mse_loss(x - mean, white)  # the gradient through the mean is 0: both have mean 0


@penalty(name="covariance", label="covariance to identity")
def covariance_to_identity(x: Tensor) -> Tensor:
    """Squared Frobenius distance of the covariance to the identity, over g."""
    cov = covariance(x)[1]
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    return ((cov - identity).square().sum((-2, -1)) / cov.shape[-1]).mean()


@penalty(label="Barlow Twins", source="arXiv:2103.03230")
def barlow(x: Tensor, off_diagonal_weight: float = 0.0051) -> Tensor:
    """The redundancy reduction of Barlow Twins with the batch as both views; blind to scale as `correlation` is."""
    c = correlation_matrix(covariance(x)[1])
    on = (1 - c.diagonal(dim1=-2, dim2=-1)).square().sum(-1)
    return (on + off_diagonal_weight * _squares_off_diagonal(c)).mean()


@penalty(label="VICReg", source="arXiv:2105.04906")
def vicreg(x: Tensor, variance_weight: float = 25.0) -> Tensor:
    """Variance hinge and covariance term of VICReg."""
    count = x.shape[1] * processes.parts()
    unbiased = covariance(x)[1] * (count / (count - 1))
    std = (unbiased.diagonal(dim1=-2, dim2=-1) + 1e-4).sqrt()
    return (variance_weight * relu(1 - std).mean(-1) + _squares_off_diagonal(unbiased) / x.shape[-1]).mean()


@penalty(label="DeCov", source="arXiv:1511.06068")
def decov(x: Tensor) -> Tensor:
    """Half the squared off-diagonal covariances."""
    return (_squares_off_diagonal(covariance(x)[1]) / 2).mean()


def decorrelation(
    z: Tensor, *, kind: str = "correlation", group_size: int | None = 16, layer: str = "features"
) -> Tensor:
    """How far the channels of `z` are from uncorrelated, averaged over groups: a scalar >= 0, float32 or float64.

    Of features ``(B, C)`` or ``(B, C, H, W)`` every position of a map counts as a sample. `kind` names a penalty,
    `group_size` is the channels per group (None for all), and `layer` is named in errors, which are those of
    `sdecor.whitening.grouped`. The role of the term is that of SaliencyDecor (arXiv:2604.25315); its exact form there
    is not public.

    Example:
        >>> z = torch.tensor([[1., 1.], [-1., -1.], [1., 1.], [-1., -1.]])
        >>> decorrelation(z, group_size=2)
        tensor(1.)
    """
    require_tensors(z=z)
    function = PENALTIES[kind].function
    with torch.autocast(z.device.type, enabled=False):
        value: Tensor = function(grouped(full_precision(z), group_size, layer=layer))
    return value
