"""How correlated the features of a layer are, and how alike those of two layers, measured on held-out data.

Features are (N, C), or (N, C, H, W), where every position counts as a sample. All measures look at the features only
through their covariance, so that a data set of any size is measured in one pass, batch by batch: they take features or
the `Covariance` of all of them, and give a float64 scalar, NaN if no feature varies. All but the correlation depend on
the scale of each feature. They raise ValueError for another shape, no samples, and NaN or infinite values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sdecor.whitening import require_tensors


class Covariance:
    """Covariance of features, accumulated over batches in float64 and in one pass.

    Source: Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115 (the pairwise update).

    Example:
        >>> features = Covariance()
        >>> for batch in torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 1.0], [3.0, 1.0]]).split(2):
        ...     features.update(batch)
        >>> features.matrix
        tensor([[2.0000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """

    samples = 0  #: Number of samples so far, positions included.
    _origin = _mean = _scatter = torch.empty(0)  # mean and scatter are those of features - origin

    def update(self, features: Tensor) -> None:
        """Add a batch, with as many channels as the batches before; it is not modified."""
        rows = _samples(features).double()
        if self.samples == 0:
            self._origin = rows[0]
            self._mean = torch.zeros_like(rows[0])
            self._scatter = self._mean.outer(self._mean)
        if rows.shape[1] != len(self._mean):
            raise ValueError(f"features have {rows.shape[1]} channels, the batches before had {len(self._mean)}")
        rows = rows - self._origin  # makes a constant feature exactly 0, whatever its value
        delta = rows.mean(0) - self._mean
        rows = rows - rows.mean(0)
        total = self.samples + len(rows)
        self._scatter = self._scatter + rows.T @ rows + delta.outer(delta) * (self.samples * len(rows) / total)
        self._mean = self._mean + delta * (len(rows) / total)
        self.samples = total

    @property
    def matrix(self) -> Tensor:
        """The covariance, (C, C) float64, divided by the number of samples; a constant feature's row is exactly 0."""
        if self.samples == 0:
            raise ValueError("no features were added; call update(features) first")
        return self._scatter / self.samples


def mean_abs_correlation(features: Tensor | Covariance) -> Tensor:
    """Mean absolute correlation between different features: 0 if uncorrelated, 1 if all are copies of one.

    That of N independent Gaussian samples is about sqrt(2 / (pi N)). Constant features are left out; NaN for fewer than
    two others.
    """
    matrix = _matrix(features)
    varies = matrix.diagonal() > 0
    matrix = matrix[varies][:, varies]
    scale = matrix.diagonal().rsqrt()
    correlation = (matrix * scale * scale[:, None]).abs().clamp(max=1)
    pairs = len(matrix) * (len(matrix) - 1)
    return (correlation.sum() - correlation.diagonal().sum()) / (pairs or math.nan)


def effective_rank(features: Tensor | Covariance) -> Tensor:
    """Effective rank: the exponential of the entropy of the singular values of the centred features.

    From 1 if all are multiples of one to C if all directions have equal variance; one loud feature lowers it.
    Source: Roy and Vetterli 2007, EUSIPCO, https://ieeexplore.ieee.org/document/7098875; here of the centred data.
    """
    singular = _eigenvalues(features).sqrt()
    share = singular / singular.sum()
    return torch.exp(-torch.xlogy(share, share).sum())


def participation_ratio(features: Tensor | Covariance) -> Tensor:
    """Participation ratio: how many directions share the variance, (sum l)^2 / sum l^2 of its eigenvalues l, 1 to C.

    Small directions count less than in `effective_rank`. N samples of C independent features of equal variance score
    not C but about N C / (N + C).
    Source: Gao et al. 2017, doi:10.1101/214262.
    """
    matrix = _matrix(features)
    return (matrix / matrix.trace()).square().sum().reciprocal()


def condition_number(features: Tensor | Covariance) -> Tensor:
    """Condition number of the covariance, its largest eigenvalue over its smallest; lower is whiter, and 1 is white.

    It is infinite if a feature is constant or a sum of others, up to rounding, as where N <= C. N samples of C
    independent features of equal variance have about ((1 + r) / (1 - r))^2 with r = sqrt(C / N).
    Source: for this value Marchenko and Pastur 1967, doi:10.1070/SM1967v001n04ABEH001994.
    """
    eigenvalues = _eigenvalues(features)
    return eigenvalues[-1] / eigenvalues[0]


def cka(a: Tensor | Covariance, b: Tensor | int) -> Tensor:
    """Linear centred kernel alignment: how alike two sets of features of the same samples are, in [0, 1].

    Of a whole data set, give the `Covariance` of both sets side by side, and the number of features of the first.

    It is 1 if one set is a rotated, reflected, shifted and evenly scaled copy of the other, 0 if no feature of one
    correlates with one of the other, and NaN if one is constant. Two independent sets of A and B white features of N
    samples score about sqrt(A B / ((N + A) (N + B))): near 1 where samples are few.
    Source: Kornblith et al. 2019, arXiv:1905.00414.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        both, split = (_samples(a), _samples(b)), a.shape[1]
        if (len(a), a.shape[2:]) != (len(b), b.shape[2:]):
            raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; only their channels may differ")
        matrix = _matrix(torch.cat(both, 1))
    elif isinstance(a, Covariance) and isinstance(b, int):
        matrix, split = a.matrix, b
    else:
        raise ValueError(
            f"cka takes two tensors, or a Covariance and a number, got {type(a).__name__}, {type(b).__name__}"
        )
    if not 0 < split < len(matrix):
        raise ValueError(f"{split} of {len(matrix)} features are of the first set; each set needs at least one")
    squares = matrix.square()
    within = squares[:split, :split].sum().sqrt() * squares[split:, split:].sum().sqrt()
    return (squares[:split, split:].sum() / within).clamp(max=1)


def _eigenvalues(features: Tensor | Covariance) -> Tensor:
    """Eigenvalues of the covariance, ascending, 0 where rounding leaves about 1e-16 of the largest."""
    eigenvalues = torch.linalg.eigvalsh(_matrix(features))
    floor = eigenvalues[-1] * len(eigenvalues) * torch.finfo(torch.float64).eps
    return torch.where(eigenvalues > floor, eigenvalues, 0)


def _matrix(features: Tensor | Covariance) -> Tensor:
    if not isinstance(features, Covariance):
        rows, features = features, Covariance()
        features.update(rows)
    return features.matrix


def _samples(features: Tensor) -> Tensor:
    require_tensors(features=features)
    if features.ndim not in (2, 4):
        raise ValueError(f"features must have shape (N, C) or (N, C, H, W), got {tuple(features.shape)}")
    rows = features.detach().movedim(1, -1).flatten(0, -2)
    if rows.numel() == 0:
        raise ValueError(f"features have no samples or no channels: their shape is {tuple(features.shape)}")
    if not rows.isfinite().all():
        raise ValueError("features have NaN or infinite values")
    return rows
