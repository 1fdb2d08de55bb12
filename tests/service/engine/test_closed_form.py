"""The stand-in is what it says: programs that agree with the closed forms, and rows that do not see each other."""

import numpy as np
import pytest

from service.engine.closed_form import ClosedFormEngine
from service.noise import Purpose, normals

ROWS, X_SIZE = 6, 8


@pytest.fixture
def engine():
    return ClosedFormEngine(scale=1.5, noise=0.7)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, X_SIZE)).astype(np.float32)
    mask = (rng.random((ROWS, X_SIZE)) < 0.7).astype(np.float32)
    return {"x": x, "mask": mask}


def refined(engine, data, steps):
    arrays = {**data, **engine.run("init", data), "noise0": np.zeros((len(data["x"]), 2, 4), np.float32)}
    norms = []
    for _ in range(steps):
        out = engine.run("step", arrays)
        norms.append(out.pop("grad_norm"))
        arrays.update(out)
    return arrays, norms


def test_elbo_rises_at_every_step_and_ends_at_log_px(engine, data):
    exact = engine.log_px(**data)
    elbos = []
    for steps in range(25):
        arrays, _ = refined(engine, data, steps)
        elbos.append(engine.elbo(data["x"], data["mask"], arrays["q0.mu"], arrays["q0.log_sigma"]))
    assert np.all(np.diff(elbos, axis=0) > -1e-5)
    assert np.all(elbos[0] < exact)
    np.testing.assert_allclose(elbos[-1], exact, atol=1e-4)


def test_log_px_is_the_density_of_the_marginal_gaussian(engine):
    """Against the dense multivariate normal of the observed entries."""
    x = np.random.default_rng(1).standard_normal((1, X_SIZE))
    covariance = 0.49 * np.eye(X_SIZE)
    covariance[:4, :4] += 2.25 * np.eye(4)
    seen = np.array([0, 2, 5, 7])
    mask = np.zeros((1, X_SIZE))
    mask[0, seen] = 1
    part = covariance[np.ix_(seen, seen)]
    expected = -0.5 * (x[0, seen] @ np.linalg.solve(part, x[0, seen]) + np.linalg.slogdet(2 * np.pi * part)[1])
    assert engine.log_px(x, mask)[0] == pytest.approx(expected)


def test_score_is_unbiased_and_its_weights_average_to_px(engine, data):
    arrays, _ = refined(engine, data, 3)
    arrays["noise0"] = normals(np.arange(ROWS, dtype=np.uint64), 0, purpose=Purpose.MEASURE, samples=20_000, size=4)
    scores = engine.run("score", arrays)
    elbo = scores["log_likelihood"].astype(np.float64).mean(axis=1) - scores["kl"][:, 0]
    spread = scores["log_likelihood"].std(axis=1) / np.sqrt(20_000)
    exact = engine.elbo(data["x"], data["mask"], arrays["q0.mu"], arrays["q0.log_sigma"])
    assert np.all(np.abs(elbo - exact) < 4 * spread + 1e-4)
    weights = scores["log_weight"].astype(np.float64)
    log_px = np.log(np.mean(np.exp(weights - weights.max(axis=1, keepdims=True)), axis=1)) + weights.max(axis=1)
    np.testing.assert_allclose(log_px, engine.log_px(**data), atol=0.02)


def test_the_norm_of_the_gradient_vanishes_at_the_posterior_and_agrees_with_finite_differences(engine, data):
    _, norms = refined(engine, data, 30)
    assert norms[-1].max() < 1e-4
    start, _ = refined(engine, data, 0)
    mu, log_sigma, gradient = start["q0.mu"].astype(np.float64), start["q0.log_sigma"].astype(np.float64), []
    for which in (0, 1):
        for d in range(4):
            shift = [np.zeros_like(mu), np.zeros_like(mu)]
            shift[which][:, d] = 1e-5
            up, down = (engine.elbo(data["x"], data["mask"], mu + s * shift[0], log_sigma + s * shift[1]) for s in (1, -1))
            gradient.append((up - down) / 2e-5)
    np.testing.assert_allclose(norms[0], np.linalg.norm(gradient, axis=0), rtol=1e-4)


def test_a_non_finite_row_keeps_its_carry_and_reports_it(engine, data):
    data["x"][2], data["mask"][2] = 1e38, 1
    arrays, norms = refined(engine, data, 3)
    assert np.isinf(norms[0][2])
    assert np.isfinite(np.delete(norms[0], 2)).all()
    assert arrays["q0.mu"][2].tolist() == [0] * 4


def test_every_program_takes_and_returns_what_the_card_lists_and_rows_do_not_see_each_other(engine):
    rng = np.random.default_rng(0)
    for program, spec in engine.card.programs.items():
        shape = {"rows": ROWS, "samples": 3}
        arrays = {t.name: rng.standard_normal([shape.get(n, n) for n in t.shape]).astype(t.dtype) for t in spec.inputs}
        together = engine.run(program, arrays)
        assert list(together) == [tensor.name for tensor in spec.outputs]
        for tensor in spec.outputs:
            assert together[tensor.name].shape == tuple(shape.get(n, n) for n in tensor.shape)
            assert together[tensor.name].dtype == tensor.dtype
        for row in range(ROWS):
            alone = engine.run(program, {name: value[row : row + 1] for name, value in arrays.items()})
            for name, value in alone.items():
                np.testing.assert_allclose(value[0], together[name][row], rtol=1e-5, atol=1e-5)


def test_a_direct_one_has_no_step_and_starts_at_the_posterior(data):
    engine = ClosedFormEngine(direct=True)
    assert not engine.card.iterative
    start = engine.run("init", data)
    elbo = engine.elbo(data["x"], data["mask"], start["q0.mu"], start["q0.log_sigma"])
    np.testing.assert_allclose(elbo, engine.log_px(**data), atol=1e-4)
    assert engine.card.curve.steps == (0,)


def test_the_curve_in_the_card_rises_and_so_do_the_quantiles(engine):
    curve, quantiles = engine.card.curve, engine.card.quantiles
    assert all(np.diff(curve.elbo) > -1e-6)
    assert curve.steps == quantiles.steps
    assert all(np.all(np.diff(level) > 0) for level in quantiles.elbo)


def test_slots_hold_rows_between_runs(engine, data):
    engine.allocate(10)
    slots = np.array([7, 1, 4, 0, 9, 2], np.intp)
    engine.load_rows(slots, data)
    assert engine.run_rows("init", slots, {}) == {}
    noise = {"noise0": np.zeros((ROWS, 2, 4), np.float32)}
    for _ in range(3):
        assert list(engine.run_rows("step", slots, noise)) == ["grad_norm"]
    expected, _ = refined(engine, data, 3)
    kept = engine.read_rows(slots[::-1], ["q0.mu", "x"])
    assert np.array_equal(kept["q0.mu"], expected["q0.mu"][::-1])
    assert np.array_equal(kept["x"], data["x"][::-1])


def test_hooks_fail_and_delay_as_told():
    slept = []
    engine = ClosedFormEngine(fail_on=lambda program, _: program == "init", delay=lambda program, size: size / 10, sleep=slept.append)
    engine.run("decode", {"z0": np.zeros((2, 3, 4), np.float32)})
    assert slept == [0.6]
    with pytest.raises(RuntimeError, match="init failed"):
        engine.run("init", {})
    with pytest.raises(ValueError, match="latent"):
        ClosedFormEngine(latent=9, x_size=8)
