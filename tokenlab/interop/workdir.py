"""`tokenlab import`: a file of weights becomes a workdir, as if a run had just begun from them.

It holds what a run writes before its first step, so whatever reads a run reads it: `tokenlab evaluate`, with any stack
of as many blocks, `config.init_from.path`, and `tokenlab train`, which goes on from step 0.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections.config_dict import ConfigDict

from tokenlab import data, tasks
from tokenlab.core.config import to_dataclass
from tokenlab.core.errors import CheckpointError, ConfigError
from tokenlab.core.schema import plain
from tokenlab.interop import vit_weights
from tokenlab.interop.vit_weights import Weights
from tokenlab.models.state import fit_state
from tokenlab.models.vit import SIZES, ViTConfig
from tokenlab.train import compilation, experiment, mirror, places
from tokenlab.train.checkpoint import Checkpoints
from tokenlab.train.config import TrainConfig
from tokenlab.train.records import Workdir

HEAD = "head/classifier"
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Hugging Face's names of activations -> ours."""

_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Of tensors in a file, as safetensors calls them; integers are of buffers, which no model needs."""


def import_weights(
    file: str | Path,
    workdir: str | Path,
    config: ConfigDict,
    *,
    given: Collection[str] = (),
    fresh_head: bool = False,
) -> list[str]:
    """Write a workdir that starts from the weights of a file.

    Args:
      file: .safetensors, of a ViT in a layout of `tokenlab.interop.layouts`. A Hugging Face config.json beside it is
        read too.
      workdir: a folder or an address, made when missing; it may hold no checkpoint yet.
      config: of the run: data, task and the rest. Of `config.model`, what the weights imply is filled in.
      given: keys of the configuration that the user gave ("model.width"): those, and model settings other than their
        defaults, may not contradict the weights.
      fresh_head: start the classifier at zeros instead of taking the file's.

    Returns:
      Notes to be told, one line each.

    Raises:
      CheckpointError: the file cannot be read, or its weights do not fit a ViT or the data.
      TokenLabError: a setting that contradicts the weights, or anything else a run of this configuration would raise.
        Nothing has been written then.
    """
    file = Path(file)
    if places.in_workdir(workdir).steps():
        raise ConfigError(f"{workdir} holds checkpoints already: give another workdir to import into.")
    model = plain(config.model)
    explicit = {key.removeprefix("model.") for key in given if key.startswith("model.")}
    chosen = _chosen(model, explicit)
    weights = vit_weights.read(
        load(file), source=str(file), grid=chosen.get("position_grid"), fresh_head=fresh_head
    )
    described = description(file, weights)
    settings, notes = model_settings(chosen, weights, described)
    config = copy.deepcopy(config)
    with config.unlocked():
        config.model = ConfigDict({**model, **settings})
    _check_data(config, weights)
    run = experiment.build(config)
    if run.model.program.depth != weights.depth:
        raise ConfigError(
            f"config.model.stack {run.model.stack_text!r} has {run.model.program.depth} blocks, the weights in {file} "
            f"have {weights.depth}; give "
            f'--config.model.stack="{weights.block}*{weights.depth}" or another stack of as many.'
        )
    notes = [*weights.notes, *notes]
    if weights.classes is None:
        why = "as asked for" if fresh_head else f"{file} holds none"
        notes.append(f"the classifier starts at zeros ({why}): it says nothing until it is trained")
    leaves, unused = fit_state(
        weights.state(settings["num_heads"]),
        run.model.abstract_state(),
        fresh=(HEAD,) if weights.classes is None else (),
        source=str(file),
    )
    imported = {"file": str(file), "layout": weights.layout.name}
    _write(run, config, workdir, leaves, imported)
    return [*notes, *unused, f"imported {file} (layout {weights.layout.name}) into {workdir}"]


def load(file: Path) -> dict[str, np.ndarray]:
    """The arrays of a .safetensors file by name. Raises CheckpointError when it cannot be read."""
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{file} is no .safetensors file; save the model's state_dict with safetensors.torch.save_file."
        )
    from safetensors import SafetensorError, safe_open
    from safetensors.numpy import load_file

    try:
        with safe_open(file, framework="numpy") as opened:
            kinds = {opened.get_slice(name).get_dtype() for name in opened.keys()}
        if other := kinds - set(_DTYPES):
            raise CheckpointError(
                f"{file} holds weights as {', '.join(sorted(other))}; expected {', '.join(_DTYPES)}: save them "
                "anew, each as tensor.to(torch.float32)."
            )
        return load_file(file)
    except (OSError, SafetensorError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"cannot read {file}: {said}; expected a whole .safetensors file: download or save it anew."
        ) from error


def model_settings(
    chosen: Mapping[str, Any], weights: Weights, described: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The model settings that make a ViT of some weights.

    Args:
      chosen: model settings that somebody decided on.
      weights: what they imply wins, and what is chosen must agree.
      described: settings that a description beside the file implies; they count as the weights do.

    Returns:
      (settings of `ViTConfig`, notes).

    Raises:
      ConfigError: a chosen setting contradicts the weights, or the number of heads is nowhere to be found.
    """
    implied = {**weights.settings, **described}
    settings = {**weights.conventional, **{key: chosen[key] for key in weights.conventional if key in chosen}}
    settings |= implied
    for key, value in implied.items():
        # Of LayerScale only whether there is one: the setting is its initial value, and the weights hold its values.
        same = key == "layer_scale" and value is not None or chosen.get(key) == value
        if key in chosen and not same:
            raise ConfigError(
                f"config.model.{key} is {chosen[key]!r}, but of the weights in {weights.source} it is {value!r}; "
                f"leave it out, or give --config.model.{key}={value}."
            )
    width, hidden, patch = (settings[key] for key in ("width", "mlp_dim", "patch"))
    notes = []
    if "size" in chosen:
        settings["num_heads"] = _heads_of_size(chosen, settings, weights)
    elif "num_heads" in chosen:
        settings["num_heads"] = chosen["num_heads"]
    elif "num_heads" not in settings:
        rows = {name: heads for name, (columns, *_, heads) in SIZES.items() if columns == width}
        if width in weights.layout.heads:
            rows = {weights.layout.name: weights.layout.heads[width]}
        if not rows:
            raise ConfigError(
                f"how many heads the weights in {weights.source} have cannot be told from them (width {width}); "
                "give --config.model.num_heads=H as the model was trained with."
            )
        known, settings["num_heads"] = next(iter(rows.items()))
        notes.append(
            f"{settings['num_heads']} heads, as ViT {known} of width {width} has them: "
            "give --config.model.num_heads if the model was trained with another number"
        )
    fitting = [name for name, row in SIZES.items() if row[:3] == (width, weights.depth, hidden)]
    if "size" not in chosen:  # where no row fits, "B" is a name only: all that a size says is given beside it
        settings["size"] = f"{fitting[0] if fitting else 'B'}/{patch}"
    settings["stack"] = chosen.get("stack") or f"{weights.block}*{weights.depth}"
    return settings, notes


def _heads_of_size(chosen: Mapping[str, Any], settings: Mapping[str, Any], weights: Weights) -> int:
    """The number of heads where a size was chosen, which must agree with the weights."""
    sizes = {key: chosen[key] for key in ("size", "width", "mlp_dim", "patch", "num_heads") if key in chosen}
    width, depth, hidden, heads, patch = ViTConfig(**sizes).dims()
    if "stack" in chosen:
        depth = weights.depth
    said = {"width": width, "depth": depth, "mlp_dim": hidden, "patch": patch, "num_heads": heads}
    have = {**settings, "depth": weights.depth}
    for key, value in said.items():
        if have.get(key, value) != value:
            raise ConfigError(
                f"config.model.size {chosen['size']!r} means {key} {value}, but of the weights in {weights.source} "
                f"it is {have[key]}; leave the size out, or give the one of the weights."
            )
    return heads


def _chosen(model: Mapping[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """The settings that differ from their defaults or were given on the command line."""
    if model.get("name", "vit") != "vit":
        raise ConfigError(f"config.model.name is {model['name']!r}: weights can be imported into 'vit' only.")
    settings = {key: value for key, value in model.items() if key != "name"}
    config = to_dataclass(ViTConfig, settings, path="config.model")
    defaults = ViTConfig()
    found = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        key: value
        for key, value in found.items()
        if value is not None and (key in explicit or value != getattr(defaults, key))
    }


def description(file: Path, weights: Weights) -> dict[str, Any]:
    """What a Hugging Face config.json beside the file says of the model.

    Raises:
      CheckpointError: it cannot be read, or does not describe a model of these weights.
    """
    path = file.with_name("config.json")
    if not weights.layout.name.startswith("Hugging Face") or not path.exists():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        found = {
            "width": said.get("hidden_size", weights.settings["width"]),
            "num_heads": said.get("num_attention_heads"),
            "norm_eps": said.get("layer_norm_eps"),
        }
        activation = said.get("hidden_act")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"cannot read {path}: {' '.join(str(error).split())}; expected the JSON object that belongs "
            f"to {file.name}, or no such file."
        ) from error
    _check_described(path, said, found["width"])
    if found["width"] != weights.settings["width"]:
        raise CheckpointError(
            f"{path} has hidden_size {found['width']}, but the weights in {file} are {weights.settings['width']} wide; "
            "put the file that belongs to the weights there, or none."
        )
    if activation is not None:
        if activation not in _ACTIVATIONS:
            raise CheckpointError(
                f"{path} has hidden_act {activation!r}; expected one of {', '.join(_ACTIVATIONS)}: "
                "import a model with one of them."
            )
        found["activation"] = _ACTIVATIONS[activation]
    return {key: value for key, value in found.items() if value is not None}


def _check_described(path: Path, said: Mapping[str, Any], width: Any) -> None:
    """Raise a CheckpointError for a wrong type; else the model's settings, which nobody gave, are blamed."""

    def check(key: str, fits: Callable[[Any], bool], expected: str) -> None:
        value = said.get(key)
        if value is not None and (isinstance(value, bool) or not fits(value)):
            raise CheckpointError(
                f"{path} has {key} {value!r}; expected {expected}: put the file that belongs to the weights there, or "
                "none."
            )

    check("hidden_size", lambda value: isinstance(value, int) and value > 0, "an int > 0")
    check(
        "num_attention_heads",
        lambda value: isinstance(value, int) and value > 0 and width % value == 0,
        f"an int that divides hidden_size {width}",
    )
    check(
        "layer_norm_eps",
        lambda value: isinstance(value, int | float) and 0 < value < 1,
        "a number from 0 to 1",
    )
    check("hidden_act", lambda value: isinstance(value, str), "the name of an activation")


def _check_data(config: ConfigDict, weights: Weights) -> None:
    """Raise a CheckpointError when the weights do not fit the images or classes of the data."""
    checked = to_dataclass(TrainConfig, config)
    source, task = data.build(checked.data), tasks.build(checked.task)
    shape = tuple(source.spec["image"][0]) if "image" in source.spec else ()
    if len(shape) == 3 and None not in shape:
        patch = weights.settings["patch"]
        if shape[2] != weights.channels:
            raise CheckpointError(
                f"{weights.source} reads images of {weights.channels} channels, data {source.name!r} has {shape[2]}; "
                "choose data with as many channels."
            )
        if shape[0] % patch or shape[1] % patch:
            raise CheckpointError(
                f"{weights.source} reads patches of {patch}x{patch} pixels, which do not divide the images of data "
                f"{source.name!r}, {shape[0]}x{shape[1]}; resize them to multiples of {patch}."
            )
    outputs = task.num_outputs(source)
    if weights.classes not in (None, outputs):
        raise CheckpointError(
            f"{weights.source} has a classifier of {weights.classes} classes, data {source.name!r} has {outputs}; "
            "give --fresh-head to start the classifier at zeros, or data with the classes of the weights."
        )


def _write(
    run: experiment.Experiment,
    config: ConfigDict,
    workdir: str | Path,
    leaves: Mapping[str, np.ndarray],
    imported: Mapping[str, str],
) -> None:
    """The workdir of a run that has done no step, with its state in a checkpoint."""
    compilation.use_cache(run.config.compilation_cache)
    with (
        mirror.opened(workdir) as mirrored,
        Workdir(mirrored or workdir, config) as folder,
        Checkpoints(
            folder.checkpoints,
            keep=run.config.keep_checkpoints,
            best=run.task.better,
            metric=run.task.primary,
            before=folder.secure,
        ) as checkpoints,
    ):
        state = run.init(leaves)
        meta = {
            "step": 0,
            "flops": 0,
            "tokens": 0,
            "seconds": 0.0,
            "data_seconds": 0.0,
            "data": run.stream.state(0),
            "stack_vars": run.stack_vars.at(0),
            "ema": state.ema is not None,
            "statistics": state.statistics is not None,
            "results": {},
            "imported": dict(imported),
        }
        folder.begin_run({**run.facts(), "imported": dict(imported)}, 0)
        folder.rewind(0)
        checkpoints.save(0, state, meta, wait=True)
