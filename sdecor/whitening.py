"""Group-wise whitening: exact ZCA with a gradient that stays finite, Newton-Schulz, and the PCA and Cholesky variants.

All functions view features of shape ``(B, C)`` or ``(B, C, H, W)`` as ``G = C / group_size`` groups of ``N`` samples in
``g = group_size`` dimensions, where every position of a feature map is one sample. Covariances divide by ``N``.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Method = Literal["zca", "newton_schulz", "pca", "cholesky"]
METHODS: tuple[Method, ...] = get_args(Method)


def full_precision(z: Tensor) -> Tensor:
    """Return `z` in float32, or float64 if it already is: statistics of half-precision features are not trustworthy."""
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def grouped(z: Tensor, group_size: int | None, *, layer: str = "features", at_least: int = 2) -> Tensor:
    """View features as groups of samples.

    Args:
        z: Features, ``(B, C)`` or ``(B, C, H, W)``.
        group_size: Channels per group, ``g``; None puts all channels in one group.
        layer: Name used in error messages.
        at_least: Fewest samples accepted; a covariance needs 2.

    Returns:
        Tensor ``(G, N, g)`` with ``N = B`` or ``B * H * W``.

    Raises:
        ValueError: If `z` is neither 2-D nor 4-D, `group_size` does not divide ``C``, or there are too few samples.
    """
    if z.ndim not in (2, 4):
        raise ValueError(
            f"layer '{layer}' gives features of shape {tuple(z.shape)}; decorrelation needs (B, C) or (B, C, H, W)"
        )
    channels = z.shape[1]
    g = channels if group_size is None else group_size
    if g < 1 or channels % g:
        fitting = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        raise ValueError(
            f"group_size={group_size} does not divide the {channels} channels of layer '{layer}'; use one of {fitting}"
        )
    flat = z if z.ndim == 2 else z.movedim(1, -1).flatten(0, 2)
    if len(flat) < at_least:
        raise ValueError(
            f"layer '{layer}' gives {len(flat)} sample of shape {tuple(z.shape)}; "
            f"a covariance needs at least {at_least}, so use a larger batch"
        )
    return flat.reshape(len(flat), channels // g, g).transpose(0, 1)


def ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """Undo `grouped`: ``(G, N, g)`` back to the shape of `like`."""
    flat = x.transpose(0, 1).flatten(1)
    if like.ndim == 2:
        return flat
    b, c, h, w = like.shape
    return flat.view(b, h, w, c).movedim(-1, 1)


class _Covariance(torch.autograd.Function):
    """Covariance of samples given their mean; its gradient takes one product where autograd would take two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> Tensor:
        centred = x - mean
        ctx.save_for_backward(centred)
        return centred.mT @ centred / x.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (centred,) = ctx.saved_tensors
        g = grads[0] / centred.shape[1]
        d = centred @ (g + g.mT)
        return d.sub_(d.mean(1, keepdim=True)), None


def covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance of each group.

    Args:
        x: Grouped samples ``(G, N, g)``.

    Returns:
        Mean ``(G, 1, g)`` and covariance ``(G, g, g)``, both divided by ``N``. The latter is differentiable once.
    """
    mean = x.mean(1, keepdim=True)
    cov: Tensor = _Covariance.apply(x, mean.detach())  # type: ignore[no-untyped-call]
    return mean, cov


class _InverseSqrt(torch.autograd.Function):
    """S^(-1/2) by eigendecomposition, with the Daleckii-Krein derivative.

    Differentiating eigenvectors divides by differences of eigenvalues, which is NaN at S = I. The derivative of the
    *function* S^(-1/2) needs sums only: dS = -U [(U' sym(G) U) * K] U' with K_ij = 1 / (r_i r_j (r_i + r_j)) and
    r the root of the eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Tensor:
        eigenvalues, u = torch.linalg.eigh(s)
        r = eigenvalues.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
        ctx.save_for_backward(r, u)
        root: Tensor = (u / r.unsqueeze(-2)) @ u.mT
        return root

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        r, u = ctx.saved_tensors
        g = (grads[0] + grads[0].mT) / 2
        ri, rj = r.unsqueeze(-1), r.unsqueeze(-2)
        ds: Tensor = -u @ ((u.mT @ g @ u) / (ri * rj * (ri + rj))) @ u.mT
        return ds


def inverse_sqrt(s: Tensor) -> Tensor:
    """Symmetric inverse square root of positive definite matrices, with a gradient that is finite at equal eigenvalues.

    Args:
        s: Matrices ``(..., g, g)``; only the symmetric part counts.

    Returns:
        ``s ** (-1/2)``, of the shape of `s`. Differentiable once.

    Source:
        Daleckii and Krein (1965); Higham, *Functions of Matrices* (2008), theorem 3.11.

    Example:
        >>> inverse_sqrt(4 * torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    out: Tensor = _InverseSqrt.apply((s + s.mT) / 2)  # type: ignore[no-untyped-call]
    return out


def newton_schulz(s: Tensor, *, iterations: int = 40, tolerance: float | None = None) -> Tensor:
    """Inverse square root by the coupled Newton-Schulz iteration: matrix products only.

    Args:
        s: Symmetric positive definite matrices ``(..., g, g)``.
        iterations: At most this many. IterNorm stops at 5, which is not white yet when the condition number is large.
        tolerance: Stop once ``max |I - Z Y|`` is below it; None takes the square root of the dtype's precision, 0 never
            stops early.

    Returns:
        Approximation of ``s ** (-1/2)``. Each step at most multiplies a small eigenvalue of ``Z Y`` by 9/4, so a
        condition number ``k`` needs about ``log(k) / log(9/4)`` steps before convergence turns quadratic.

    Source:
        Higham (2008), section 6.7; Huang et al. 2019 (arXiv:1904.03441) for its use in whitening.
    """
    if tolerance is None:
        tolerance = torch.finfo(s.dtype).eps ** 0.5
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    norm = torch.linalg.matrix_norm(s, keepdim=True)
    y, z = s / norm, identity.expand_as(s)
    for _ in range(iterations):
        residual = identity - z @ y
        if tolerance > 0 and bool(residual.detach().abs().amax() < tolerance):
            break
        t = identity + residual / 2
        y, z = y @ t, t @ z
    out: Tensor = z / norm.sqrt()
    return out


def whitening_matrix(cov: Tensor, *, method: Method = "zca", eps: float = 1e-5) -> Tensor:
    """Matrix ``W`` with ``W (cov + eps I) W' = I``.

    Args:
        cov: Covariances ``(G, g, g)``.
        method: ``zca`` (symmetric, exact), ``newton_schulz`` (symmetric, iterated), ``pca`` (rotated to the
            eigenvectors, whose order and sign jump between batches, and whose gradient is NaN where eigenvalues are
            equal) or ``cholesky`` (lower triangular).
        eps: Added to the diagonal, in squared units of the features. Never less than the rounding error of `cov`, about
            its trace times the dtype's precision: below that, the eigenvalues of redundant channels may be negative.

    Returns:
        ``W`` of shape ``(G, g, g)``; a sample is whitened as ``W (z - mean)``.

    Raises:
        ValueError: If `method` is unknown.

    Source:
        Kessy, Lewin, Strimmer 2018 (doi:10.1080/00031305.2016.1277159).
    """
    identity = torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
    rounding = 2 * torch.finfo(cov.dtype).eps * cov.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    s = cov + rounding.clamp_min(eps)[..., None, None] * identity
    if method == "zca":
        return inverse_sqrt(s)
    if method == "newton_schulz":
        return newton_schulz(s)
    if method == "pca":
        eigenvalues, u = torch.linalg.eigh(s)
        rotated: Tensor = (u / eigenvalues.sqrt().unsqueeze(-2)).mT
        return rotated
    if method == "cholesky":
        triangular: Tensor = torch.linalg.solve_triangular(torch.linalg.cholesky(s), identity.expand_as(s), upper=False)
        return triangular
    raise ValueError(f"unknown whitening method '{method}'; known: {', '.join(METHODS)}")


def whiten(
    z: Tensor, group_size: int | None = 16, *, method: Method = "zca", eps: float = 1e-5, layer: str = "features"
) -> Tensor:
    """Whiten features with the statistics of their own batch, group by group.

    Args:
        z: Features ``(B, C)`` or ``(B, C, H, W)``.
        group_size: Channels per group; None for one group.
        method: See `whitening_matrix`.
        eps: Added to the diagonal of each covariance. Keeps constant channels and batches smaller than a group finite.
        layer: Name used in error messages.

    Returns:
        Features of the shape of `z`, float32 or float64, with mean 0 and, for `eps` far below the smallest eigenvalue,
        covariance I in each group.

    Raises:
        ValueError: As `grouped` and `whitening_matrix`.

    Source:
        Huang et al. 2018 (arXiv:1804.08450).
    """
    with torch.autocast(z.device.type, enabled=False):
        x = grouped(full_precision(z), group_size, layer=layer)
        mean, cov = covariance(x)
        w = whitening_matrix(cov, method=method, eps=eps)
        return ungrouped((x - mean) @ w.mT, z)


class GroupWhitening(nn.Module):
    """Whitening as a layer, for the baseline that changes the architecture and for teaching.

    In training it whitens with the batch's statistics and averages the mean and the *covariance*. In evaluation it uses
    those averages; averaging the whitening matrix instead would be biased, since the inverse root is not linear.
    Input gradients exist in both modes.

    Args:
        num_features: Channels ``C``.
        group_size: Channels per group.
        method: See `whitening_matrix`.
        eps: Added to the diagonal.
        momentum: Weight of the newest batch in the running statistics.

    Set `track_running_stats` to False to leave the averages alone while training, as for batch norm.

    Raises:
        ValueError: If `group_size` does not divide `num_features`; on use, as `grouped` and `whitening_matrix`.
    """

    running_mean: Tensor
    running_covariance: Tensor

    def __init__(
        self,
        num_features: int,
        group_size: int = 16,
        *,
        method: Method = "zca",
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        grouped(torch.empty(2, num_features), group_size, layer="GroupWhitening")
        self.group_size, self.method, self.eps, self.momentum = group_size, method, eps, momentum
        self.track_running_stats = True
        groups = num_features // group_size
        self.register_buffer("running_mean", torch.zeros(groups, 1, group_size))
        self.register_buffer("running_covariance", torch.eye(group_size).repeat(groups, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Whiten ``(B, C)`` or ``(B, C, H, W)``; the shape is kept, half precision comes back as float32."""
        with torch.autocast(z.device.type, enabled=False):
            zf = full_precision(z)
            x = grouped(zf, self.group_size, layer="GroupWhitening", at_least=2 if self.training else 0)
            if len(x) != len(self.running_mean):
                made_for = self.running_mean.numel()
                raise ValueError(f"GroupWhitening was made for {made_for} channels, got shape {tuple(z.shape)}")
            if self.training:
                mean, cov = covariance(x)
                if self.track_running_stats:
                    with torch.no_grad():
                        unbiased = cov * (x.shape[1] / (x.shape[1] - 1))
                        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                        self.running_covariance.lerp_(unbiased.to(self.running_covariance), self.momentum)
            else:
                mean, cov = self.running_mean.to(zf), self.running_covariance.to(zf)
            w = whitening_matrix(cov, method=self.method, eps=self.eps)
            return ungrouped((x - mean) @ w.mT, zf)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"groups={len(self.running_mean)}, group_size={self.group_size}, method={self.method!r}, eps={self.eps}"
