"""From a file of weights to a workdir that is evaluated, started from and trained further."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.interop.outside import GOLDEN, golden, timm_like
from tokenlab import cli, evaluate, interop, train
from tokenlab.core.config import override
from tokenlab.core.errors import CheckpointError, ConfigError, TokenLabError
from tokenlab.interop import vit_weights
from tokenlab.interop.workdir import description, load, model_settings
from tokenlab.train.checkpoint import load_params
from tokenlab.train.records import read_config, read_run

CONFIG = """
from tokenlab.train import default_config


def get_config():
    config = default_config()
    config.steps = 2
    config.batch_size = 16
    config.eval.batch_size = 128
    return config
"""


@pytest.fixture
def file(tmp_path, digits):
    save_file(digits, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "digits.py").write_text(CONFIG)
    return tmp_path / "digits.py"


def config(**changes):
    found = train.default_config()
    found.update(steps=2, batch_size=16)
    found.eval.batch_size = 128
    return override(found, changes)


def accepted(file, workdir, **changes):
    return interop.import_weights(file, workdir, config(**changes), given=changes)


HEADS = {"model.num_heads": 2}


def test_import_then_evaluate_with_another_stack(file, config_file, digits, tmp_path, capsys):
    workdir = tmp_path / "run"
    words = [
        "import",
        str(file),
        f"--workdir={workdir}",
        f"--config={config_file}",
        "--config.model.num_heads=2",
    ]
    assert cli.main(words) == 0
    assert f"imported {file} (layout timm) into {workdir}" in capsys.readouterr().out
    command = ["evaluate", f"--workdir={workdir}", f"--json={tmp_path / 'out.json'}"]
    assert cli.main(command) == 0
    assert "no training is recorded here" in capsys.readouterr().out
    dense = json.loads((tmp_path / "out.json").read_text())
    assert cli.main([*command, "--config.model.stack=block + keep(0.5, by=cls) + block*2"]) == 0
    reduced = json.loads((tmp_path / "out.json").read_text())
    assert reduced["stack"] == "block + keep(0.5, by=cls) + block*2"
    assert dense["checkpoint_step"] == 0 and reduced["flops_per_example"] < 0.75 * dense["flops_per_example"]
    assert (workdir / "tokens.png").exists() and not (workdir / "report.png").exists()
    assert dense["loss"] != reduced["loss"]


def test_the_saved_weights_are_those_of_the_file(file, digits, tmp_path):
    accepted(file, tmp_path / "run", **HEADS)
    params, meta = load_params(tmp_path / "run")
    assert meta["step"] == 0 and meta["imported"] == {"file": str(file), "layout": "timm"}
    np.testing.assert_array_equal(params["head"]["classifier"]["kernel"], digits["head.weight"].T)
    np.testing.assert_array_equal(params["embed"]["position"], digits["pos_embed"][0, 1:])
    model = read_config(tmp_path / "run").model
    assert (model.width, model.mlp_dim, model.patch, model.num_heads) == (16, 32, 2, 2)
    assert (model.activation, model.stack, model.position_grid) == ("gelu", "block*3", (4, 4))
    assert read_run(tmp_path / "run")["imported"]["layout"] == "timm"


@pytest.mark.slow
def test_train_starts_from_the_workdir(file, tmp_path):
    accepted(file, tmp_path / "run", **HEADS)
    saved = read_config(tmp_path / "run")
    further = train.run(saved, tmp_path / "run")  # the workdir itself goes on
    model = {f"model.{key}": value for key, value in saved.model.items()}
    path = {"init_from.path": str(tmp_path / "run")}
    other = train.run(config(**model, **path, seed=1), tmp_path / "other")
    assert further["step"] == other["step"] == 2
    first = load_params(tmp_path / "run", 2)[0]["embed"]["position"]
    assert np.abs(first - load_params(tmp_path / "other", 2)[0]["embed"]["position"]).max() < 0.02


def numbers(folder, classes=7):
    """Data of the golden images, through the source for NumPy files."""
    images, label = np.tile(golden("hf_vit").images, (4, 1, 1, 1)), np.arange(8) % classes
    arrays = {"train_image": images, "train_label": label, "test_image": images, "test_label": label}
    np.savez(folder / "data.npz", **arrays)
    changes = {"data.name": "arrays", "data.path": str(folder / "data.npz"), "data.num_classes": classes}
    return {**changes, "eval.split": "test", "batch_size": 8, "eval.batch_size": 8}


@pytest.mark.quick("timm", "timm_mean")
@pytest.mark.parametrize("name", ["hf_vit", "timm", "timm_mean"])
def test_logits_through_the_workdir_are_those_of_pytorch(name, tmp_path):
    given = golden(name)
    save_file(given.weights, tmp_path / "model.safetensors")
    workdir = tmp_path / "run"
    notes = accepted(tmp_path / "model.safetensors", workdir, **numbers(tmp_path))
    assert any(note.startswith("2 heads, as ViT micro of width 32 has them") for note in notes)
    trained = evaluate.load(workdir)
    found = jax.jit(trained.model.apply)(trained.params, {"image": jnp.asarray(given.images)})
    np.testing.assert_allclose(found.logits, given.logits, atol=1e-5)


def test_a_backbone_gets_a_classifier_of_zeros(tmp_path):
    save_file(golden("hf_dinov2_registers").weights, tmp_path / "model.safetensors")
    notes = accepted(tmp_path / "model.safetensors", tmp_path / "run", **numbers(tmp_path))
    assert any("classifier starts at zeros" in note and "holds none" in note for note in notes)
    model = read_config(tmp_path / "run").model
    assert (model.registers, model.layer_scale, model.norm_eps) == (3, 1.0, 1e-6)
    head = load_params(tmp_path / "run")[0]["head"]["classifier"]
    assert head["kernel"].shape == (32, 7) and not head["kernel"].any()


def test_a_description_beside_the_file_is_read(tmp_path):
    weights = vit_weights.read(golden("hf_vit").weights)
    file = tmp_path / "model.safetensors"
    assert description(file, weights) == {}
    about = {"hidden_size": 32, "num_attention_heads": 4, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"}
    (tmp_path / "config.json").write_text(json.dumps(about))
    described = description(file, weights)
    settings, notes = model_settings({}, weights, described)
    assert (settings["num_heads"], settings["norm_eps"], settings["activation"]) == (4, 1e-5, "gelu_tanh")
    assert notes == []
    with pytest.raises(ConfigError, match=r"num_heads is 2, but of the weights .* it is 4"):
        model_settings({"num_heads": 2}, weights, described)
    for wrong, message in (
        ({**about, "hidden_size": 48}, "hidden_size 48, but the weights .* are 32 wide"),
        ({**about, "hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'; expected one of gelu,"),
        ({**about, "hidden_act": ["gelu"]}, r"config.json has hidden_act \['gelu'\]; expected the name of"),
        ({**about, "hidden_size": "32"}, "config.json has hidden_size '32'; expected an int > 0"),
        (
            {**about, "num_attention_heads": "2"},
            "config.json has num_attention_heads '2'; expected an int that divides",
        ),
        (
            {**about, "num_attention_heads": 3},
            "num_attention_heads 3; expected an int that divides hidden_size 32",
        ),
        ({**about, "num_attention_heads": True}, "num_attention_heads True; expected an int"),
        (
            {**about, "layer_norm_eps": "x"},
            "config.json has layer_norm_eps 'x'; expected a number from 0 to 1",
        ),
        ([], "cannot read .*config.json: .*; expected the JSON object"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match=message):
            description(file, weights)
    # timm's weights come with a config.json too, of other content.
    assert description(file, vit_weights.read(golden("timm").weights)) == {}


def test_fresh_head(digits, tmp_path):
    more = timm_like(np.random.default_rng(0), classes=12)
    save_file(more, tmp_path / "vit.safetensors")
    with pytest.raises(
        CheckpointError, match=r"classifier of 12 classes, data 'digits' has 10; give --fresh-head"
    ):
        accepted(tmp_path / "vit.safetensors", tmp_path / "run", **HEADS)
    assert not (tmp_path / "run").exists()
    notes = interop.import_weights(
        tmp_path / "vit.safetensors", tmp_path / "run", config(**HEADS), fresh_head=True
    )
    assert any("as asked for" in note for note in notes)
    assert not load_params(tmp_path / "run")[0]["head"]["classifier"]["kernel"].any()


def test_settings_that_agree_are_taken(file, tmp_path):
    given = {
        "model.size": "nano/2",
        "model.stack": "block + keep(0.5, by=cls) + block*2",
        "model.activation": "relu",
    }
    notes = accepted(file, tmp_path / "run", **given)
    model = read_config(tmp_path / "run").model
    assert (model.size, model.stack, model.activation) == ("nano/2", given["model.stack"], "relu")
    assert not any("heads" in note for note in notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.width": 32}, "config.model.width is 32, but of the weights in .* it is 16; leave it out"),
        ({"model.patch": 4}, "config.model.patch is 4, but of the weights in .* it is 2"),
        ({"model.registers": 1}, "config.model.registers is 1, but of the weights in .* it is 0"),
        ({"model.layer_scale": 0.1}, "config.model.layer_scale is 0.1, but of the weights in .* it is None"),
        (
            {"model.position": "rope"},
            "config.model.position is 'rope', but of the weights in .* it is 'learned'",
        ),
        ({"model.head": "mean"}, "config.model.head is 'mean', but of the weights in .* it is 'cls'"),
        ({"model.qk_norm": True}, "config.model.qk_norm is True, but of the weights in .* it is False"),
        ({"model.num_kv_heads": 1}, "config.model.num_kv_heads is 1, but of the weights in .* it is None"),
        ({"model.position_grid": (2, 8)}, None),
        (
            {"model.size": "toy/2"},
            "config.model.size 'toy/2' means width 64, but of the weights in .* it is 16",
        ),
        (
            {"model.size": "nano/4", "model.stack": "block*3"},
            "config.model.size 'nano/4' means patch 4, but of the weights in .* it is 2",
        ),
        (
            {"model.stack": "block*4"},
            r"'block\*4' has 4 blocks, the weights in .* have 3; give --config.model.stack",
        ),
        ({"model.num_heads": 3}, "width 16, num_heads 3"),
        ({"model.name": "other"}, "config.model.name is 'other': weights can be imported into 'vit' only"),
        (
            {"data.transform": "resize(9)", "data.eval_transform": "resize(9)"},
            "do not divide the images of data",
        ),
    ],
)
def test_settings_that_contradict_the_weights(file, tmp_path, changes, message):
    changes = changes if {"model.size", "model.num_heads"} & changes.keys() else {**HEADS, **changes}
    if message is None:
        accepted(file, tmp_path / "run", **changes)
        assert read_config(tmp_path / "run").model.position_grid == (2, 8)
        return
    with pytest.raises(TokenLabError, match=message) as error:
        accepted(file, tmp_path / "run", **changes)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_default_contradicts_nothing_unless_it_was_given(file, tmp_path):
    found = config(**HEADS)
    assert found.model.size == "toy/2"
    interop.import_weights(file, tmp_path / "run", found)
    with pytest.raises(ConfigError, match="config.model.size 'toy/2' means width 64"):
        interop.import_weights(file, tmp_path / "other", found, given=["model.size"])


def test_heads_that_nothing_tells(tmp_path):
    save_file(timm_like(np.random.default_rng(0), width=24), tmp_path / "vit.safetensors")
    with pytest.raises(ConfigError, match=r"how many heads .* \(width 24\); give --config.model.num_heads=H"):
        accepted(tmp_path / "vit.safetensors", tmp_path / "run")
    accepted(tmp_path / "vit.safetensors", tmp_path / "run", **{"model.num_heads": 3})


def test_images_of_other_channels(tmp_path):
    save_file(golden("timm").weights, tmp_path / "vit.safetensors")
    with pytest.raises(CheckpointError, match="reads images of 3 channels, data 'digits' has 1"):
        accepted(tmp_path / "vit.safetensors", tmp_path / "run")


def test_a_workdir_in_use(file, tmp_path):
    accepted(file, tmp_path / "run", **HEADS)
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(ConfigError, match="holds checkpoints already: give another workdir"):
        accepted(file, tmp_path / "run", **HEADS)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


@pytest.mark.parametrize(
    ("dtype", "said"), [("float8_e4m3fn", "F8_E4M3"), ("bfloat16", None), ("float16", None)]
)
def test_dtypes_of_weights(digits, tmp_path, dtype, said):
    path = tmp_path / "a.safetensors"
    numbers = {name: value.astype(jnp.dtype(dtype)) for name, value in digits.items()}
    header, body = {}, b""
    for name, value in numbers.items():  # by hand, as safetensors writes no float8 of NumPy
        kind = said or {"bfloat16": "BF16", "float16": "F16"}[dtype]
        ends = [len(body), len(body) + value.nbytes]
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": ends}
        body += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    if said is None:
        found = load(path)
        assert all(np.array_equal(found[name], value) for name, value in numbers.items())
        return
    with pytest.raises(
        CheckpointError, match="holds weights as F8_E4M3; expected F64, F32, F16, BF16, .*float32"
    ):
        load(path)


def test_files_that_cannot_be_read(file, config_file, tmp_path, capsys):
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-10])
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot read .*cut.safetensors: .*; expected a whole"):
        accepted(tmp_path / "cut.safetensors", tmp_path / "run")
    with pytest.raises(
        CheckpointError, match="weights.bin is no .safetensors file; save the model's state_dict"
    ):
        accepted(tmp_path / "weights.bin", tmp_path / "run")
    for words, message in (
        (["nowhere.safetensors"], "nowhere.safetensors is not a file"),
        ([], "expected one FILE.safetensors, got 0"),
        ([str(file), str(file)], "got 2"),
    ):
        assert cli.main(["import", *words, f"--config={config_file}", f"--workdir={tmp_path / 'run'}"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_jumbo_checkpoint_becomes_a_workdir(tmp_path):
    arrays = dict(np.load(GOLDEN / "jumbo.npz"))
    weights = {name[7:]: value for name, value in arrays.items() if name.startswith("params/")}
    save_file({**weights, "cls_token": np.ones((1, 1, 12), np.float32)}, tmp_path / "jumbo.safetensors")
    images = np.tile(arrays["inputs/images"].transpose(0, 2, 3, 1), (4, 1, 1, 1))
    data = {**numbers(tmp_path), "data.path": str(tmp_path / "images.npz")}
    label = np.arange(8) % 7
    np.savez(data["data.path"], train_image=images, train_label=label, test_image=images, test_label=label)
    file, workdir = tmp_path / "jumbo.safetensors", tmp_path / "run"
    with pytest.raises(ConfigError, match="head is 'mean', but of the weights .* it is 'special'"):
        accepted(file, workdir, **data, **{"model.num_heads": 3, "model.head": "mean"})
    notes = accepted(file, workdir, **data, **{"model.num_heads": 3})
    assert "cls_token is left out: the pieces stand in its place" in notes
    trained = evaluate.load(workdir)
    assert trained.model.stack_text == "block(special=jumbo)*3"
    found = jax.jit(trained.model.apply)(trained.params, {"image": jnp.asarray(images[:2])})
    np.testing.assert_allclose(found.logits, arrays["outputs/logits"], atol=5e-5)


@pytest.mark.parametrize(("width", "heads"), [(96, 3), (128, 4), (192, 3)])
def test_heads_of_the_published_jumbo_sizes(width, heads):
    arrays = dict(np.load(GOLDEN / "jumbo.npz"))
    weights = vit_weights.read(
        {name[7:]: value for name, value in arrays.items() if name.startswith("params/")}
    )
    wider = dataclasses.replace(weights, settings={**weights.settings, "width": width})
    settings, notes = model_settings({}, wider, {})
    assert settings["num_heads"] == heads and settings["stack"] == "block(special=jumbo)*3"
    assert len(notes) == 1 and f"of width {width}" in notes[0]
