"""Cost models, their refit, lengths, offloading."""

from dataclasses import replace

import numpy as np
import pytest
from balancing.lengths import CORPORA
from balancing.offload import Offload
from balancing.published import PARAMETERS_7B_384K, PUBLISHED, capacity

from zoo.train.balance import CostModel, MeasuredStep, RingTraffic, refit

SEVEN = PUBLISHED["7b"].cost()


def test_published_coefficients_give_the_published_times() -> None:
    """Worked by hand from FlexSP's code."""
    assert SEVEN.capacity == int((30 * 1024 - 16 * 7.117 / 64 * 1024) / 4.48) == 6450
    assert PUBLISHED["7b"].cost(parameters=PARAMETERS_7B_384K).capacity == 6408
    s, d = 32_768, 8
    compute = (5.128e-6 * s * s + 0.1839576 * s) / d
    exchange = (4 * 2 * 32 * 4096 * s * 2 / 2**20 / d) / 96.5
    assert SEVEN.step(np.array([s]), d) == pytest.approx(629.3563 + compute + exchange, rel=1e-12)
    assert SEVEN.time(np.array(1000), np.array(1)) == pytest.approx(5.128 + 183.9576, rel=1e-12)
    assert SEVEN.time(np.array(1000), np.array(3)) < SEVEN.time(np.array(1000), np.array(2))
    assert SEVEN.least_degree(np.array([1, 6450, 6451])).tolist() == [1, 1, 2]


def test_zero_stages_share_what_they_share() -> None:
    room = [capacity(mib_per_token=1.0, parameters=1e9, ranks=4, mib=20 * 1024, zero=z) for z in range(4)]
    states = [20 * 1024 - r for r in room]  # 16 GiB in all, of which optimiser 12, gradients 2, weights 2
    assert states == [16 * 1024, 7 * 1024, 5.5 * 1024, 4 * 1024]


def test_a_refit_finds_the_coefficients_and_follows_a_drift() -> None:
    rng = np.random.default_rng(0)
    true = replace(SEVEN, a1=7e-6, a2=0.21, b1=400.0)

    def steps(cost: CostModel, n: int, noise: float = 0.0) -> list[MeasuredStep]:
        found = []
        for _ in range(n):
            s, d = CORPORA["wikipedia"].sample(20, rng, 50_000), int(2 ** rng.integers(0, 5))
            found.append(MeasuredStep(tuple(s.tolist()), d, cost.step(s, d) * (1 + noise * rng.normal())))
        return found

    def coefficients(cost: CostModel) -> list[float]:
        return [cost.a1, cost.a2, cost.b1]

    assert coefficients(refit(SEVEN, steps(true, 3))) == pytest.approx(coefficients(true), rel=1e-8)
    assert coefficients(refit(SEVEN, steps(true, 400, 0.02))) == pytest.approx(coefficients(true), rel=0.05)
    drifted = steps(SEVEN, 100) + steps(true, 100)
    assert coefficients(refit(SEVEN, drifted, forget=0.7)) == pytest.approx(coefficients(true), rel=1e-4)
    assert abs(refit(SEVEN, drifted).b1 - true.b1) > 50
    assert refit(SEVEN, steps(replace(true, a1=0.0), 50, 0.05)).a1 >= 0
    with pytest.raises(ValueError, match="do not determine a1, a2 and b1"):
        refit(SEVEN, [MeasuredStep((100,), 1, 1.0)] * 5)


def test_a_model_without_work_or_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 0 and a2 above it"):
        CostModel(a1=0.0, a2=0.0, b1=1.0, capacity=1, communication=RingTraffic(0.0))
    with pytest.raises(ValueError, match="capacity of 0 tokens"):
        CostModel(a1=0.0, a2=1.0, b1=1.0, capacity=0, communication=RingTraffic(0.0))


@pytest.mark.parametrize("name", CORPORA)
def test_samples_have_the_quantiles_of_their_corpus(name: str) -> None:
    law = CORPORA[name]
    sample = law.sample(400_000, np.random.default_rng(0))
    for share, length in law.quantiles[1:-1]:
        if share <= 0.999:
            assert np.mean(sample < length) - 2e-3 < share < np.mean(sample <= length) + 2e-3
    capped = law.sample(50_000, np.random.default_rng(1), 10_000)
    assert capped.min() >= 1
    assert 5_000 < capped.max() <= 10_000
    assert np.mean(capped == 10_000) < 1e-3  # longer ones are left out, not cut
    below = sample[sample <= 10_000]
    assert np.median(capped) == pytest.approx(np.median(below), rel=0.03)


def test_wikipedia_has_its_published_tail() -> None:
    sample = CORPORA["wikipedia"].sample(1_000_000, np.random.default_rng(0))
    assert sample.mean() == pytest.approx(1013.6, rel=0.02)
    above = {4096: 0.430, 8192: 0.275, 16384: 0.151, 32768: 0.076, 65536: 0.031}
    for length, share in above.items():  # of the tokens
        assert sample[sample > length].sum() / sample.sum() == pytest.approx(share, abs=0.012)


@pytest.mark.parametrize("bytes_per_ms", [1.0, 20.0, 60.0, 1e4])
def test_offloading_is_the_best_of_a_grid(bytes_per_ms: float) -> None:
    choose = Offload(
        layers=32, capacity=8192, bytes_per_ms=bytes_per_ms,
        layer_ms=lambda s: 1e-6 * s * s + 2e-3 * s + 0.1, activations=lambda s: 10.0 * s + 1e3,
    )  # fmt: skip
    moved = 0
    for tokens in (4096, 8192, 20_000, 100_000, 500_000, 2_000_000):
        act, unit = choose.activations(tokens), 32 * choose.activations(8192)
        least = min(1.0, unit / (30 * act))
        grid = [
            (choose.ranks(tokens, r), r)
            for r in np.linspace(0, 1, 20_001)
            if r == 0 or (tokens >= 8192 and r >= least and choose.layer_ms(tokens) >= act * r / bytes_per_ms)
        ]
        ranks, ratio = min(grid)
        found = choose(tokens)
        assert found.ranks == ranks
        assert found.ranks == choose.ranks(tokens, found.ratio)
        assert found.ratio == pytest.approx(ratio, abs=1e-4)
        moved += found.ratio > 0
    assert moved > 0 or bytes_per_ms == 1.0
