"""Group-wise whitening: exact ZCA with a gradient that stays finite, Newton-Schulz, and the PCA and Cholesky variants.

All functions view features ``(B, C)`` or ``(B, C, H, W)`` as ``G = C / group_size`` groups of ``N`` samples in
``g = group_size`` dimensions, ``(G, N, g)``, where every position of a feature map is one sample; a `group_size` of
None puts all channels in one group. Covariances ``(G, g, g)`` divide by ``N``, are differentiable once, and get `eps`
added to their diagonals, in squared units of the features. What does not fit is a ValueError that names the `layer`.

The methods (Kessy, Lewin, Strimmer 2018, doi:10.1080/00031305.2016.1277159) are ``zca`` (symmetric, exact),
``newton_schulz`` (symmetric, iterated), ``pca`` (rotated to the eigenvectors, whose order and sign jump between
batches, and whose gradient is NaN where eigenvalues are equal) and ``cholesky`` (lower triangular).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sdecor import processes
from sdecor.registers import Between, OneOf

Method = Literal["zca", "newton_schulz", "pca", "cholesky"]
METHODS: tuple[Method, ...] = get_args(Method)


def require_tensors(**values: object) -> None:
    """Say which of the values, by their names, is no tensor of real numbers, if one is not."""
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}; pass torch.as_tensor({name})")
        if value.is_complex():
            raise ValueError(f"{name} must be real, got {value.dtype}")


def full_precision(z: Tensor) -> Tensor:
    """Return `z` in float32, or float64 if it already is: statistics of half-precision features are not trustworthy."""
    return z if z.dtype in (torch.float32, torch.float64) else z.float()


def grouped(z: Tensor, group_size: int | None, *, layer: str = "features", at_least: int = 2) -> Tensor:
    """View features as groups of samples ``(G, N, g)``; a covariance needs `at_least` two of these."""
    if z.ndim not in (2, 4):
        what = f"gives features of shape {tuple(z.shape)}; decorrelation needs (B, C) or (B, C, H, W)"
        raise ValueError(f"layer '{layer}' {what}")
    channels = z.shape[1]
    g = channels if group_size is None else group_size
    if not isinstance(g, int) or g < 1 or channels % g:
        fitting = ", ".join(str(d) for d in range(1, channels + 1) if channels % d == 0)
        what = f"does not divide the {channels} channels of layer '{layer}'; use one of {fitting}"
        raise ValueError(f"group_size={group_size} {what}")
    flat = z if z.ndim == 2 else z.movedim(1, -1).flatten(0, 2)
    if len(flat) * processes.parts() < at_least:
        what = f"a covariance needs at least {at_least}, so use a larger batch"
        raise ValueError(f"layer '{layer}' gives {len(flat)} sample of shape {tuple(z.shape)}; {what}")
    return flat.reshape(len(flat), channels // g, g).transpose(0, 1)


def ungrouped(x: Tensor, like: Tensor) -> Tensor:
    """Undo `grouped`: ``(G, N, g)`` back to the shape of `like`."""
    flat = x.transpose(0, 1).flatten(1)
    return flat if like.ndim == 2 else flat.view(len(like), *like.shape[2:], like.shape[1]).movedim(-1, 1)


class _Covariance(torch.autograd.Function):
    """Covariance of samples given their mean; its gradient takes one product where autograd would take two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor) -> Tensor:
        centred = x - mean
        ctx.save_for_backward(centred)
        ctx.whole = processes.parts() == 1
        return centred.mT @ centred / x.shape[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (centred,) = ctx.saved_tensors
        g = grads[0] / centred.shape[1]
        d = centred @ (g + g.mT)
        return (d.sub_(d.mean(1, keepdim=True)) if ctx.whole else d), None  # over all parts that mean is 0


def covariance(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(G, 1, g)`` and covariance ``(G, g, g)`` of grouped samples ``(G, N, g)``."""
    mean = processes.mean(x.mean(1, keepdim=True))
    return mean, processes.mean(_Covariance.apply(x, mean.detach()))  # type: ignore[no-untyped-call]


class _InverseSqrt(torch.autograd.Function):
    """S^(-1/2) by eigendecomposition, with the Daleckii-Krein derivative.

    Differentiating eigenvectors divides by differences of eigenvalues, which is NaN at S = I. The derivative of the
    *function* S^(-1/2) needs sums only: dS = -U [(U' sym(G) U) * K] U' with K_ij = 1 / (r_i r_j (r_i + r_j)) and
    r the root of the eigenvalues.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor) -> Any:
        eigenvalues, u = torch.linalg.eigh(s)
        r = eigenvalues.clamp_min(torch.finfo(s.dtype).tiny).sqrt()
        ctx.save_for_backward(r, u)
        return (u / r.unsqueeze(-2)) @ u.mT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        r, u = ctx.saved_tensors
        g = (grads[0] + grads[0].mT) / 2
        ri, rj = r.unsqueeze(-1), r.unsqueeze(-2)
        return -u @ ((u.mT @ g @ u) / (ri * rj * (ri + rj))) @ u.mT


def inverse_sqrt(s: Tensor) -> Tensor:
    """``s ** (-1/2)`` of positive definite ``(..., g, g)``, with a gradient that is finite at equal eigenvalues.

    Only the symmetric part counts. See Daleckii and Krein (1965); Higham, *Functions of Matrices* (2008), theorem 3.11.

    Example:
        >>> inverse_sqrt(4 * torch.eye(2))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])
    """
    out: Tensor = _InverseSqrt.apply((s + s.mT) / 2)  # type: ignore[no-untyped-call]
    return out


def newton_schulz(s: Tensor, *, iterations: int = 40, tolerance: float | None = None) -> Tensor:
    """``s ** (-1/2)`` of symmetric ``(..., g, g)`` by the coupled Newton-Schulz iteration: matrix products only.

    It stops once ``max |I - Z Y|`` is below `tolerance`: None takes the square root of the dtype's precision, 0 never
    stops early. A condition number ``k`` needs about ``log(k) / log(9/4)`` steps before convergence turns quadratic;
    IterNorm (Huang et al. 2019, arXiv:1904.03441) stops at 5. See Higham (2008), section 6.7.
    """
    enough = torch.finfo(s.dtype).eps ** 0.5 if tolerance is None else tolerance
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    norm = torch.linalg.matrix_norm(s, keepdim=True)
    y, z = s / norm, identity.expand_as(s)
    for _ in range(iterations):
        residual = identity - z @ y
        if enough > 0 and bool(residual.detach().abs().amax() < enough):
            break
        t = identity + residual / 2
        y, z = y @ t, t @ z
    out: Tensor = z / norm.sqrt()
    return out


def whitening_matrix(cov: Tensor, *, method: Method = "zca", eps: float = 1e-5) -> Tensor:
    """``W`` ``(G, g, g)`` with ``W (cov + eps I) W' = I``; a sample is whitened as ``W (z - mean)``.

    The work is done in float64. Where channels are redundant, the rounding of `cov` may leave negative eigenvalues; the
    least of a float32 covariance is added to `eps`, and to a float64 one no less than its trace times 1e-14.
    """
    OneOf(METHODS).check("whitening method", method)
    Between(0).check("eps", eps)
    identity = torch.eye(cov.shape[-1], dtype=torch.float64, device=cov.device)
    broken = ~cov.detach().isfinite().all(-1).all(-1)[..., None, None]  # no decomposition takes them: they become NaN
    s = torch.where(broken, identity, cov.double())
    ridge = (64 * torch.finfo(s.dtype).eps * s.detach().diagonal(dim1=-2, dim2=-1).sum(-1)).clamp_min(eps)
    if cov.dtype != s.dtype:
        ridge = torch.maximum(ridge, eps - torch.linalg.eigvalsh(s.detach())[..., 0])
    s = s + ridge[..., None, None] * identity
    if method == "zca":  # on a GPU an eigendecomposition, as exact, would have to be waited for
        w = newton_schulz(s, iterations=50, tolerance=0) if s.is_cuda else inverse_sqrt(s)
    elif method == "newton_schulz":
        w = newton_schulz(s)
    elif method == "pca":
        eigenvalues, u = torch.linalg.eigh(s)
        w = (u / eigenvalues.sqrt().unsqueeze(-2)).mT
    else:
        w = torch.linalg.solve_triangular(torch.linalg.cholesky(s), identity.expand_as(s), upper=False)
    return w.masked_fill(broken, torch.nan).to(cov.dtype)


def whitened(x: Tensor, *, method: Method = "zca", eps: float = 1e-5) -> Tensor:
    """Grouped samples ``(G, N, g)`` whitened with their own statistics, which are summed in float64."""
    mean, cov = covariance(x.double())
    white: Tensor = (x - mean) @ whitening_matrix(cov, method=method, eps=eps).mT
    return white.to(x.dtype)


def whiten(
    z: Tensor, group_size: int | None = 16, *, method: Method = "zca", eps: float = 1e-5, layer: str = "features"
) -> Tensor:
    """Whiten features with the statistics of their own batch, group by group (Huang et al. 2018, arXiv:1804.08450).

    The result is float32 or float64 of the shape of `z`, with mean 0 and, for `eps` far below the smallest eigenvalue,
    covariance I in each group. `eps` keeps constant channels and batches smaller than a group finite.
    """
    require_tensors(z=z)
    with torch.autocast(z.device.type, enabled=False):
        return ungrouped(whitened(grouped(full_precision(z), group_size, layer=layer), method=method, eps=eps), z)


class GroupWhitening(nn.Module):
    """Whitening as a layer, for the baseline that changes the architecture and for teaching.

    In training it whitens with the batch's statistics, and averages the mean and the *covariance* (to average the
    whitening matrix would be biased, since the inverse root is not linear) with the weight `momentum` of the newest
    batch, unless `track_running_stats` is set to False. In evaluation it uses those averages.
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
        groups = len(grouped(torch.empty(2, num_features), group_size, layer="GroupWhitening"))
        self.group_size, self.method, self.eps, self.momentum = group_size, method, eps, momentum
        self.track_running_stats = True
        self.register_buffer("running_mean", torch.zeros(groups, 1, group_size))
        self.register_buffer("running_covariance", torch.eye(group_size).repeat(groups, 1, 1))

    def forward(self, z: Tensor) -> Tensor:
        """Whiten ``(B, C)`` or ``(B, C, H, W)``; the shape is kept, half precision comes back as float32."""
        with torch.autocast(z.device.type, enabled=False):
            zf = full_precision(z)
            x = grouped(zf.double(), self.group_size, layer="GroupWhitening", at_least=2 if self.training else 0)
            if len(x) != len(self.running_mean):
                made_for = self.running_mean.numel()
                raise ValueError(f"GroupWhitening was made for {made_for} channels, got shape {tuple(z.shape)}")
            mean, cov = covariance(x) if self.training else (self.running_mean, self.running_covariance)
            if self.training and self.track_running_stats:
                with torch.no_grad():
                    count = x.shape[1] * processes.parts()
                    unbiased = cov * (count / (count - 1))
                    self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
                    self.running_covariance.lerp_(unbiased.to(self.running_covariance), self.momentum)
            w = whitening_matrix(cov, method=self.method, eps=self.eps).to(x)
            return ungrouped((x - mean) @ w.mT, zf).to(zf.dtype)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"groups={len(self.running_mean)}, group_size={self.group_size}, method={self.method!r}, eps={self.eps}"
