"""vq_image: pictures to codes and back, both quantisers; settings and data that do not fit; its cost; eight devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tokenlab import data, models, tasks
from tokenlab.core.errors import ConfigError, ShapeError, StackError
from tokenlab.models.vq_image import VQImage
from tokenlab.sharding.check import assert_no_activation_collective
from tokenlab.sharding.mesh import make_mesh
from tokenlab.sharding.rules import DEFAULT_RULES
from tokenlab.train import costs
from tokenlab.train import optimizer as optimizers
from tokenlab.train import state as states
from tokenlab.train.config import OptimizerConfig, ScheduleConfig
from tokenlab.train.step import make_train_step, metric_names

SIDES, CHANNELS, BATCH = (8, 16), 3, 8
SPEC = {"image": ((*SIDES, CHANNELS), "float32")}
SETTINGS = {
    "vq": {"size": "tiny", "factor": 4, "width": 8, "codes": 16},
    "fsq": {"size": "tiny", "factor": 4, "width": 8, "quantizer": "fsq", "levels": (4, 3)},
}

each = pytest.mark.parametrize("quantizer", SETTINGS)


def build(settings: dict[str, Any], spec: Any = None, outputs: int | None = None, **facts: Any) -> VQImage:
    spec = SPEC if spec is None else spec
    values = int(np.prod(spec["image"][0])) if outputs is None else outputs
    return models.build({"name": "vq_image", **settings}, spec=spec, num_outputs=values, **facts)


def pictures(seed: int, rows: int = BATCH) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, *SIDES, CHANNELS)).astype(np.float32)


@functools.cache
def ran(quantizer: str) -> tuple[VQImage, Any, dict[str, Any]]:
    """A model, fresh weights, and what it makes of some pictures."""
    model = build(SETTINGS[quantizer])
    state = jax.jit(model.init)(jax.random.key(0))

    @jax.jit
    def everything(state: Any, image: jax.Array) -> dict[str, Any]:
        codes = model.encode(state, image)
        output = model.apply(state, {"image": image})
        again = model.decode(model.decoder_state(state), codes)
        return {"codes": codes, "output": output, "again": again}

    return model, state, jax.device_get(everything(state, pictures(0)))


@each
def test_codes_give_the_pictures_that_a_forward_pass_gives(quantizer: str) -> None:
    model, state, found = ran(quantizer)
    assert model.grid == (2, 4) and model.tokens_per_example == 8
    assert found["codes"].shape == (BATCH, 2, 4) and found["codes"].dtype == np.int32
    assert found["codes"].max() < model.codes_count == (16 if quantizer == "vq" else 12)
    assert len(np.unique(found["codes"])) > 3
    output = found["output"]
    assert output.logits.shape == (BATCH, *SIDES, CHANNELS) and output.logits.dtype == np.float32
    np.testing.assert_allclose(found["again"], output.logits, rtol=1e-5, atol=1e-6)
    assert output.features.shape == (BATCH, 2, 4, 16) and output.tokens.shape == (BATCH, 8, 16)
    assert set(output.losses) == ({"codebook_loss", "commitment_loss"} if quantizer == "vq" else set())
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype == jnp.float32


def test_a_grid_of_other_rows_than_columns_keeps_its_places() -> None:
    """What is changed in one corner of a picture changes the code there, and none that is far away."""
    model = build({**SETTINGS["fsq"], "blocks": 0})
    state = jax.jit(model.init)(jax.random.key(0))
    changed = pictures(0)
    changed[:, :4, 12:] *= -1
    both = jax.jit(lambda state, *images: [model.encode(state, each) for each in images])
    before, after = map(np.asarray, both(state, pictures(0), changed))
    assert (before[:, 0, 3] != after[:, 0, 3]).any()
    assert (before[:, :, 0] == after[:, :, 0]).all()


@each
def test_decoding_needs_a_part_of_the_weights_and_names_it(quantizer: str) -> None:
    model, state, _ = ran(quantizer)
    part = model.decoder_state(state)
    assert set(part) == {"quantizer", "decoder"} and "down" not in part["quantizer"]
    assert ("codebook" in part["quantizer"]) == (quantizer == "vq")


def test_defaults_are_written_out_so_that_codes_stay_readable() -> None:
    found = build({"size": "small"}).described
    assert (found["width"], found["blocks"], found["codes"], found["distance"]) == (32, 1, 512, "cosine")
    assert build({key: value for key, value in found.items() if key != "name"}).described == found
    assert build(SETTINGS["fsq"]).described["levels"] == [4, 3]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"size": "smal"}, ConfigError, "config.model.size 'smal' is unknown. Did you mean 'small'"),
        ({"factor": 1}, ConfigError, "factor must be a power of two from 2 on; got 1"),
        ({"factor": 6}, ConfigError, "factor must be a power of two from 2 on; got 6"),
        ({"factor": 16}, ShapeError, "factor 16 does not divide the image 8x16"),
        ({"width": 0}, ConfigError, "width must be at least 1; got 0"),
        ({"blocks": -1}, ConfigError, "blocks must be at least 0; got -1"),
        ({"codes": 1}, ConfigError, "codes must be at least 2; got 1"),
        ({"code_width": 0}, ConfigError, "code_width must be at least 1; got 0"),
        ({"commitment": -0.5}, ConfigError, "commitment must be at least 0; got -0.5"),
        ({"commitment": float("nan")}, ConfigError, "commitment must be at least 0; got nan"),
        ({"levels": (8, 8)}, ConfigError, "the quantizer is 'vq', which has no such thing: .*'fsq'"),
        ({"quantizer": "fsq", "codes": 9}, ConfigError, "the quantizer is 'fsq', which has no such thing"),
        ({"quantizer": "fsq", "levels": (8, 1)}, ConfigError, "each at least 2"),
        ({"quantizer": "pq"}, ConfigError, "'vq', 'fsq'|'vq' or 'fsq'"),
        ({"stack": "block*2"}, ConfigError, "no key 'stack'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        build(settings)


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="vq_image reads 'image'; the data has ids"):
        build({}, {"ids": ((8,), "int32")}, 8)
    with pytest.raises(ShapeError, match="images of floats; the data's 'image' is uint8"):
        build({}, {"image": ((8, 8, 1), "uint8")})
    with pytest.raises(ShapeError, match=r"reads images \[H, W, C\]"):
        build({}, {"image": ((8, 8), "float32")})
    with pytest.raises(ConfigError, match="the task wants 10 outputs: choose config.task.name='reconstruct'"):
        build({}, outputs=10)
    with pytest.raises(StackError, match="stack_vars.k: vq_image has no stack"):
        build({}, stack_vars={"k": 2})


def test_pictures_and_codes_of_other_shapes_are_refused() -> None:
    model, state, found = ran("vq")
    with pytest.raises(ShapeError, match=r"built for images \(8, 16, 3\), got \(8, 16, 1\)"):
        model.encode(state, pictures(0)[..., :1])
    for wrong in (found["codes"][:, :1], found["codes"].astype(np.float32), found["codes"][0]):
        with pytest.raises(ShapeError, match=r"decodes int \[B, 2, 4\]"):
            model.decode(state, jnp.asarray(wrong))


def test_counted_cost_is_that_of_the_convolutions() -> None:
    """Two FLOPs a product of kernels that lie wholly inside; "SAME" padding is not counted."""
    model = build(
        {"size": "tiny", "factor": 2, "width": 8, "blocks": 0, "quantizer": "fsq", "levels": (3, 3)}
    )
    table = costs.cost_table(model, tasks.build({"name": "reconstruct"}), SPEC)
    rows = {row.name: row for row in table.rows}
    assert {"encoder", "quantizer", "decoder"} <= set(rows) <= {"encoder", "quantizer", "decoder", "other"}
    h, w = model.grid

    def taps(side: int, outputs: int, kernel: int, stride: int) -> int:
        low = (kernel - stride) // 2
        return sum(
            0 <= stride * place + tap - low < side for place in range(outputs) for tap in range(kernel)
        )

    down = taps(SIDES[0], h, 4, 2) * taps(SIDES[1], w, 4, 2) * CHANNELS * 8
    up = taps(h, h, 3, 1) * taps(w, w, 3, 1) * 8 * 4 * CHANNELS
    assert rows["encoder"].forward_flops == 2 * down
    assert rows["quantizer"].forward_flops == 2 * h * w * (8 * 2 + 2 * 8)
    assert rows["decoder"].forward_flops == 2 * up
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_state()))
    assert table.total.parameters == parameters and rows["encoder"].tokens == h * w


@pytest.mark.slow
def test_seconds_of_training_leave_a_fraction_of_the_variance() -> None:
    """Digits, 2x2 codes of 64, one device."""
    source, steps, rows = data.build({"name": "digits"}), 60, 64
    settings = {"size": "tiny", "factor": 4, "width": 16, "blocks": 0, "codes": 64}
    model, task = build(settings, source.spec), tasks.build({"name": "reconstruct"})
    optimizer = optimizers.build(OptimizerConfig(learning_rate=0.01, weight_decay=0.0), steps)
    stream = data.TrainStream(source, "train", rows, seed=0)
    batches = ({key: stream.batch(at)[key] for key in ("image", "mask")} for at in range(steps))
    names = metric_names(
        model, task, model.abstract_state(), costs.batch_shapes({"image": source.spec["image"]}, rows)
    )
    state = jax.jit(lambda: states.create(model, optimizer, names, 0))()
    step = make_train_step(model, task, optimizer)
    for batch in batches:
        state, _ = step(state, batch)
    images = source.read("test", np.arange(64))["image"]
    off = np.asarray(jax.jit(model.apply)(state.params, {"image": images}).logits) - images
    left_by_the_mean = float(((images - images.mean(0)) ** 2).mean())
    assert float((off**2).mean()) < 0.7 * left_by_the_mean


# ---------------------------------------------------------------------------------------------------- eight devices


@functools.cache
def trained(axes: tuple[tuple[str, int], ...]) -> Any:
    """Five steps: losses, parameters, the compiled step, its mesh."""
    sizes, rows = dict(axes), 5 * 8
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    model, task = build({**SETTINGS["vq"], "factor": 2}), tasks.build({"name": "reconstruct"})
    config = OptimizerConfig(learning_rate=1e-3, schedule=ScheduleConfig(name="constant", warmup_steps=2))
    optimizer = optimizers.build(config, 5)
    batches = [{"image": pictures(at, rows), "mask": np.ones(rows, np.float32)} for at in range(5)]
    names = metric_names(model, task, model.abstract_state(), batches[0])

    def create() -> Any:
        return states.create(model, optimizer, names, 0)

    places = states.shardings(jax.eval_shape(create), model, mesh)
    split = NamedSharding(mesh, PartitionSpec(DEFAULT_RULES["batch"]))
    losses = []
    with jax.set_mesh(mesh):
        state = jax.jit(create, out_shardings=places)()
        step = make_train_step(model, task, optimizer, shardings=places, batch_sharding=split)
        compiled = step.lower(state, jax.device_put(batches[0], split)).compile()
        kernel = state.params["encoder"]["down_0"]["kernel"].sharding.shard_shape((4, 4, CHANNELS, 8))
        if mesh.size > 1:
            assert_no_activation_collective(compiled, rows, mesh, parameters=state.params)
        for batch in batches:
            state, report = compiled(state, jax.device_put(batch, split))
            losses.append(float(report.loss))
    return losses, jax.tree.map(np.asarray, (state.params, dict(state.metrics))), kernel


@pytest.mark.slow
def test_it_trains_on_eight_devices_as_on_one_and_moves_no_activations() -> None:
    losses, found, _ = trained((("data", 1),))
    other_losses, other, kernel = trained((("data", 4), ("fsdp", 2)))
    assert kernel == (4, 4, CHANNELS, 4)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), other, found)
