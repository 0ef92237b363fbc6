"""GRIN: the estimated gradient against the exact one by enumeration, and what is sampled.

One token, E = 5 experts that give the vectors e_i, K = 1, a loss f. What SparseMixer-v2 estimates is the gradient of

    L(z) = sum_i p_i(z) f(q_i e_i),   q_i = p_i held fixed:    dL/dz = sum_i (f(p_i e_i) - f(0)) dp_i/dz

and what it returns is, for each D and B, the gradient of f at c p_D e_D as if c were 1.
"""

from __future__ import annotations

from functools import partial

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from tokenlab.core.errors import ConfigError, TokenLabError
from tokenlab.methods.experts import grin
from tokenlab.methods.experts.grin import GRIN, Draws, masked_softmax, sparse_mixer
from tokenlab.ops import route

E = 5
close = partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-5)
equal = np.testing.assert_array_equal

# Compiling is nearly all of the time, and the numbers need no optimised code.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
mask_and_softmax = quick(masked_softmax, static_argnums=(1, 2))
mix = quick(sparse_mixer, static_argnums=(1, 2), static_argnames="version")
draw = quick(grin.draw, static_argnums=(1, 2))

LOGITS = np.array([0.9, 1.4, 0.2, 1.1, 1.3], np.float32)  # the largest is 1
R = 0.2  # leaves expert 2 out: (1.4 - 0.2) / 1.4 > 0.4
CANDIDATES = [0, 1, 3, 4]
VECTORS = 2 * np.random.default_rng(0).normal(size=(E, 3)).astype(np.float32)
SLOPE = np.array([0.7, -1.2, 0.4], np.float32)


def linear(y):
    return y @ SLOPE + 0.3


def cubic(y):
    t = y @ SLOPE
    return 2 * t**3 - t**2 + 0.5 * t + 0.3 + (y**3).sum()


gradient_of = {f: quick(jax.grad(f)) for f in (linear, cubic)}


def draws_of(expert, full, shape=(E,)):
    """Draws under which `expert` is sampled, and B is `full`."""
    gumbel = np.where(np.arange(E) == expert, 100.0, 0.0) * np.ones(shape)
    return Draws(jnp.asarray(gumbel, jnp.float32), jnp.full(shape[:-1], 0.0 if full else 0.999))


def probabilities(version="v2"):
    z = np.float64(LOGITS) / (2 if version == "v2star" else 1)
    p = np.where(np.isin(np.arange(E), CANDIDATES), np.exp(z), 0.0)
    return p / p.sum()


def slopes(version="v2"):
    """dp_i/dz_j, [i, j]."""
    p = probabilities(version)
    return (np.diag(p) - np.outer(p, p)) / (2 if version == "v2star" else 1)


@pytest.fixture(scope="module")
def estimate():
    """(f, version) -> {(D, B): dL/dz as the library has it}."""

    def run(f, version):
        @quick
        def gradient(z, draws):
            def loss(z):
                mixed = sparse_mixer(z, 1, R, draws=[draws], version=version)
                return f(mixed.weight[0] * jnp.asarray(VECTORS)[mixed.expert[0]]), mixed

            return jax.grad(loss, has_aux=True)(z)

        found = {}
        for expert in CANDIDATES:
            for full in (True, False):
                slope, mixed = gradient(LOGITS, draws_of(expert, full))
                assert mixed.expert[0] == expert
                found[expert, full] = np.float64(slope)
        return found

    return run


def terms(f, version):
    """What the estimate given D should be on average, times p_D: the term i = D of the exact gradient."""
    p, dp = probabilities(version), slopes(version)
    results = [np.float64(p[i]) * VECTORS[i] for i in range(E)]
    weights = [float(f(y) - f(0 * y)) for y in results]
    if version == "v2star":  # p is not held fixed inside f
        weights = [
            w + float(gradient_of[f](jnp.float32(y)) @ y) for w, y in zip(weights, results, strict=True)
        ]
    return np.stack([w * row for w, row in zip(weights, dp, strict=True)])


def averages(found, version):
    """Mean over B of the estimates, times p_D, for every D."""
    p, full = probabilities(version), grin.FULL[version]
    rows = np.zeros((E, E))
    for expert in CANDIDATES:
        rows[expert] = p[expert] * (full * found[expert, True] + (1 - full) * found[expert, False])
    return rows


def test_finite_differences_of_the_enumerated_objective():
    """The exact gradient that the estimates are held against is the derivative of L."""
    p = probabilities()
    values = np.array([float(cubic(p[i] * VECTORS[i].astype(np.float64))) for i in range(E)])

    def objective(z):
        q = np.where(np.isin(np.arange(E), CANDIDATES), np.exp(z), 0.0)
        return (q / q.sum()) @ values

    step = 1e-5 * np.eye(E)
    by_difference = [(objective(LOGITS + s) - objective(LOGITS - s)) / 2e-5 for s in step]
    close(terms(cubic, "v2").sum(0), by_difference)


@pytest.mark.parametrize("version", ["v2", "v2star"])
def test_for_a_linear_loss_the_estimate_is_exact(estimate, version):
    found = averages(estimate(linear, version), version)
    close(found.sum(0), terms(linear, version).sum(0), atol=1e-6)
    assert np.abs(found.sum(0)).max() > 0.01


@pytest.mark.parametrize("version", ["v2", "v2star"])
def test_for_a_cubic_loss_it_is_exact_but_for_the_argmax(estimate, version):
    """Heun's rule is exact for every other D; the argmax has c = 1 (Euler's rule), which is the documented bias."""
    found, exact = averages(estimate(cubic, version), version), terms(cubic, version)
    others = [expert for expert in CANDIDATES if expert != 1]
    close(found[others], exact[others], atol=5e-6)
    assert np.abs(found[1] - exact[1]).max() > 0.01
    p, dp = probabilities(version), slopes(version)
    y = p[1] * VECTORS[1].astype(np.float64)
    euler = float(gradient_of[cubic](jnp.float32(y)) @ y) * (2 if version == "v2star" else 1)
    close(found[1], euler * dp[1], atol=5e-6)


def test_for_a_cubic_loss_it_is_exact_when_the_argmax_too_takes_heun(monkeypatch):
    """delta is forced to 0: no expert counts as the best."""
    exact = terms(cubic, "v2")
    plain_argmax = jnp.argmax

    @partial(quick, static_argnums=2)
    def gradient(z, draws, forced):
        calls = []

        def argmax(x, axis):
            calls.append(x)
            # The first argmax of a choice is that of the logits, the second samples.
            return plain_argmax(x, axis=axis) + (99 if forced and len(calls) == 1 else 0)

        monkeypatch.setattr(grin.jnp, "argmax", argmax)

        def loss(z):
            mixed = sparse_mixer(z, 1, R, draws=[draws])
            return cubic(mixed.weight[0] * jnp.asarray(VECTORS)[mixed.expert[0]]), mixed.factor[0]

        out = jax.grad(loss, has_aux=True)(z)
        monkeypatch.setattr(grin.jnp, "argmax", plain_argmax)
        assert len(calls) == 2
        return out

    found = np.zeros((E, E))
    for expert in CANDIDATES:
        for full, weight in ((True, 1 / 4), (False, 3 / 4)):
            row, factor = gradient(LOGITS, draws_of(expert, full), True)
            assert float(factor) == pytest.approx(1.0 if full else 1 / 3)
            found[expert] += probabilities()[expert] * weight * np.float64(row)
    close(found.sum(0), exact.sum(0), atol=5e-6)
    unforced = gradient(LOGITS, draws_of(1, False), False)[1]
    assert unforced == 1.0


def test_the_gradient_has_no_factor_c_and_none_outside_the_candidates(estimate):
    """dL/dz_j = g p_D ([j = D] - p_j), g taken at the scaled output."""
    found, p = estimate(cubic, "v2"), probabilities()
    for (expert, full), gradient in found.items():
        c = 1.0 if full or expert == 1 else 1 / 3
        y = c * p[expert] * VECTORS[expert].astype(np.float64)
        g = float(gradient_of[cubic](jnp.float32(y)) @ VECTORS[expert])
        close(gradient, g * p[expert] * ((np.arange(E) == expert) - p), atol=5e-6)
        assert gradient[2] == 0


# The candidates


@pytest.mark.parametrize("rule", ["code", "paper"])
def test_candidates_are_the_rule(rule):
    generator = np.random.default_rng(0)
    z = generator.normal(size=(200, E)).astype(np.float32)
    available = generator.random((200, E)) < 0.7
    available[:, 3] = True
    p, mask = map(np.asarray, mask_and_softmax(z, 0.3, rule, available))
    for row in range(len(z)):
        top = max(z[row, i] for i in range(E) if available[row, i])
        for i in range(E):
            if rule == "code":
                near = (top - z[row, i]) / max(abs(z[row, i]), top) <= 0.6
            else:
                near = top - z[row, i] <= 0.3 * (abs(z[row, i]) + abs(top))
            assert mask[row, i] == (near and available[row, i])
        kept = np.where(mask[row], np.exp(np.float64(z[row])), 0.0)
        close(p[row], kept / kept.sum())
    assert 0.2 < np.mean(mask) < 0.65
    equal(p[~mask], 0)


def test_the_rules_differ_a_little():
    z = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    for r, low, high in ((0.1, 0.02, 0.15), (0.01, 0.0, 0.005)):
        differ = (mask_and_softmax(z, r, "code")[1] != mask_and_softmax(z, r, "paper")[1]).any(-1)
        assert low <= differ.mean() <= high


def test_nothing_flows_through_the_mask_or_out_of_it():
    z = jnp.array([[2.0, 1.9, -5.0, 1.0, -40.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    jacobian = np.asarray(quick(jax.jacobian(lambda z: masked_softmax(z, 0.1)[0]))(z))
    assert np.isfinite(jacobian).all()
    p, mask = map(np.asarray, mask_and_softmax(z, 0.1))
    equal(mask, [[True, True, False, False, False], [True] * 5])
    exact = np.diag(p[0]) - np.outer(p[0], p[0])
    close(jacobian[0, :, 0], exact)
    equal(jacobian[0, :, 0][:, 2:], 0)


# Inference


def test_at_inference_the_best_are_taken_with_their_own_masks():
    """The second choice is a softmax around the largest of what is left, and the weights do not sum to 1."""
    z = jnp.array([[3.0, 1.0, 0.9, -4.0, 0.95]])
    mixed = mix(z, 3, 0.1)
    equal(mixed.expert, [[0, 1, 4]])
    equal(mixed.factor, 1.0)
    second, third = np.exp([1.0, 0.95, 0.9]), np.exp([0.95, 0.9])
    close(mixed.weight, [[1.0, second[0] / second.sum(), third[0] / third.sum()]])


def test_without_room_for_others_the_weight_is_one():
    z = jax.random.normal(jax.random.key(0), (50, E))
    for mixed in (
        mix(z, 2, 0.0),
        mix(z, 2, 0.0, draws=draw(jax.random.key(1), z.shape, 2)),
    ):
        equal(mixed.weight, 1.0)
        equal(mixed.factor, 1.0)
        equal(mixed.expert, np.argsort(-z, -1)[:, :2])


def test_with_room_for_all_the_weight_is_the_largest_probability():
    z = jax.random.normal(jax.random.key(0), (50, E))
    mixed = mix(z, 1, 1e6)
    close(mixed.weight[:, 0], jax.nn.softmax(z).max(-1))
    star = mix(z, 1, 1e6, version="v2star")
    close(star.weight[:, 0], jax.nn.softmax(z / 2).max(-1))


# Sampling


@pytest.fixture(scope="module")
def sampled():
    """40,000 tokens of the same logits, three choices each."""
    n = 40_000

    @quick
    def run(key, logits):  # which would be computed with while compiling, were they a constant
        z = jnp.broadcast_to(logits, (n, E))
        return sparse_mixer(z, 3, R, draws=grin.draw(key, z.shape, 3))

    return jax.tree.map(np.asarray, run(jax.random.key(0), LOGITS))


def test_experts_are_sampled_by_their_probabilities(sampled):
    counts = np.bincount(sampled.expert[:, 0], minlength=E)
    assert counts[2] == 0  # no candidate
    expected = len(sampled.expert) * probabilities()
    assert stats.chisquare(counts[CANDIDATES], expected[CANDIDATES]).pvalue > 1e-3
    # The second choice, given the first was 1: among 0, 3, 4 around the new maximum.
    second = np.bincount(sampled.expert[sampled.expert[:, 0] == 1, 1], minlength=E)
    p = np.exp(LOGITS[[0, 3, 4]].astype(np.float64))
    assert second[[1, 2]].sum() == 0
    assert stats.chisquare(second[[0, 3, 4]], second.sum() * p / p.sum()).pvalue > 1e-3


def test_no_expert_is_chosen_twice(sampled):
    assert (np.diff(np.sort(sampled.expert, axis=1), axis=1) > 0).all()


@pytest.mark.parametrize("choice", [0, 1, 2])
def test_the_factor_is_one_or_a_third(sampled, choice):
    """And 1 with probability 1/4 unless the expert is the best of those left."""
    factor = sampled.factor[:, choice]
    equal(np.unique(factor), np.float32([1 / 3, 1]))
    left = np.tile(LOGITS, (len(factor), 1))
    for earlier in range(choice):
        np.put_along_axis(left, sampled.expert[:, earlier : earlier + 1], -np.inf, -1)
    best = sampled.expert[:, choice] == left.argmax(-1)
    equal(factor[best], 1.0)
    full = (factor[~best] == 1).sum()
    assert stats.binomtest(int(full), int((~best).sum()), 1 / 4).pvalue > 1e-3


def test_coins_and_choices_are_drawn_apart(sampled):
    """Were one key used twice, the second coin would repeat the first."""
    best = [sampled.factor[:, choice] == 1 for choice in range(2)]
    both = (sampled.expert[:, 0] != 1) & ~np.isin(sampled.expert[:, 1], [1, 4])
    table = [[(best[0] == a)[both & (best[1] == b)].sum() for a in (0, 1)] for b in (0, 1)]
    assert stats.chi2_contingency(table).pvalue > 1e-3
    first, second = draw(jax.random.key(0), (64, E), 2)
    assert (first.gumbel != second.gumbel).all() and (first.uniform != second.uniform).all()


# The layer


@pytest.fixture(scope="module")
def layer(expert):
    return GRIN(E, 2, 0.5, expert=expert)


@pytest.fixture(scope="module")
def params(layer, x, weights):
    return weights(layer, x)


@pytest.mark.parametrize("train", [False, True])
def test_the_layer_is_the_mixture_of_all_experts(layer, params, x, each_expert, train, monkeypatch):
    draws = draw(jax.random.key(7), (3, 7, E), 2)
    monkeypatch.setattr(grin, "draw", lambda key, shape, k: draws)
    rngs = {"ffn": jax.random.key(0)}
    y, aux = quick(lambda p, x: layer.apply({"params": p}, x, train=train, rngs=rngs))(params, x)
    mixed = mix(x @ params["router"], 2, 0.5, draws=draws if train else None)
    dense = (np.eye(E)[np.asarray(mixed.expert)] * np.asarray(mixed.weight)[..., None]).sum(2)
    close(y, np.einsum("bne,ebnd->bnd", dense, each_expert(params["experts"], x)), atol=1e-5)
    close(aux.load, np.bincount(np.ravel(mixed.expert), minlength=E) / mixed.expert.size)
    if train:
        assert len(np.unique(mixed.factor)) == 2


def test_training_draws_and_needs_an_rng(layer, params, x):
    run = quick(lambda key: layer.apply({"params": params}, x, train=True, rngs={"ffn": key})[0])
    one, again, other = (run(jax.random.key(i)) for i in (0, 0, 1))
    equal(one, again)
    assert np.abs(one - other).max() > 1e-3
    with pytest.raises(flax.errors.InvalidRngError):
        layer.apply({"params": params}, x, train=True)


@pytest.mark.parametrize("version", ["v2", "v2star"])
def test_kinds_of_expert_gradient_differ_by_c_alone(expert, x, weights, version):
    """Same output bit for bit, same router gradient; one token, so that a gradient belongs to one draw."""
    one = x[:1, :1]
    code = GRIN(E, 1, 2.0, version=version, expert=expert, balance=0.0)
    params = weights(code, one)
    cotangent = jnp.arange(1.0, 6.0)

    def compiled(layer):
        @quick
        @partial(jax.grad, has_aux=True)
        def run(params, draws):
            grin_draw, grin.draw = grin.draw, lambda key, shape, k: (draws,)
            y, _ = layer.apply({"params": params}, one, train=True, rngs={"ffn": jax.random.key(0)})
            grin.draw = grin_draw
            return (y * cotangent).sum(), y

        return run

    by_code, by_paper = compiled(code), compiled(code.clone(expert_grad="paper"))
    logits = np.asarray(one @ params["router"])[0, 0]
    seen = set()
    for chosen in {int(logits.argmax()), int(logits.argsort()[-2])}:
        for full in (True, False):
            draws = draws_of(chosen, full, (1, 1, E))
            (a, y), (b, same) = by_code(params, draws), by_paper(params, draws)
            equal(y, same)
            close(a["router"], b["router"])
            assert np.abs(a["router"]).max() > 1e-3
            c = 1.0 if full or chosen == int(logits.argmax()) else 1 / 3
            c = c / 2 if version == "v2star" else c
            jax.tree.map(lambda a, b, c=c: close(a, c * np.asarray(b)), a["experts"], b["experts"])
            assert np.abs(b["experts"]["up"]["kernel"][chosen]).max() > 1e-3
            seen.add(round(c, 3))
    assert seen == ({1.0, 0.333} if version == "v2" else {0.5, 0.167})


def test_the_balance_loss_is_its_weight_at_even_routing(layer, params, x):
    even = {**params, "router": jnp.zeros((5, E))}
    run = quick(
        lambda p, x, valid: layer.clone(balance=0.25).apply(
            {"params": p}, x, valid=valid, train=True, rngs={"ffn": jax.random.key(0)}
        )[1]
    )
    valid = np.ones((3, 7), bool)
    valid[1, :3] = False
    close(run(even, x, valid).losses["balance_loss"], 0.25)
    loss = run(params, x, valid).losses["balance_loss"]
    assert loss > 0.252
    logits = x @ params["router"]
    drawn = draw(layer.bind({}, rngs={"ffn": jax.random.key(0)}).make_rng("ffn"), (3, 7, E), 2)
    chosen = np.where(valid[..., None], mix(logits, 2, 0.5, draws=drawn).expert, E)
    close(loss, 0.25 * quick(route.balance_loss)(jax.nn.softmax(logits), chosen, valid))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "options", "says"),
    [
        ((0, 0.1), {}, "k = 0 of 5 experts; k must be in 1..5"),
        ((6, 0.1), {}, "k = 6 of 5"),
        ((True, 0.1), {}, "k = True"),
        ((1, -0.1), {}, "r must be at least 0; got -0.1"),
        ((1, float("nan")), {}, "r must be at least 0; got nan"),
        ((1, 0.1), {"version": "v1"}, "version must be one of v2, v2star; got 'v1'"),
        ((1, 0.1), {"rule": "codes"}, "rule must be 'code' or 'paper'; got 'codes'"),
        ((2, 0.1), {"draws": [draws_of(0, True)]}, "2 choices need 2 draws; got 1"),
    ],
)
def test_bad_arguments(arguments, options, says):
    with pytest.raises(TokenLabError, match=says) as error:
        sparse_mixer(jnp.asarray(LOGITS), *arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(bad):
    with pytest.raises(TokenLabError, match="logits are not all finite"):
        sparse_mixer(jnp.asarray(LOGITS).at[2].set(bad), 1, 0.1)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"balance": -0.1}, ConfigError, "balance must be at least 0; got -0.1"),
        ({"r": -1.0}, TokenLabError, "r must be at least 0"),
        ({"k": 6}, TokenLabError, "k = 6 of 5 experts"),
        ({"k": 0}, TokenLabError, "k = 0 of 5 experts"),
        ({"version": "v3"}, TokenLabError, "version must be one of"),
        ({"expert_grad": "codes"}, ConfigError, "expert_grad 'codes' is unknown. Did you mean 'code'"),
        ({"implementation": "megablox"}, TokenLabError, "runs on TPU"),
    ],
    ids=lambda value: "=".join(map(str, list(value.items())[0])) if isinstance(value, dict) else "",
)
def test_bad_settings(layer, params, x, change, error, says):
    with pytest.raises(error, match=says) as raised:
        layer.clone(**change).apply({"params": params}, x)
    assert "\n" not in str(raised.value)
