"""Frames, singular values by their law, and triplets of a weight, against the exact decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from simpletuner.helpers.adapters.tlora.initialisation import (
    band,
    orthonormal_frame,
    principal_factors,
    random_factors,
    singular_values,
    weight_factors,
)

SHAPES = [(32, 32), (24, 64), (96, 40)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("place", ["largest", "middle", "smallest"])
def test_singular_values_follow_the_law_of_the_exact_decomposition(
    shape: tuple[int, int], place: str
) -> None:
    small = min(shape)
    index = {"largest": 0, "middle": small // 2, "smallest": small - 1}[place]
    drawn = [singular_values(*shape, first=index, end=index + 1, seed=seed)[0] for seed in range(600)]
    rng = np.random.default_rng(7)
    exact = np.linalg.svd(rng.standard_normal((600, *shape)), compute_uv=False)[:, index]
    assert ks_2samp(drawn, exact).pvalue > 1e-3
    assert np.mean(drawn) == pytest.approx(exact.mean(), rel=0.02 if place != "smallest" else 0.12)


def test_singular_values_descend_and_a_band_is_part_of_the_whole() -> None:
    whole = singular_values(48, 64, first=0, end=48, seed=3)
    assert (np.diff(whole) < 0).all()
    np.testing.assert_allclose(singular_values(48, 64, first=40, end=48, seed=3), whole[40:], rtol=1e-9)


@pytest.mark.parametrize(("size", "rank"), [(64, 4), (64, 16), (64, 40), (16, 16), (512, 64)])
def test_orthonormal_frame_has_orthonormal_columns(size: int, rank: int) -> None:
    frame = orthonormal_frame(size, rank, generator=torch.Generator().manual_seed(1))
    assert frame.shape == (size, rank)
    torch.testing.assert_close(frame.T @ frame, torch.eye(rank), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rank", [2, 8])
def test_orthonormal_frame_is_uniform_over_directions(rank: int) -> None:
    generator = torch.Generator().manual_seed(2)
    frames = torch.stack([orthonormal_frame(8, rank, generator=generator) for _ in range(4000)])
    entries = frames.mean(0), frames.var(0)
    assert entries[0].abs().max() < 0.03  # 0 by symmetry, std of the mean 0.0056
    assert (entries[1] - 1 / 8).abs().max() < 0.02


@pytest.mark.parametrize("sig_type", ["principal", "middle", "last"])
def test_random_factors_are_the_triplets_of_a_gaussian_matrix_of_std_one_over_rank(sig_type: str) -> None:
    rank, shape = 8, (48, 64)
    first, end = band(48, rank, sig_type)
    drawn = torch.stack(
        [random_factors(*shape, rank, sig_type=sig_type, seed=seed, name="a").values for seed in range(200)]
    )
    exact = torch.linalg.svdvals(torch.randn(200, *shape) / rank)[:, first:end]
    assert drawn.mean(0) == pytest.approx(exact.mean(0), rel=0.05)
    assert (drawn.diff(dim=1) < 0).all()


def test_random_factors_depend_on_seed_and_name_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = random_factors(32, 48, 4, sig_type="last", seed=5, name="layer")
    torch.manual_seed(2)
    again = random_factors(32, 48, 4, sig_type="last", seed=5, name="layer")
    other = random_factors(32, 48, 4, sig_type="last", seed=5, name="other")
    assert torch.equal(first.q, again.q)
    assert torch.equal(first.p, again.p)
    assert not torch.allclose(first.q, other.q)


@pytest.mark.parametrize("sig_type", ["principal", "middle", "last"])
def test_weight_factors_are_the_named_triplets_of_the_weight(sig_type: str) -> None:
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(3))
    factors = weight_factors(weight, 6, sig_type=sig_type)
    first, end = band(40, 6, sig_type)
    torch.testing.assert_close(factors.values, torch.linalg.svdvals(weight)[first:end])
    torch.testing.assert_close(weight @ factors.q.T, factors.p * factors.values, rtol=0, atol=2e-5)


def test_principal_factors_of_a_decaying_spectrum_meet_their_bounds() -> None:
    generator = torch.Generator().manual_seed(4)
    u, v = (orthonormal_frame(256, 256, generator=generator) for _ in range(2))
    spectrum = 10.0 * 0.9 ** torch.arange(256)
    factors = principal_factors((u * spectrum) @ v.T, 16)
    assert factors is not None
    torch.testing.assert_close(factors.values, spectrum[:16], rtol=1e-3, atol=0)
    cosines = torch.linalg.svdvals(factors.q @ v[:, :16])
    assert torch.arccos(cosines.clamp(max=1)).max() < 1e-2


def test_principal_factors_of_a_flat_spectrum_are_left_to_the_full_decomposition() -> None:
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(5))
    assert principal_factors(weight, 16) is None
    factors = weight_factors(weight, 16, sig_type="principal")
    torch.testing.assert_close(factors.values, torch.linalg.svdvals(weight)[:16], rtol=1e-5, atol=0)


def test_principal_factors_leave_the_global_generator_alone() -> None:
    torch.manual_seed(6)
    expected = torch.rand(1)
    torch.manual_seed(6)
    principal_factors(torch.randn(64, 64, generator=torch.Generator().manual_seed(1)), 4)
    assert torch.equal(torch.rand(1), expected)
