"""Codecs of actions: splines against scipy and by hand, their error bound, and FAST against scipy's cosines."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dct
from scipy.interpolate import BSpline, make_lsq_spline
from torch import Tensor
from torch.testing import assert_close

from zoo import codecs
from zoo.codecs import BSplineCodec, Codes, FASTCodec
from zoo.codecs.splines import basis_matrix, clamped_knots, fit_matrix, phases, quantised, second_control
from zoo.errors import UsageError, UserError

SIZES = [(5, 3, 20), (10, 4, 20), (5, 4, 20), (10, 3, 50), (15, 4, 80), (4, 3, 9), (3, 1, 5), (6, 0, 11)]


def double(numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def reaching(number: int, steps: int = 20, width: int = 3, seed: int = 0) -> list[Tensor]:
    """Smooth chunks: a few slow sines with random amplitudes and phases."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, steps, dtype=torch.float64)[:, None]
    chunks = []
    for _ in range(number):
        a, b = torch.rand(2, 3, width, generator=generator, dtype=torch.float64)
        chunks.append(
            (a[:, None] * torch.sin(4 * time * (1 + torch.arange(3.0)[:, None, None]) + 6 * b[:, None])).sum(0)
        )
    return chunks


# -- splines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "P", "T"), SIZES)
def test_the_basis_is_that_of_scipy(N: int, P: int, T: int) -> None:
    knots, u = clamped_knots(N, P), phases(T)
    basis = basis_matrix(u, knots, P)
    if P:  # scipy puts the end of a curve of degree 0 outside
        want = BSpline.design_matrix(u.numpy(), knots.numpy(), P).toarray()
        assert_close(basis, torch.from_numpy(want), atol=1e-12, rtol=0)
        curves = BSpline(knots.numpy(), np.eye(N), P)(u.numpy())
        assert_close(basis, torch.from_numpy(curves), atol=1e-12, rtol=0)
    assert_close(basis.sum(1), torch.ones(T, dtype=torch.float64), atol=1e-12, rtol=0)
    assert basis.min() >= 0
    assert basis[0, 0] == basis[-1, -1] == 1
    assert int((basis != 0).sum(1).max()) <= P + 1


@pytest.mark.parametrize(("N", "P", "T"), [size for size in SIZES if size[1]])
def test_the_fit_without_ridge_is_that_of_scipy(N: int, P: int, T: int) -> None:
    knots, u = clamped_knots(N, P), phases(T)
    a = torch.randn(T, 2, generator=torch.Generator().manual_seed(N), dtype=torch.float64)
    want = make_lsq_spline(u.numpy(), a.numpy(), knots.numpy(), P).c
    assert_close(fit_matrix(basis_matrix(u, knots, P), 0.0) @ a, torch.from_numpy(want), atol=1e-10, rtol=1e-10)


def test_the_example_by_hand() -> None:
    knots, a = clamped_knots(3, 1), double([0, 0.5, 1, 0.5, 0])
    assert_close(knots, double([0, 0, 0.5, 1, 1]))
    basis = basis_matrix(phases(5), knots, 1)
    assert_close(fit_matrix(basis, 0.0) @ a, double([0, 1, 0]), atol=1e-12, rtol=0)
    assert_close(fit_matrix(basis, 0.1) @ a, double([0.012285, 0.933661, 0.012285]), atol=1e-6, rtol=0)
    rest = fit_matrix(basis[:, 1:], 0.0) @ (a - 0.2 * basis[:, 0])
    assert_close(rest, double([0.965517, 0.006897]), atol=1e-6, rtol=0)
    assert_close(clamped_knots(5, 3), double([0, 0, 0, 0, 0.5, 1, 1, 1, 1]))


def test_the_examples_of_quantisation() -> None:
    controls = double([[0, 1, 0], [-1, 0, 1]]).T  # (N, D): all dimensions of a control point side by side
    ids = quantised(controls, double(-1.0), double(1.0), 256)
    assert ids.flatten().tolist() == [128, 0, 255, 128, 128, 255]
    values = double([3, 2.2, 1, 2.3, 1.6, 1.3, 2])
    assert quantised(values, double(1.0), double(3.0), 256).tolist() == [255, 153, 0, 166, 77, 38, 128]
    assert quantised(double([-9.0, 9.0]), double(0.0), double(1.0), 256).tolist() == [0, 255]
    assert quantised(double([5.0, 6.0]), double(5.0), double(5.0), 256).tolist() == [0, 0]


SINE_1, SINE_3 = (lambda u, hertz=hertz: torch.sin(2 * torch.pi * hertz * u) for hertz in (1, 3))


@pytest.mark.parametrize(
    ("curve", "N", "expected"),
    [(SINE_1, 5, 5.1e-3), (SINE_1, 10, 3.1e-7), (SINE_3, 10, 8.3e-3), (SINE_3, 15, 7.2e-5)],
)
def test_the_fit_is_as_good_as_measured_elsewhere(curve: Any, N: int, expected: float) -> None:
    u = phases(50)
    basis = basis_matrix(u, clamped_knots(N, 3), 3)
    error = float((basis @ fit_matrix(basis, 1e-4) @ curve(u) - curve(u)).square().mean())
    assert error == pytest.approx(expected, rel=0.05)


# -- the codec --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    size=st.sampled_from([(20, 5, 3), (20, 10, 4), (9, 4, 3), (7, 3, 1), (6, 6, 0)]),
    bins=st.sampled_from([2, 16, 256]),
    seed=st.integers(0, 99),
)
def test_a_decoded_curve_is_within_half_a_bin(size: tuple[int, int, int], bins: int, seed: int) -> None:
    steps, n_controls, degree = size
    samples = [torch.randn(steps, 2, generator=torch.Generator().manual_seed(seed + i)) for i in range(12)]
    codec = BSplineCodec(steps, n_controls=n_controls, degree=degree, bins=bins, control_cut=0.0).fit(samples)
    codes = codec.encode(samples)
    assert codec.clipped(samples) == 0
    low, high = codec.tensors()["bounds"]
    ends = codec.tensors()["range"]
    bound = (high - low).amax(0) / (2 * (bins - 1)) * (ends[1] - ends[0]) / 2  # in the units of the actions
    for grid in (steps, 101):
        u = phases(grid)
        curve = codec.restored(codec.bases(u)[0] @ codec.controls(samples))
        distance = (torch.stack(codec.decode(codes, steps=grid)) - curve).abs().amax((0, 1))
        assert (distance <= bound * (1 + 1e-9)).all()
    assert distance.max() > 0.02 * bound.max()  # a bound worth the name


def test_the_number_of_tokens_is_that_of_control_points_and_their_order_goes_by_control_point() -> None:
    samples = reaching(50)
    codec = BSplineCodec(20, n_controls=5, degree=3).fit(samples)
    ids, lengths = codec.encode(samples[:7])
    assert ids.shape == (7, 5, 3)
    assert lengths.tolist() == [5] * 7
    low, high = codec.tensors()["bounds"]
    controls = codec.controls(samples[:7])
    flat = ids.flatten(1)
    for d in range(3):
        for i in range(5):
            share = (controls[:, i, d] - low[i, d]) / (high[i, d] - low[i, d])
            assert torch.equal(flat[:, i * 3 + d], (share.clamp(0, 1) * 255).round().long())


def test_any_ids_are_a_chunk() -> None:
    codec = BSplineCodec(20, n_controls=5, degree=3).fit(reaching(50))
    ids = torch.randint(256, (30, 5, 3), generator=torch.Generator().manual_seed(0))
    made = torch.stack(codec.decode(Codes(ids, torch.full((30,), 5))))
    assert made.shape == (30, 20, 3)
    assert torch.isfinite(made).all()


def test_a_curve_may_be_read_at_another_rate() -> None:
    samples = reaching(50)
    codec = BSplineCodec(20, n_controls=6, degree=3).fit(samples)
    codes = codec.encode(samples[:4])
    low, high = codec.tensors()["bounds"]
    controls = low + codes.ids.double() / 255 * (high - low)
    for chunk, own in zip(codec.decode(codes, steps=77), controls, strict=True):
        curve = BSpline(codec.knots.numpy(), own.numpy(), 3)(np.linspace(0, 1, 77))
        assert_close(chunk, codec.restored(torch.from_numpy(curve)), atol=1e-12, rtol=1e-12)


def test_a_gripper_is_a_step() -> None:
    """A step on a border between pieces comes back exactly, but for the ridge; a smooth curve overshoots."""
    samples = reaching(60)
    for i, chunk in enumerate(samples):
        chunk[:, 2] = (torch.arange(20) >= 4 * (i % 6)).double()
    codec = BSplineCodec(20, n_controls=5, degree=3, grippers=[2], ridge=1e-9).fit(samples)
    codes = codec.encode(samples[:6])
    made = torch.stack(codec.decode(codes))
    # pieces of the phase t / 19 hold 4 steps each
    assert_close(made[..., 2], torch.stack(samples[:6])[..., 2], atol=1e-8, rtol=0)
    smooth = BSplineCodec(20, n_controls=5, degree=3).fit(samples)
    assert float((torch.stack(smooth.decode(smooth.encode(samples[:6])))[..., 2] - made[..., 2]).abs().max()) > 0.1
    means = torch.stack([chunk[4:8, 2].mean() for chunk in reaching(3)])
    plain = BSplineCodec(20, n_controls=5, degree=3, grippers=[2], ridge=0.0).fit(reaching(60))
    assert_close(plain.restored(plain.controls(reaching(3)))[:, 1, 2], means)


def test_a_chunk_begins_where_the_last_one_ended() -> None:
    samples = reaching(50)
    codec = BSplineCodec(20, n_controls=10, degree=3, grippers=[2], control_cut=0.0).fit(samples)
    start = torch.stack([chunk[0] for chunk in samples[:5]]) + 0.1
    held = codec.encode(samples[:5], start=start)
    made = torch.stack(codec.decode(held, start=start))
    assert_close(made[:, 0, :2], start[:, :2], atol=1e-12, rtol=0)  # the gripper jumps as it will
    free = torch.stack(codec.decode(codec.encode(samples[:5]), start=start))
    given = torch.stack(samples[:5])
    # control points that know of the start come nearer than those that do not
    behind = [(each - given)[:, 1:, :2].square().mean() for each in (made, free)]
    assert behind[0] < 0.8 * behind[1]
    controls = codec.controls(samples[:5], start=start)
    assert_close(controls[:, 0, :2], codec.normalised(start)[:, :2])
    basis = codec.bases(phases(20))[0]
    rest = codec.normalised(given) - basis[:, :1] * codec.normalised(start)[:, None]
    want = np.linalg.solve((basis[:, 1:].T @ basis[:, 1:]).numpy() + 1e-4 * np.eye(9), (basis[:, 1:].T @ rest).numpy())
    assert_close(controls[:, 1:, :2], torch.from_numpy(want)[..., :2])


def test_a_chunk_begins_with_the_velocity_of_the_last_one() -> None:
    samples = reaching(50)
    codec = BSplineCodec(20, n_controls=6, degree=3).fit(samples)
    start = torch.stack([chunk[0] for chunk in samples[:5]])
    velocity = 0.05 * torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    codes = codec.encode(samples[:5], start=start, velocity=velocity)
    fine = 19 * 10_000 + 1
    made = torch.stack(codec.decode(codes, steps=fine, start=start, velocity=velocity))
    assert_close(made[:, 0], start, atol=1e-12, rtol=0)
    slope = (made[:, 1] - made[:, 0]) * 10_000  # actions a step
    assert_close(slope, velocity, atol=1e-4, rtol=1e-3)
    knots = clamped_knots(6, 3)
    curve = BSpline(
        knots.numpy(), np.array([1.0, 1.0 + float(second_control(knots, 3, double(0.3), 20)), 0, 0, 0, 0]), 3
    )
    assert float(curve.derivative()(0.0)) == pytest.approx(0.3 * 19, abs=1e-12)


def test_continuous_tokens_are_control_points() -> None:
    samples = reaching(50)
    codec = BSplineCodec(20, n_controls=6, degree=3, control_cut=0.0).fit(samples)
    vectors = codec.vectors(samples)
    assert vectors.shape == (50, 6, 3)
    assert vectors.abs().max() == pytest.approx(1.0)
    assert_close(vectors.amax(0), torch.ones(6, 3, dtype=torch.float64))
    curves = codec.restored(codec.bases(phases(20))[0] @ codec.controls(samples))
    assert_close(torch.stack(codec.from_vectors(vectors)), curves)
    ids = codec.encode(samples).ids
    assert torch.equal(((vectors + 1) / 2 * 255).round().long(), ids)


def test_what_was_fitted_is_frozen_and_stored_to_the_bit(tmp_path: Path) -> None:
    samples = [chunk.float() for chunk in reaching(50)]
    codec = BSplineCodec(20, n_controls=6, degree=3, grippers=[1], bins=100, ridge=3e-4, cut=0.02).fit(samples)
    codec.save(tmp_path)
    again = codecs.load(tmp_path)
    assert isinstance(again, BSplineCodec)
    assert again.settings() == codec.settings()
    for name, tensor in codec.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)
        assert tensor.dtype == torch.float64
    codes = codec.encode(samples)
    assert torch.equal(torch.stack(again.decode(codes)), torch.stack(codec.decode(codes)))
    before = {name: tensor.clone() for name, tensor in codec.tensors().items()}
    codec.encode([9 * chunk for chunk in samples])
    assert all(torch.equal(tensor, before[name]) for name, tensor in codec.tensors().items())
    assert codec.clipped([9 * chunk for chunk in samples]) > 0.3
    said = json.loads((tmp_path / "codec.json").read_text())
    said["settings"]["degree"] = 4
    (tmp_path / "codec.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="its knots are not those of its settings"):
        codecs.load(tmp_path)


def test_errors_are_in_the_units_of_the_actions() -> None:
    samples = [chunk * double([1.0, 100.0, 0.01]) for chunk in reaching(50)]
    codec = BSplineCodec(20, n_controls=6, degree=3).fit(samples)
    difference = torch.stack(codec.decode(codec.encode(samples))) - torch.stack(samples)
    errors = codec.errors(samples)
    assert errors["rmse_1"] == pytest.approx(float(difference[..., 1].square().mean().sqrt()))
    assert errors["rmse_1"] > 50 * errors["rmse_0"]
    assert errors["largest"] == pytest.approx(float(difference.abs().max()))
    low, high = codec.tensors()["bounds"]
    controls = codec.controls(samples)
    assert errors["clipped"] == pytest.approx(float(((controls < low) | (controls > high)).double().mean()))


# -- FAST -------------------------------------------------------------------------------------------------------


def test_fast_rounds_the_cosines_of_scipy_by_frequency() -> None:
    samples = reaching(40)
    codec = FASTCodec(20).fit(samples)
    normalised = codec.normalised(torch.stack(samples)).numpy()
    want = np.round(dct(normalised, axis=1, norm="ortho") * 10).astype(np.int64).reshape(40, -1)
    texts = codec.letters(codec.encode(samples))
    least = int(codec.tensors()["letters"][0])
    spelt = np.array([[ord(letter) - ord("\u4e00") + least for letter in text] for text in texts])
    assert np.array_equal(spelt, want)
    back = torch.stack(codec.decode(codec.encode(samples)))
    # half a unit of every coefficient, in the mean square at most
    half = (codec.tensors()["range"][1] - codec.tensors()["range"][0]) / 2 * 0.5 / 10
    assert ((back - torch.stack(samples)).square().mean(1).sqrt() <= half * (1 + 1e-9)).all()


def test_fast_has_fewer_tokens_than_coefficients_and_as_many_as_a_chunk_needs() -> None:
    samples = reaching(300)
    codec = FASTCodec(20).fit(samples)
    still = [0.01 * chunk + 0.5 for chunk in reaching(20, seed=1)]
    moving, quiet = codec.encode(samples).lengths, codec.encode(still).lengths
    assert moving.float().mean() < 0.7 * 60
    assert quiet.float().mean() < moving.float().mean()
    assert moving.min() < moving.max()
    assert codec.vocab_size <= 1024


def test_a_malformed_prediction_of_fast_is_seen_and_refused() -> None:
    samples = reaching(100)
    codec = FASTCodec(20).fit(samples)
    codes = codec.encode(samples[:4])
    assert not codec.malformed(codes).any()
    short = Codes(codes.ids, codes.lengths - torch.tensor([0, 1, 0, 2]))
    assert codec.malformed(short).tolist() == [False, True, False, True]
    with pytest.raises(UserError, match=r"tokens must spell 20 x 3 coefficients; row 1 spells \d+: it is malformed"):
        codec.decode(short)


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [BSplineCodec, FASTCodec])
def test_what_codecs_of_actions_refuse(kind: Any, tmp_path: Path) -> None:
    samples = reaching(30)
    constant = [chunk.clone() for chunk in samples]
    for chunk in constant:
        chunk[:, 1] = 0.5
    with pytest.raises(UserError, match=r"must move; dimension 1 is 0.5 everywhere: leave it out"):
        kind(20).fit(constant)
    constant[0][0, 1] = 0.6
    with pytest.raises(UserError, match=r"dimension 1 is nearly always 0.5: name it in grippers, or lower cut"):
        kind(20).fit(constant)
    with pytest.raises(UserError, match=r"a chunk must be \(20, 3\), steps by dimensions; chunk 1 is \(19, 3\)"):
        kind(20).fit([samples[0], samples[1][:19]])
    with pytest.raises(UserError, match="a codec is fitted on chunks of actions; got none"):
        kind(20).fit([])
    with pytest.raises(UserError, match="a codec is used after fit"):
        kind(20).encode(samples)
    with pytest.raises(UserError, match="a codec is saved after fit"):
        kind(20).save(tmp_path)
    codec = kind(20).fit(samples)
    with pytest.raises(UserError, match=r"a chunk must be \(20, 3\), steps by dimensions; chunk 0 is \(20, 2\)"):
        codec.encode([samples[0][:, :2]])
    broken = samples[2].clone()
    broken[4, 1] = float("nan")
    with pytest.raises(UserError, match="actions must be finite; chunk 1 has nan at step 4 in dimension 1: leave"):
        codec.encode([samples[0], broken])
    unknown = torch.full((1, 10, 3) if kind is BSplineCodec else (1, 4), 5000)
    with pytest.raises(UserError, match=r"ids must be in \[0, "):
        codec.decode(Codes(unknown, torch.tensor([unknown.shape[1]])))


def test_what_splines_refuse() -> None:
    out_of_range: list[dict[str, Any]] = [
        {"degree": -1}, {"n_controls": 4}, {"n_controls": 21}, {"bins": 1}, {"ridge": -1.0}, {"steps": 0}, {"cut": 0.5},
        {"control_cut": 0.5}, {"grippers": [0, 0]}, {"grippers": [-1]},
    ]  # fmt: skip
    for wrong in out_of_range:
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
            BSplineCodec(**wrong)
    samples = reaching(30)
    with pytest.raises(UserError, match="grippers must be dimensions of the actions, of which there are 3"):
        BSplineCodec(grippers=[3]).fit(samples)
    codec = BSplineCodec(n_controls=6, degree=3).fit(samples)
    with pytest.raises(UserError, match="a velocity belongs to a start"):
        codec.encode(samples, velocity=torch.zeros(30, 3))
    with pytest.raises(UserError, match=r"start must be \(B, 3\)"):
        codec.encode(samples, start=torch.zeros(30, 2))
    with pytest.raises(UserError, match=r"ids must be \(B, 6, 3\), control points by dimensions; got \(1, 5, 3\)"):
        codec.decode(Codes(torch.zeros(1, 5, 3, dtype=torch.long), torch.tensor([5])))
    with pytest.raises(UserError, match=r"vectors must be \(B, 6, 3\)"):
        codec.from_vectors(torch.zeros(1, 5, 3))
    step = BSplineCodec(n_controls=5, degree=0).fit(samples)
    with pytest.raises(UserError, match="a velocity needs degree of at least 1"):
        step.encode(samples, start=torch.zeros(30, 3), velocity=torch.zeros(30, 3))
    with pytest.raises(UsageError, match="scale must be above 0"):
        FASTCodec(scale=0.0)
    with pytest.raises(UsageError, match="vocab must be at least 2"):
        FASTCodec(vocab=1)
    with pytest.raises(UserError, match=r"vocab must hold every coefficient .* got 20: raise it"):
        FASTCodec(vocab=20).fit(samples)
