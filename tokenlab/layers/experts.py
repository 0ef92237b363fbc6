"""Any module as experts: one set of weights each, stacked along a leading axis, run on the buffers of a dispatch."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import get_abstract_mesh

from tokenlab.core.errors import ConfigError, ShapeError, suggest
from tokenlab.layers.context import Aux
from tokenlab.layers.ffn import FFNDefaults
from tokenlab.layers.ffn.mlp import MLP
from tokenlab.layers.ffn.swiglu import SwiGLU
from tokenlab.ops import grouped
from tokenlab.ops.spread import Bank
from tokenlab.sharding.constrain import constrain
from tokenlab.sharding.rules import path_of

Axes = Mapping[str, tuple[str | None, ...]]


def bank(
    owner: nn.Module,
    expert: nn.Module,
    count: int,
    width: int,
    *,
    name: str = "experts",
    same_init: bool = False,
    train: bool = False,
    implementation: grouped.Implementation | None = None,
) -> Bank:
    """`count` experts whose weights are parameter `name` of `owner`, each leaf [E, ...]. Call it inside `nn.compact`.

    Args:
      owner: the module that holds the weights.
      expert: what an expert is: maps [B, C, D] to [B, C, D'], every row alone. A module that offers
        `grouped(params, rows, sizes, implementation=...)` runs on sorted rows by grouped products (`MLP`, `SwiGLU`);
        any other runs on them block by block. One that has a `part(ways)`, itself with a part of the units that its
        `axes` call "mlp", whose results add up, but for the parameters in `added`, which are to be added once, is run
        by several devices with a part each; of any other the compiler splits what it can. `rounded` of it names the
        parameters that it casts to its `dtype` before anything else: devices send them in that.
      count: E, at least 1.
      width: D.
      same_init: all experts begin with the same weights (as the published Soft MoE configurations do).
      train: handed to experts that take it.
      implementation: of the grouped products.

    Raises: ConfigError for count < 1, or an expert that is no Linen module, gives back more than an array, draws at
      random, keeps more than parameters, or calls a parameter rounded or added that it has not.
    """
    if count < 1:
        raise ConfigError(f"num_experts must be at least 1; got {count}.")
    if not isinstance(expert, nn.Module):
        raise ConfigError(f"an expert is a Linen module, such as nn.Dense(64); got {expert!r}.")
    if hasattr(expert, "num_experts"):
        raise ConfigError(
            f"a layer with a router of its own cannot be an expert; got {type(expert).__name__}."
        )
    expert = expert.clone(parent=None, name=None)
    takes = inspect.signature(type(expert).__call__).parameters
    how = {"train": train} if "train" in takes else {}

    def init(key: Array) -> Any:
        def one(key: Array) -> Any:
            made = dict(expert.init(key, jnp.zeros((1, 1, width)), **how))
            own = made.pop("params", {})
            if made:
                raise ConfigError(
                    f"an expert keeps parameters alone; {type(expert).__name__} keeps {', '.join(sorted(made))} too."
                )
            return dict(own)

        if same_init:
            return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), one(key))
        return jax.vmap(one)(jax.random.split(key, count))

    params = owner.param(name, init)
    for said in ("rounded", "added"):
        _check_paths(expert, said, params)

    def apply(params: Any, rows: Array, expert: nn.Module = expert) -> Array:
        try:
            out = expert.apply({"params": params}, rows, **how)
        except flax.errors.InvalidRngError as error:
            raise ConfigError(
                f"experts get no rng, and {type(expert).__name__} draws at random; draw on the layer's result."
            ) from error
        if not isinstance(out, jax.Array):
            raise ConfigError(
                f"an expert returns one array; {type(expert).__name__} returns {type(out).__name__}. "
                "A layer with a router of its own cannot be an expert."
            )
        return out

    def groups(params: Any, rows: Array, sizes: Array) -> Array:
        if hasattr(expert, "grouped"):
            return expert.grouped(params, rows, sizes, implementation=implementation)
        grouped.check_implementation(implementation)
        return grouped.map_blocks(lambda own, part: apply(own, part[None])[0], params, rows, sizes)

    def part(ways: int) -> Callable[[Any, Array], Array]:
        return jax.vmap(functools.partial(apply, expert=expert.part(ways)))

    parted = all(hasattr(expert, name) for name in ("axes", "part", "added"))
    return Bank(
        params,
        jax.vmap(apply),
        groups,
        axes=expert.axes() if hasattr(expert, "axes") else {},
        dtypes=dict.fromkeys(expert.rounded, expert.dtype) if hasattr(expert, "rounded") else {},
        added=expert.added if parted else (),
        part=part if parted else None,
    )


def _check_paths(expert: nn.Module, said: str, params: Any) -> None:
    """Refuse a misspelt path: it would change nothing but what devices send, or what is added twice."""
    known = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for path in getattr(expert, said, ()):
        if path not in known:
            raise ConfigError(
                f"{type(expert).__name__}.{said} names {path!r}, which is no parameter of it.{suggest(path, known)}"
            )


def axes_of(expert: nn.Module, name: str = "experts") -> Axes:
    """Logical axes of a bank's weights: those of the expert behind "expert", as a layer of experts splits them."""
    if not hasattr(expert, "axes"):
        raise ConfigError(
            f"{type(expert).__name__} does not say how its parameters are sharded; give it a method `axes()` that "
            "returns the logical axes of every parameter, as tokenlab.layers.ffn.mlp.MLP does."
        )
    return {f"{name}/{path}": ("expert", *map(_inside, axes)) for path, axes in expert.axes().items()}


def _inside(axis: str | None) -> str | None:
    """What a layer of experts splits as a dense layer does `axis`."""
    return {"embed": "expert_embed", "mlp": "expert_mlp"}.get(axis, axis)


def default_expert(expert: nn.Module | None, width: int) -> nn.Module:
    """The expert, or an MLP of four times the width with the tanh form of GELU, as in the reference."""
    return MLP(4 * width, "gelu_tanh") if expert is None else expert


# What the layers of `tokenlab.methods.experts` share. They have the fields num_experts, expert, same_init and shared,
# and may have implementation.


def layer_bank(layer: nn.Module, x: Array, *, train: bool) -> Bank:
    """The experts of a layer for tokens x [B, N, D]; see `bank`."""
    return bank(
        layer,
        default_expert(layer.expert, x.shape[-1]),
        layer.num_experts,
        x.shape[-1],
        same_init=layer.same_init,
        train=train,
        implementation=getattr(layer, "implementation", None),
    )


def layer_axes(layer: nn.Module, router: Axes) -> Axes:
    """Logical axes of a layer's parameters: those of its router, its experts and its shared experts."""
    expert = default_expert(layer.expert, 1)
    own = axes_of(expert)
    # Every token passes the shared experts: they lie where the tokens are, whole along the mesh axes of the others.
    shared = {f"shared/{path}": (None, *axes) for path, axes in expert.axes().items()}
    return {**router, **own, **(shared if layer.shared else {})}


def run(layer: nn.Module, plan: Any, made: Bank, x: Array, valid: Array | None, *, train: bool) -> Array:
    """What the experts make of x by a dispatch, and what the shared experts add to it: [B, N, D] in x's dtype.

    `layer.shared` further experts see every token; padding gets zeros of them, too. While parameters are made on a mesh
    nothing is dispatched: the one example they are made with cannot be split.

    Raises: ConfigError for a negative number of shared experts, ShapeError when experts changed the width.
    """
    making = layer.is_initializing() and not get_abstract_mesh().empty
    y = jnp.zeros_like(x) if making else plan.run(made, x)
    if x.shape != y.shape:
        raise ShapeError(f"experts take and give [B, N, D]: from {x.shape} they made {y.shape}.")
    if layer.shared < 0:
        raise ConfigError(f"shared must be at least 0; got {layer.shared}.")
    if layer.shared:
        expert = default_expert(layer.expert, x.shape[-1])
        others = bank(layer, expert, layer.shared, x.shape[-1], name="shared", train=train)
        if not making:
            with jax.named_scope("shared"):
                copies = constrain(
                    jnp.broadcast_to(x, (layer.shared, *x.shape)), None, "batch", "sequence", None
                )
                more = others.buffers(others.params, copies).sum(axis=0)
            y = y + (more if valid is None else jnp.where(valid[..., None], more, 0))
    return y.astype(x.dtype)


def router_kernel(owner: nn.Module, x: Array, experts: int) -> Array:
    """Logits [B, N, E] of a linear router without bias, float32 whatever x is (its kernel is parameter "router")."""
    kernel = owner.param("router", nn.initializers.lecun_normal(), (x.shape[-1], experts), jnp.float32)
    with jax.named_scope("router"):
        return x.astype(jnp.float32) @ kernel


def report(
    losses: Mapping[str, Array], metrics: Mapping[str, Array], load: Array | None, *, train: bool
) -> Aux:
    """What an expert layer says beside its result: losses in training only, metrics, the experts' load [E]."""
    return Aux.of(losses if train else {}, metrics).replace(load=load)


def check_transport(name: str, transport: str | None) -> None:
    """Raise ConfigError unless it is None or "bfloat16"."""
    if transport not in (None, "bfloat16"):
        raise ConfigError(f"{name}: transport must be None or 'bfloat16'; got {transport!r}.")


def as_ffn(layer: type[nn.Module], *, examples: tuple[str, ...]) -> Callable[..., nn.Module]:
    """The factory `ffn(defaults, *, experts, ...)` that makes an expert layer a feed-forward layer of the stack.

    Its arguments are the fields of `layer`, by name, with `num_experts` written `experts`; without `expert` an expert
    is the model's own dense layer.

    Args:
      layer: a Linen module with the field `num_experts`.
      examples: stacks the contract tests run, for models of 16 patches, a CLS token and width 16.
    """
    hints = typing.get_type_hints(layer)
    fields = [each for each in dataclasses.fields(layer) if each.name not in ("parent", "name")]
    spelt = {"num_experts": "experts"}

    def ffn(defaults: FFNDefaults, **arguments: Any) -> nn.Module:
        given = {field: arguments[word] for field, word in words.items() if word in arguments}
        if given.get("expert") is None:
            gated = defaults.gated
            dense = SwiGLU(gated, defaults.dtype) if gated else None
            given["expert"] = dense or MLP(
                defaults.hidden, defaults.activation, defaults.dtype, defaults.kernel_std
            )
        return layer(**given)

    words = {each.name: spelt.get(each.name, each.name) for each in fields}
    keyword, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(
            words[each.name],
            keyword,
            default=empty if each.default is dataclasses.MISSING else each.default,
            annotation=hints[each.name],
        )
        for each in fields
    ]
    first = inspect.Parameter("defaults", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=FFNDefaults)
    ffn.__signature__ = inspect.Signature([first, *parameters])
    ffn.__annotations__ = {each.name: each.annotation for each in (first, *parameters)}
    ffn.__doc__ = f"`block(ffn=...)`: a `{layer.__name__}`; its attributes are the arguments."
    ffn.examples = examples
    return ffn
