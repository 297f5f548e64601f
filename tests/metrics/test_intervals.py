import numpy as np
import pytest
from scipy import stats

from pretrain.metrics.intervals import bootstrap_mean, clopper_pearson, cluster_bootstrap


def test_mean_interval_agrees_with_scipy():
    values = np.random.default_rng(0).gamma(2.0, 3.0, size=400)
    low, high = bootstrap_mean(values, resamples=8000, seed=1)
    ref = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=8000,
                          rng=np.random.default_rng(2)).confidence_interval
    width = ref.high - ref.low
    assert abs(low - ref.low) < 0.06 * width and abs(high - ref.high) < 0.06 * width


def test_ratio_interval_agrees_with_scipy():
    rng = np.random.default_rng(3)
    count = rng.integers(1, 600, size=120)
    nll = count * (4 + rng.normal(0, 0.5, size=120))
    low, high = cluster_bootstrap(nll, count, resamples=8000, seed=0)
    ref = stats.bootstrap((nll, count), lambda a, b, axis=-1: a.sum(axis) / b.sum(axis), paired=True,
                          method="percentile", n_resamples=8000, rng=np.random.default_rng(5)).confidence_interval
    width = ref.high - ref.low
    assert abs(low - ref.low) < 0.06 * width and abs(high - ref.high) < 0.06 * width


def test_coverage_of_clustered_tokens():
    """Tokens that share a window effect: the cluster interval covers the truth as often as it says (within 4 sigma)."""
    rng = np.random.default_rng(7)
    hits, trials = 0, 300
    for trial in range(trials):
        effect = rng.normal(3.0, 1.0, size=60)
        count = rng.integers(50, 150, size=60)
        low, high = cluster_bootstrap(effect * count, count, resamples=400, seed=trial)
        hits += low <= 3.0 <= high
    assert abs(hits / trials - 0.95) < 4 * np.sqrt(0.95 * 0.05 / trials)


def test_interval_is_a_function_of_data_and_seed():
    nll, count = np.arange(1.0, 40.0), np.full(39, 7)
    assert cluster_bootstrap(nll, count, seed=3) == cluster_bootstrap(nll, count, seed=3)
    assert cluster_bootstrap(nll, count, seed=3) != cluster_bootstrap(nll, count, seed=4)


def test_empty_clusters_change_nothing():
    nll, count = np.arange(1.0, 40.0), np.arange(1, 40)
    padded = cluster_bootstrap(np.concatenate([nll, [0, 0]]), np.concatenate([count, [0, 0]]), seed=1)
    assert padded == cluster_bootstrap(nll, count, seed=1)


def test_one_cluster_has_no_known_spread():
    assert np.isnan(cluster_bootstrap([3.0], [2])).all()


def test_many_clusters_are_resampled_in_chunks(monkeypatch):
    nll, count = np.random.default_rng(0).normal(3, 1, 500), np.ones(500)
    whole = cluster_bootstrap(nll, count, resamples=300, seed=0)
    monkeypatch.setattr("pretrain.metrics.intervals._CELLS", 1700)
    assert cluster_bootstrap(nll, count, resamples=300, seed=0) == whole


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (3, 10), (487, 1000)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_clopper_pearson_agrees_with_scipy(k, n, level):
    ref = stats.binomtest(k, n).proportion_ci(level, method="exact")
    assert clopper_pearson(k, n, level=level) == pytest.approx((ref.low, ref.high), abs=1e-12)


@pytest.mark.parametrize("call", [
    lambda: clopper_pearson(3, 2), lambda: clopper_pearson(0, 0), lambda: clopper_pearson(1, 2, level=1.0),
    lambda: cluster_bootstrap([1.0], [1, 2]), lambda: cluster_bootstrap([1.0], [0]),
    lambda: cluster_bootstrap([1.0, 2.0], [1, -1]), lambda: bootstrap_mean([]),
])
def test_nonsense_is_refused(call):
    with pytest.raises(ValueError):
        call()
