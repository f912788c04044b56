"""Initial factors of a T-LoRA layer: random frames and singular values, or triplets of a weight.

Shapes: N rows (out), M columns (in, times the kernel for convolutions), R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from simpletuner.helpers.adapters.tlora.spec import TLoraSpec
from simpletuner.helpers.configuration.schema.lycoris import SigType
from simpletuner.helpers.randomness import mix

MAX_VALUE_ERROR = 1e-3  # relative error of a singular value of the randomised method
MAX_ANGLE = 1e-2  # radians between its subspace and the true one


@dataclass(frozen=True, slots=True)
class Factors:
    """R singular triplets, by descending singular value."""

    q: Tensor
    """[R, M], orthonormal rows."""
    p: Tensor
    """[N, R], orthonormal columns."""
    values: Tensor
    """[R]."""


def initial_factors(
    weight: Tensor, shape: tuple[int, int], *, rank: int, spec: TLoraSpec, seed: int, name: str
) -> Factors:
    """The initial factors of one layer.

    Args:
        weight: The layer's weight, read for init weight only; on meta nothing is computed.
        shape: (N, M) of the layer; a packed weight has another shape.
        rank: R, at most the smaller of N and M.
        spec: Init and sig_type.
        seed: Seed of the run.
        name: Name of the layer; with the seed it determines every random number.
    """
    num_rows, num_columns = shape
    if weight.is_meta:
        with torch.device("meta"):
            return Factors(
                q=torch.empty(rank, num_columns), p=torch.empty(num_rows, rank), values=torch.empty(rank)
            )
    if spec.init == "weight":
        return weight_factors(weight.reshape(shape), rank, sig_type=spec.sig_type)
    if spec.init == "random":
        return random_factors(num_rows, num_columns, rank, sig_type=spec.sig_type, seed=seed, name=name)
    generator = torch.Generator().manual_seed(mix(seed, "tlora-vanilla", name))
    q = torch.randn(rank, num_columns, generator=generator) / rank
    return Factors(q=q, p=torch.zeros(num_rows, rank), values=torch.ones(rank))


def band(size: int, rank: int, sig_type: SigType) -> tuple[int, int]:
    """First and past-the-last index of a sig_type's triplets, in descending order of singular values."""
    first = {"principal": 0, "middle": (size - rank) // 2, "last": size - rank}[sig_type]
    return first, first + rank


def random_factors(
    num_rows: int, num_columns: int, rank: int, *, sig_type: SigType, seed: int, name: str
) -> Factors:
    """Singular triplets of an [N, M] Gaussian matrix of std 1/R, drawn without the matrix itself.

    Its singular vectors are uniform orthonormal frames, independent of its singular values. The values depend
    on the shape and the seed, the frames on the seed and the name.

    Source: T-LoRA, arXiv:2507.05964, Ortho-LoRA initialisation; the law as in `singular_values`.
    """
    first, end = band(min(num_rows, num_columns), rank, sig_type)
    values = singular_values(num_rows, num_columns, first=first, end=end, seed=seed) / rank
    generator = torch.Generator().manual_seed(mix(seed, "tlora-frames", name))
    q = orthonormal_frame(num_columns, rank, generator=generator).T.contiguous()
    p = orthonormal_frame(num_rows, rank, generator=generator)
    return Factors(q=q, p=p, values=torch.from_numpy(values).float())


@lru_cache(maxsize=4096)
def singular_values(num_rows: int, num_columns: int, *, first: int, end: int, seed: int) -> np.ndarray:
    """Singular values first..end-1, descending, of one [N, M] matrix of standard normal entries.

    The matrix is orthogonally equivalent to a bidiagonal one with independent chi-distributed entries;
    only the eigenvalues of a tridiagonal matrix of its smaller size are computed.

    Source: Dumitriu & Edelman 2002, "Matrix models for beta ensembles", Laguerre ensemble, beta = 1.
    """
    large, small = max(num_rows, num_columns), min(num_rows, num_columns)
    rng = np.random.default_rng(mix(seed, "tlora-values", num_rows, num_columns))
    diagonal = np.sqrt(rng.chisquare(large - np.arange(small)))
    below = np.sqrt(rng.chisquare(small - 1 - np.arange(small - 1))) if small > 1 else np.zeros(0)
    squares = diagonal**2
    squares[1:] += below**2
    ascending = eigh_tridiagonal(
        squares,
        diagonal[:-1] * below,
        eigvals_only=True,
        select="i",
        select_range=(small - end, small - 1 - first),
    )
    return np.asarray(np.sqrt(np.maximum(ascending[::-1], 0.0)))


def orthonormal_frame(size: int, rank: int, *, generator: torch.Generator) -> Tensor:
    """[size, R] with orthonormal columns, uniform over all such frames.

    Source: Stewart 1980 for the uniform law (a positive diagonal of the triangular factor makes it unique);
    CholeskyQR2 of Yamamoto et al. 2015, as accurate as Householder's on a Gaussian matrix that is tall.
    """
    frame = torch.randn(size, rank, generator=generator)
    if size >= 4 * rank:
        for _ in range(2):
            lower = torch.linalg.cholesky(frame.T @ frame)
            # A product with the small factor's inverse: a sixth of the time of solving for the tall frame.
            frame = frame @ torch.linalg.solve_triangular(lower, torch.eye(rank), upper=False).T
        return frame
    orthonormal, upper = torch.linalg.qr(frame)
    signs: Tensor = torch.where(upper.diagonal() < 0, -1.0, 1.0)
    uniform: Tensor = signs * orthonormal
    return uniform


def weight_factors(weight: Tensor, rank: int, *, sig_type: SigType) -> Factors:
    """Singular triplets of an [N, M] weight, in float32.

    Source: T-LoRA, arXiv:2507.05964, SVD initialisation; `principal` is also what PiSSA uses.
    """
    weight = weight.detach().float()
    if sig_type == "principal" and 4 * rank < min(weight.shape):
        factors = principal_factors(weight, rank)
        if factors is not None:
            return factors
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    first, end = band(min(weight.shape), rank, sig_type)
    return Factors(
        q=vh[first:end].contiguous(), p=u[:, first:end].contiguous(), values=s[first:end].contiguous()
    )


def principal_factors(weight: Tensor, rank: int) -> Factors | None:
    """The R largest triplets by the randomised method, or None without proof that it converged.

    The angle to the true subspace is at most the residual over the gap behind the R-th singular value; a flat
    spectrum has no gap and needs the full decomposition.

    Source: Halko et al. 2011 for the method; Davis & Kahan 1970 for the bound.
    """
    with torch.random.fork_rng(devices=[weight.device] if weight.device.type == "cuda" else []):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(weight, q=2 * rank, niter=6)
    u, v, values = u[:, :rank], v[:, :rank], s[:rank]
    left = torch.linalg.norm(weight.T @ u - v * values, dim=0)
    right = torch.linalg.norm(weight @ v - u * values, dim=0)
    residual = torch.maximum(left, right)
    gap = float(values[-1] - s[rank])
    if (
        gap <= 0
        or float(residual.max() / values[-1]) > MAX_VALUE_ERROR
        or float(residual.norm()) / gap > MAX_ANGLE
    ):
        return None
    return Factors(q=v.T.contiguous(), p=u.contiguous(), values=values.contiguous())
