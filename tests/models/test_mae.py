"""mae: the encoder is a ViT that sees K patches; nothing of the others reaches what is predicted; costs; bad input."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import models, tasks
from tokenlab.core.errors import CheckpointError, ConfigError, ShapeError
from tokenlab.cost.flops import count
from tokenlab.layers.embed import patchify, unpatchify
from tokenlab.models.mae import MAE
from tokenlab.models.state import fit_state, flat
from tokenlab.ops import select
from tokenlab.sharding import rules
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import costs

IMAGE, N, D = (8, 8, 1), 16, 16
SPEC = {"image": (IMAGE, "float32")}
KEY, STEP = jax.random.key(0), jax.random.key(5)
BATCH = 3


def build(name: str = "mae", outputs: int | None = None, train: bool = True, **settings: Any) -> Any:
    outputs = outputs or (int(np.prod(IMAGE)) if name == "mae" else 10)
    settings = {"name": name, "size": "nano/2", **settings}
    return models.build(settings, spec=SPEC, num_outputs=outputs, train=train)


def images(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (BATCH, *IMAGE)).astype(np.float32)


@functools.cache
def drawn(**settings: Any) -> tuple[MAE, Any]:
    """A model and weights of which none is zero."""
    model = build(**settings)
    shapes = model.abstract_state()
    leaves, structure = jax.tree.flatten(shapes)
    generator = np.random.default_rng(1)
    made = [generator.normal(0, 0.3, leaf.shape).astype(np.float32) for leaf in leaves]
    return model, jax.tree.unflatten(structure, made)


@functools.cache
def ran(**settings: Any) -> Any:
    model, state = drawn(**settings)
    return jax.device_get(apply(model, state, images()))


def apply(model: Any, state: Any, image: np.ndarray, **how: Any) -> Any:
    how = {"rng": STEP, "train": True, **how}
    return jax.jit(lambda state, image: model.apply(state, {"image": image}, **how))(state, image)


# ------------------------------------------------------------------------------------------ masking


def test_which_patches_are_seen_is_what_the_scores_say() -> None:
    """Numpy's own ranking of the same scores; K of N, ascending, another set in each example."""
    model, output = drawn()[0], ran()
    assert (model.patches, model.kept, model.tokens_per_example) == (16, 4, 5)
    assert (
        model.layer_tokens == model.dense_layer_tokens == 5 * model.program.depth + 17 * model.decoder.depth
    )
    scores = np.asarray(select.random_scores(model_key(), BATCH, 1 + N))[:, 1:]
    expected = np.sort(np.argsort(-scores, axis=1, kind="stable")[:, :4], axis=1)
    np.testing.assert_array_equal(output.places, expected)
    assert len({tuple(row) for row in output.places}) == BATCH
    other = apply(*drawn(), images(), rng=jax.random.key(6))
    assert (np.asarray(other.places) != output.places).any()


def model_key() -> jax.Array:
    from tokenlab.layers.context import Context

    return Context(STEP, True).key("mask", 0)


def test_nothing_of_a_hidden_patch_reaches_the_prediction() -> None:
    model, state = drawn()
    output = ran()
    hidden = np.ones((BATCH, N), bool)
    np.put_along_axis(hidden, output.places, False, axis=1)
    patches = np.array(patchify(images(), 2))
    patches[hidden] = 7.0
    changed = apply(model, state, np.asarray(unpatchify(patches, (4, 4), 1)))
    np.testing.assert_array_equal(changed.logits, output.logits)
    patches[0, output.places[0, 0]] += 1.0  # and of one that is seen it does
    changed = apply(model, state, np.asarray(unpatchify(patches, (4, 4), 1)))
    assert np.abs(np.asarray(changed.logits) - output.logits)[0].max() > 1e-3


def test_against_the_parts_by_hand() -> None:
    """Embed, take, run, norm, restore, decode: each with numpy's indexing in place of ours."""
    model, state = drawn(head="mean")
    output = ran(head="mean")

    @jax.jit
    def encoder(state: Any, image: Any) -> Any:
        tokens = model.embed.apply({"params": state["embed"]}, image)
        seen = jnp.stack([x[rows] for x, rows in zip(tokens.x, output.places, strict=True)])
        return model.run(
            state, tokens.replace(x=seen, position=jnp.asarray(output.places)), _context()
        ).tokens.x

    normed = _norm(np.asarray(encoder(state, images())), state["head"]["norm"])
    np.testing.assert_allclose(output.tokens, normed, rtol=2e-4, atol=2e-4)
    own = state["decoder"]
    full = np.broadcast_to(own["mask_token"], (BATCH, N, D)).copy()
    into = normed @ own["embed"]["kernel"] + own["embed"]["bias"]
    np.put_along_axis(full, output.places[..., None], into, axis=1)
    full += np.asarray(_table())
    done = _blocks(model, own, full)
    pixels = _norm(done, own["norm"]) @ own["pixels"]["kernel"] + own["pixels"]["bias"]
    np.testing.assert_allclose(output.logits, pixels, rtol=2e-3, atol=2e-3)


def _context() -> Any:
    from tokenlab.layers.context import Context

    return Context(STEP, True)


def _table() -> Any:
    from tokenlab.ops.position import sincos_2d

    return sincos_2d(4, 4, D)


def _norm(x: np.ndarray, params: Any) -> np.ndarray:
    off = x - x.mean(-1, keepdims=True)
    return off / np.sqrt((off**2).mean(-1, keepdims=True) + 1e-6) * params["scale"] + params["bias"]


def _blocks(model: MAE, own: Any, x: np.ndarray) -> np.ndarray:
    """The decoder's one block in numpy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf[0], np.float64), own["blocks"])
    y = _norm(x, p["attention_norm"])
    q, k, v = (
        np.einsum("bnd,dhe->bnhe", y, p["attention"][n]["kernel"]) + p["attention"][n]["bias"]
        for n in ("query", "key", "value")
    )
    a = np.einsum("bnhe,bmhe->bhnm", q, k) / np.sqrt(q.shape[-1])
    a = np.exp(a - a.max(-1, keepdims=True))
    a /= a.sum(-1, keepdims=True)
    mixed = np.einsum("bhnm,bmhe->bnhe", a, v)
    x = x + np.einsum("bnhe,hed->bnd", mixed, p["attention"]["out"]["kernel"]) + p["attention"]["out"]["bias"]
    y = _norm(x, p["ffn_norm"]) @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"]
    y = np.asarray(jax.nn.gelu(jnp.asarray(y)))
    return x + y @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"]


def test_all_patches_seen_is_the_vit() -> None:
    """keep=1.0, the masking really executed: the encoder's tokens are the ViT's bit for bit."""
    model, state = drawn(keep=1.0)
    output = ran(keep=1.0)
    np.testing.assert_array_equal(output.places, np.broadcast_to(np.arange(N), (BATCH, N)))
    twin = build("vit", position="sincos")
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), twin.abstract_state()["head"])
    whole = {**state, "head": {**zeros, "norm": state["head"]["norm"]}}
    found = apply(twin, whole, images())
    np.testing.assert_array_equal(output.tokens, found.tokens)
    np.testing.assert_array_equal(output.features, found.features)
    jaxpr = str(jax.make_jaxpr(lambda s: model.apply(s, {"image": images()}, rng=STEP).logits)(state))
    assert "sort" in jaxpr


def test_features_at_evaluation_are_those_of_the_whole_image() -> None:
    model, state = drawn()
    seen = jax.device_get(apply(model, state, images(), train=False))
    full = jax.device_get(apply(drawn(keep=1.0)[0], state, images(), train=False))
    np.testing.assert_array_equal(seen.features, full.features)
    np.testing.assert_array_equal(seen.logits, ran().logits)
    assert np.abs(seen.features - ran().features).max() > 1e-3


STACKS = [
    {"stack": "block + merge(1) + block", "registers": 2},
    {"stack": "block(special=jumbo)*2", "head": "special", "registers": 3},
]
FURTHER = [
    {"stack": "block + keep(0.5, by=norm) + block"},
    {"stack": "block + skip(keep=2, by=random)(block)", "head": "mean", "registers": 3},
]


@pytest.mark.parametrize(
    "settings",
    [*STACKS, *(pytest.param(each, marks=pytest.mark.slow) for each in FURTHER)],
    ids=lambda settings: settings["stack"],
)
def test_any_stack_runs_on_what_is_seen(settings: dict[str, Any]) -> None:
    output = ran(**settings)
    assert output.logits.shape == (BATCH, N, 4) and output.places.shape == (BATCH, 4)
    assert np.isfinite(output.logits).all()


def test_scanned_and_rematerialised_are_the_same() -> None:
    model, state = drawn(decoder_depth=2)
    how = ({"execution": "unroll"}, {"execution": "scan"}, {"execution": "scan", "remat": "full"})

    @jax.jit
    def all_ways(state: Any, image: Any) -> Any:
        return [model.apply(state, {"image": image}, train=True, rng=STEP, **each).logits for each in how]

    plain, *others = all_ways(state, images())
    for other in others:
        np.testing.assert_array_equal(other, plain)


# ------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize(
    "settings",
    [
        {"position": "sincos"},
        {"registers": 4, "head": "mean", "position": "learned"},
        {"stack": "block + keep(0.5, by=learned) + block", "position": "rope", "num_heads": 4},
        {"stack": "block(special=jumbo)*2", "head": "special", "registers": 3, "position": "learned"},
    ],
    ids=str,
)
def test_the_encoder_is_a_vit_weight_by_weight(settings: dict[str, Any]) -> None:
    """Same paths and shapes."""
    ours, vit = (build(name, **settings).abstract_state() for name in ("mae", "vit"))
    assert {*ours} - {*vit} == {"decoder"} and {*ours["head"]} == {"norm"}
    del ours["decoder"], vit["head"]["classifier"]
    assert jax.tree.structure(ours) == jax.tree.structure(vit)
    assert {path: leaf.shape for path, leaf in flat(ours).items()} == {
        path: leaf.shape for path, leaf in flat(vit).items()
    }


def test_it_begins_as_the_vit_of_the_same_key() -> None:
    both = [build(name, stack="block", position="sincos") for name in ("mae", "vit")]
    ours, vit = jax.jit(lambda key: [model.init(key) for model in both])(KEY)
    for path, leaf in flat(vit).items():
        if not path.startswith("head/classifier"):
            np.testing.assert_array_equal(flat(ours)[path], leaf)


def test_another_run_takes_the_encoder_and_leaves_the_decoder() -> None:
    _, saved = drawn()
    vit = build("vit", position="sincos")
    leaves, notes = fit_state(saved, vit.abstract_state(), ("head/classifier",), source="it", left_out=False)
    assert {*leaves} == {*flat(vit.abstract_state())} - {"head/classifier/kernel", "head/classifier/bias"}
    assert notes == ["it holds decoder, which pre-training alone needs: left out"]
    with pytest.raises(CheckpointError, match="parameter head/classifier/bias: .* does not have it"):
        fit_state(saved, vit.abstract_state())
    back, notes = fit_state(leaves_of(vit), build().abstract_state(), ("decoder", "head/classifier"))
    assert not notes and "embed/cls" in back and not any(path.startswith("decoder") for path in back)
    with pytest.raises(CheckpointError, match="parameter decoder/.* does not have it"):
        fit_state(leaves_of(vit), build().abstract_state(), ("head/classifier",))


def leaves_of(model: Any) -> Any:
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_state())


def test_published_parameter_counts() -> None:
    """The authors' mae_vit_base_patch16_dec512d8b less its two tables of positions, which here are no weights."""
    spec = {"image": ((224, 224, 3), "float32")}
    model = models.build({"name": "mae", "size": "B/16"}, spec=spec, num_outputs=224 * 224 * 3)
    found = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model.abstract_state()))
    assert found == 111_907_840 - 197 * (768 + 512)
    assert (model.kept, model.patches, model.decoder.depth) == (49, 196, 8)


# ------------------------------------------------------------------------------------------ costs


def by_hand(n: int, seen: int, d: int, f: int, depth: int, own: tuple[int, int], patch: int) -> int:
    width, blocks = own

    def block(tokens: int, width: int, hidden: int) -> int:
        return 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * width * hidden

    encoder = 2 * n * patch * d + depth * block(seen + 1, d, f)
    into, out = 2 * (seen + 1) * d * width, 2 * n * width * patch
    return encoder + into + blocks * block(n + 1, width, 4 * width) + out


def test_counted_flops_at_the_width_of_the_published_base_model() -> None:
    """Forward exactly, and training, in which images need no gradient; the other patches cost the encoder nothing."""
    spec = {"image": ((224, 224, 3), "float32")}
    settings = {"name": "mae", "size": "B/16", "stack": "block*2", "decoder_depth": 2}
    dense, model = (
        models.build({**settings, "keep": keep}, spec=spec, num_outputs=224 * 224 * 3) for keep in (1.0, 0.25)
    )
    task = tasks.build({"name": "mae"})
    expected, seen = by_hand(196, 196, 768, 3072, 2, (512, 2), 768), 49
    assert costs.forward_cost(dense, task, spec).flops == expected
    expected = by_hand(196, seen, 768, 3072, 2, (512, 2), 768)
    table = costs.cost_table(model, task, spec)
    assert table.total.forward_flops == expected
    assert table.total.train_flops == 3 * expected - 2 * 196 * 768 * 768
    rows = {row.name: row for row in table.rows}
    assert rows["block_00"].tokens == seen + 1 and rows["decoder/block_01"].tokens == 197
    assert sum(row.parameters for row in table.rows) == sum(
        leaf.size for leaf in jax.tree.leaves(model.abstract_state())
    )


def test_pieces_of_a_jumbo_token_are_seen_always_and_cost_what_they_do_in_a_vit() -> None:
    """16 J^2 D^2 and J more tokens in attention, on K patches (the specification's formula)."""
    spec = {"image": ((224, 224, 3), "float32")}
    settings = {"size": "Ti/16", "stack": "block(special=jumbo)*2", "head": "special", "registers": 6}
    model = models.build({"name": "mae", **settings}, spec=spec, num_outputs=224 * 224 * 3)
    d, k, j = 192, 49, 6
    scopes = costs.forward_cost(model, tasks.build({"name": "mae"}), spec).by_scope
    own = sum(flops for path, flops in scopes.items() if "block_01" in path and "decoder" not in path)
    expected = 8 * (k + j) * d**2 + 4 * (k + j) ** 2 * d + 16 * k * d**2 + 16 * j**2 * d**2
    assert (model.program.after, own) == (k + j, expected)
    assert model.whole.abstract_state()["head"]["classifier"]["kernel"].shape == ((j + 1) * d, 1)


def test_what_nobody_reads_of_the_whole_image_costs_nothing() -> None:
    model, state = drawn()
    batch = {"image": images()}
    seen = count(lambda state: model.apply(state, batch).logits, state).flops
    both = count(lambda state: [(o := model.apply(state, batch)).logits, o.features], state).flops
    assert seen == BATCH * by_hand(N, 4, D, 32, 2, (16, 1), 4) < both


# ------------------------------------------------------------------------------------------ devices


@pytest.mark.slow
def test_eight_devices_hide_the_same_patches() -> None:
    model, state = drawn()
    task = tasks.build({"name": "mae"})
    image = np.concatenate([images(seed) for seed in range(8)])[:16]
    batch = {"image": image, "mask": np.ones(16, np.float32)}

    def loss(state: Any, batch: Any) -> Any:
        return task.loss(model, state, batch, rng=STEP, train=True)[0]

    alone = jax.jit(loss)(state, batch)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    places = rules.shardings(state, model.logical_axes(), mesh)
    rows = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    with jax.set_mesh(mesh):
        spread = jax.jit(loss, in_shardings=(places, rows))(
            jax.device_put(state, places), jax.device_put(batch, rows)
        )
    np.testing.assert_allclose(spread, alone, rtol=1e-5)


# ------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"keep": 0}, r"config.model.keep is the count 0; a count must lie in 1..16"),
        ({"keep": 17}, r"config.model.keep is the count 17"),
        ({"keep": 1.5}, r"config.model.keep is the fraction 1.5"),
        ({"keep": 0.01}, "rounds to none"),
        (
            {"decoder_width": 18},
            "decoder_width is 18 with 2 heads; expected a multiple of the heads and of 4",
        ),
        ({"decoder_depth": 0}, "decoder_depth must be at least 1; got 0"),
        ({"decoder_heads": 3}, "decoder_width is 16 with 3 heads"),
        ({"outputs": 10}, "gives the 64 values of a picture, and the task asks for 10 outputs"),
        ({"position": "sin"}, "position"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(**settings)


def test_images_that_do_not_fit() -> None:
    with pytest.raises(ShapeError, match="mae: built for images"):
        build().apply({}, {"image": np.zeros((1, 4, 4, 1), np.float32)})
    with pytest.raises(ConfigError, match="mae reads 'image'"):
        models.build({"name": "mae"}, spec={"ids": ((4,), "int32")}, num_outputs=4)
    with pytest.raises(ShapeError, match="unpatchify"):
        unpatchify(jnp.zeros((1, 4, 3)), (2, 2), 1)
