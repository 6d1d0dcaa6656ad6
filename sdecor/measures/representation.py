"""How correlated the features of a layer are, measured on held-out data.

Features are (N, C), or (N, C, H, W), where every position counts as a sample. Both measures look at the features only
through their covariance, so that a data set of any size is measured in one pass, batch by batch: see `Covariance`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Covariance:
    """Covariance of features, accumulated over batches in float64 and in one pass.

    Args:
        max_samples: use at most this many samples of each batch, a fixed random choice; all of them by default.

    Attributes:
        samples: number of samples so far, positions included.

    Source: Chan, Golub and LeVeque 1983, doi:10.1080/00031305.1983.10483115 (the pairwise update).

    Example:
        >>> features = Covariance()
        >>> for batch in torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 1.0], [3.0, 1.0]]).split(2):
        ...     features.update(batch)
        >>> features.matrix
        tensor([[2.0000, 0.5000],
                [0.5000, 0.5000]], dtype=torch.float64)
    """

    def __init__(self, max_samples: int | None = None) -> None:
        if max_samples is not None and max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {max_samples}")
        self.samples = 0
        self._max_samples = max_samples
        self._origin = self._mean = self._scatter = torch.empty(0)  # mean and scatter are those of features - origin

    def update(self, features: Tensor) -> None:
        """Add a batch.

        Args:
            features: (N, C) or (N, C, H, W), where every position is a sample; not modified.

        Raises:
            ValueError: another shape, no samples, NaN or infinite values, or other channels than the batches before.
        """
        rows = _samples(features, self._max_samples).double()
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
        """The covariance, (C, C) float64, divided by the number of samples; a constant feature's row is exactly 0.

        Raises:
            ValueError: no batch was added.
        """
        if self.samples == 0:
            raise ValueError("no features were added; call update(features) first")
        return self._scatter / self.samples


def mean_abs_correlation(features: Tensor | Covariance) -> Tensor:
    """Mean absolute correlation between different features: 0 if uncorrelated, 1 if all are copies of one.

    The mean absolute correlation of N independent Gaussian samples is not 0 but about sqrt(2 / (pi N)).

    Args:
        features: (N, C) or (N, C, H, W), or the `Covariance` of a whole data set.

    Returns:
        Scalar, float64 in [0, 1]. Constant features are left out; NaN if fewer than two features vary.

    Raises:
        ValueError: see `Covariance.update`.

    Example:
        >>> features = torch.tensor([[1.0, -1.0, 5.0], [2.0, -2.0, 5.0], [3.0, -3.0, 5.0]])
        >>> round(mean_abs_correlation(features).item(), 6)
        1.0
    """
    matrix = _matrix(features)
    varies = matrix.diagonal() > 0
    matrix = matrix[varies][:, varies]
    count = len(matrix)
    if count < 2:
        return torch.tensor(math.nan, dtype=torch.float64, device=matrix.device)
    scale = matrix.diagonal().rsqrt()
    correlation = (matrix * scale * scale[:, None]).abs().clamp(max=1)
    return (correlation.sum() - correlation.diagonal().sum()) / (count * (count - 1))


def effective_rank(features: Tensor | Covariance) -> Tensor:
    """Effective rank: the exponential of the entropy of the singular values of the centred features.

    It is 1 if all features are multiples of one, and C if all directions have equal variance. It depends on the scale
    of each feature: one loud feature lowers it.

    Args:
        features: (N, C) or (N, C, H, W), or the `Covariance` of a whole data set.

    Returns:
        Scalar, float64 in [1, C]; NaN if no feature varies.

    Raises:
        ValueError: see `Covariance.update`.

    Source: Roy and Vetterli 2007, EUSIPCO, pp. 606-610, https://ieeexplore.ieee.org/document/7098875; here of
    the centred data.

    Example:
        >>> round(effective_rank(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])).item(), 6)
        2.0
    """
    matrix = _matrix(features)
    eigenvalues = torch.linalg.eigvalsh(matrix)
    # rounding leaves eigenvalues of about 1e-16 of the largest where 0 is meant; the root would make 1e-8 of them
    floor = eigenvalues[-1] * len(matrix) * torch.finfo(torch.float64).eps
    singular = torch.where(eigenvalues > floor, eigenvalues, 0).sqrt()
    share = singular / singular.sum()
    return torch.exp(-torch.xlogy(share, share).sum())


def _matrix(features: Tensor | Covariance) -> Tensor:
    if isinstance(features, Covariance):
        return features.matrix
    covariance = Covariance()
    covariance.update(features)
    return covariance.matrix


def _samples(features: Tensor, max_samples: int | None) -> Tensor:
    if features.ndim not in (2, 4):
        raise ValueError(f"features must have shape (N, C) or (N, C, H, W), got {tuple(features.shape)}")
    rows = features.detach().movedim(1, -1).flatten(0, -2)
    if rows.numel() == 0:
        raise ValueError(f"features have no samples or no channels: their shape is {tuple(features.shape)}")
    if not rows.isfinite().all():
        raise ValueError("features have NaN or infinite values")
    if max_samples is not None and len(rows) > max_samples:
        # an even stride could meet the same column of every feature map
        choice = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:max_samples]
        rows = rows[choice.to(rows.device)]
    return rows
