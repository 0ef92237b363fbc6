"""Token dropping and ScTD against numbers of the authors' own code, at tiny sizes; see each test for the tolerance.

`token_dropping_bert.npz` is of tensorflow/models, official/projects/token_dropping (Apache-2.0), in TensorFlow 2.21;
`sctd.npz` of WHU-ZQH/ScTD, a modified fairseq (MIT), in torch 2.13; both float32 on the CPU.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tokenlab import models
from tokenlab.layers.scores.importance import TokenImportance
from tokenlab.layers.statistics import STATISTICS
from tokenlab.methods.dropping.sctd import semantic_consistency
from tokenlab.methods.dropping.token_dropping import top_k_tokens
from tokenlab.tasks.masked_lm import judged
from tokenlab.tasks.sctd import SctdConfig, SctdTask

HERE = Path(__file__).parent
BERT = np.load(HERE / "token_dropping_bert.npz")
SCTD = np.load(HERE / "sctd.npz")
B_SIZES, S_SIZES = json.loads(str(BERT["config"])), json.loads(str(SCTD["config"]))
BERT_STACK = "block*2 + token_dropping(keep=5, order=score, rank_padding=True)(block*{body}) + block*{after}"
SCTD_STACK = "block*2 + sctd(keep=6, rank_padding=True, align={align})(block*{body}) + block*{after}"
LAST = 5


def encoder(sizes: dict[str, Any], stack: str, *, train: bool = True, **settings: Any) -> Any:
    """The encoder of a case over a stack."""
    depth = {"name": "encoder_lm", "size": "nano", "stack": stack, "width": sizes["D"], "mlp_dim": sizes["F"]}
    return models.build(
        {**depth, "num_heads": sizes["H"], "vocab_size": sizes["V"], **settings},
        spec={"ids": ((sizes["N"],), "int32")},
        num_outputs=sizes["V"],
        train=train,
    )


def kept(model: Any, state: Any, batch: Any) -> jax.Array:
    """Positions of the tokens inside the body, [B, K]."""

    def positions(state: Any) -> jax.Array:
        trace = model.apply(state, batch, train=True, record=True).trace
        return next(point for point in trace if point.inside).tokens.position

    return jax.jit(positions)(state)


def run(model: Any, state: Any, batch: Any, **how: Any) -> Any:
    """The output of a training step's forward pass."""
    return jax.jit(lambda state: model.apply(state, batch, train=True, **how))(state)


# ------------------------------------------------------------------------------------------------ token dropping


def bert_model(body: int = 3, after: int = 1, *, train: bool = True, stack: str = BERT_STACK) -> Any:
    """Blocks of the case; its position 0 is CLS, which is protected here, so that it has keep=K-1."""
    return encoder(
        B_SIZES,
        stack.format(body=body, after=after),
        train=train,
        head="classify",
        positions=15,
        activation="gelu_tanh",
        always_kept=tuple(B_SIZES["allow"]),
        first_dropped=tuple(B_SIZES["deny"]),
    )


def bert_tree(group: str) -> dict[str, Any]:
    """What the case has under "params/" or "grads/", as the model's weights are laid out: path -> array."""
    names = {
        "word_embeddings/embeddings": "embed/table",
        "position_embedding/embeddings": "embed/position",
        "type_embeddings/embeddings": "embed/type",
        "embeddings/layer_norm/gamma": "embed/norm/scale",
        "embeddings/layer_norm/beta": "embed/norm/bias",
        "pooler_transform/kernel": "head/pooler/kernel",
        "pooler_transform/bias": "head/pooler/bias",
    }
    inside = {
        "self_attention/query": "attention/query",
        "self_attention/key": "attention/key",
        "self_attention/value": "attention/value",
        "self_attention/attention_output": "attention/out",
        "self_attention_layer_norm": "attention_norm",
        "intermediate": "mlp/up",
        "output": "mlp/down",
        "output_layer_norm": "ffn_norm",
    }
    found = {}
    for name in BERT.files:
        if not name.startswith(f"{group}/"):
            continue
        path = name.removeprefix(f"{group}/")
        if path in names:
            found[names[path]] = BERT[name]
        else:
            _, layer, rest = path.split("/", 2)
            part, leaf = rest.rsplit("/", 1)
            leaf = {"gamma": "scale", "beta": "bias"}.get(leaf, leaf)
            found[f"blocks/{inside[part]}/{leaf}/{layer.removeprefix('layer_')}"] = BERT[name]
    return found


def nested(flat: dict[str, Any], blocks: range) -> dict[str, Any]:
    """Flat paths as the model's weights, of some of the blocks."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        if parents[0] == "blocks":
            continue
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = jnp.asarray(
            leaf
        )
    kinds = {path.rsplit("/", 1)[0] for path in flat if path.startswith("blocks/")}
    for kind in kinds:
        *parents, last = kind.split("/")
        node = functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)
        node[last] = jnp.asarray(np.stack([flat[f"{kind}/{k}"] for k in blocks]))
    return tree


def bert_state(blocks: range = range(6)) -> dict[str, Any]:
    state = nested(bert_tree("params"), blocks)
    width, outputs = B_SIZES["D"], B_SIZES["V"]
    state["head"]["classifier"] = {"kernel": jnp.zeros((width, outputs)), "bias": jnp.zeros(outputs)}
    state[STATISTICS] = {"importance": jnp.asarray(BERT["inputs/importance"])}
    return state


BERT_BATCH = {
    "ids": jnp.asarray(BERT["inputs/input_word_ids"]),
    "length": jnp.asarray(BERT["inputs/input_mask"].sum(axis=1)),
    "type": jnp.asarray(BERT["inputs/input_type_ids"]),
}
BERT_VALID = BERT["inputs/input_mask"] > 0


@pytest.fixture(scope="module")
def bert() -> tuple[Any, Any]:
    """(output, gradients) of the case, with the trace of what is kept."""
    model = bert_model()

    def total(params: Any, held: Any) -> Any:
        output = model.apply({**params, STATISTICS: held}, BERT_BATCH, train=True, entering=(LAST,))
        sequence = jnp.sum(output.tokens * BERT["cotangents/sequence"])
        return sequence + jnp.sum(output.features * BERT["cotangents/pooled"]), output

    state = bert_state()
    held = state.pop(STATISTICS)
    (_, output), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(state, held)
    return output, grads


def test_bert_what_is_kept_and_its_order() -> None:
    """Indices exactly."""
    scores = TokenImportance(B_SIZES["V"]).lookup(jnp.asarray(BERT["inputs/importance"]), BERT_BATCH["ids"])
    keep, drop = top_k_tokens(scores, B_SIZES["K"])
    np.testing.assert_array_equal(keep, BERT["mid/selected"])
    np.testing.assert_array_equal(drop, BERT["mid/not_selected"])
    model = bert_model()
    np.testing.assert_array_equal(kept(model, bert_state(), BERT_BATCH), BERT["mid/selected"])


def test_bert_outputs(bert: tuple[Any, Any]) -> None:
    """States to 5e-5. What padding becomes is nobody's input, but the same all the same."""
    output, _ = bert
    np.testing.assert_allclose(output.tokens, BERT["outputs/sequence_output"], atol=5e-5)
    np.testing.assert_allclose(output.features, BERT["outputs/pooled_output"], atol=5e-5)
    np.testing.assert_allclose(output.tokens, BERT["mid/encoder_output5"], atol=5e-5)


def test_bert_states_block_by_block(bert: tuple[Any, Any]) -> None:
    """Embeddings, blocks of all tokens and of the kept ones to 5e-5; dropped rows are those from before the bridge."""
    output, _ = bert
    dense = bert_model(stack="block*2", train=True)
    model_state = bert_state(range(2))
    found = run(dense, model_state, BERT_BATCH, entering=(0, 1))
    np.testing.assert_allclose(found.entering[0], BERT["mid/embeddings"], atol=5e-5)
    np.testing.assert_allclose(found.entering[1], BERT["mid/encoder_output0"], atol=5e-5)
    np.testing.assert_allclose(found.tokens, BERT["mid/encoder_output1"], atol=5e-5)
    rows = np.arange(B_SIZES["B"])[:, None]
    entering = np.asarray(output.entering[LAST])
    np.testing.assert_allclose(entering[rows, BERT["mid/selected"]], BERT["mid/encoder_output4"], atol=5e-5)
    np.testing.assert_allclose(
        entering[rows, BERT["mid/not_selected"]],
        BERT["mid/encoder_output1"][rows, BERT["mid/not_selected"]],
        atol=5e-5,
    )
    for body in (1, 2):
        short = BERT_STACK.partition(" + block*{after}")[0]
        tokens = run(bert_model(body, stack=short), bert_state(range(2 + body)), BERT_BATCH).tokens
        np.testing.assert_allclose(
            np.asarray(tokens)[rows, BERT["mid/selected"]], BERT[f"mid/encoder_output{1 + body}"], atol=5e-5
        )


def test_bert_gradients(bert: tuple[Any, Any]) -> None:
    """To atol 2e-4 and rtol 1e-3, of embeddings, blocks before, at, inside and behind the bridge, and pooler."""
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves(bert[1])}
    expected = bert_tree("grads")
    assert len(expected) > 15
    for path, value in expected.items():
        own = (
            flat[path.rsplit("/", 1)[0]][int(path.rsplit("/", 1)[1])]
            if path.startswith("blocks/")
            else flat[path]
        )
        np.testing.assert_allclose(own, value, atol=2e-4, rtol=1e-3, err_msg=path)


def leaves(tree: Any) -> Any:
    return jax.tree_util.tree_leaves_with_path(tree)


def test_bert_importance() -> None:
    """To rtol 1e-6: at first, by all slots as the reference has it (padding drifts), and by those that count."""
    known = TokenImportance(B_SIZES["V"], tuple(B_SIZES["allow"]), tuple(B_SIZES["deny"]))
    np.testing.assert_array_equal(known.init(), BERT["mid/initial_importance"])
    before = jnp.asarray(BERT["inputs/importance"])
    ids, losses = BERT["inputs/masked_lm_ids"], jnp.asarray(BERT["inputs/masked_lm_losses"])
    real = known.update(before, ids, losses, jnp.asarray(BERT["inputs/masked_lm_weights"]))
    np.testing.assert_allclose(real, BERT["outputs/importance_after_real_slots"], rtol=1e-6)
    every = known.update(before, ids, losses, pin=False)
    np.testing.assert_allclose(every[1:], BERT["outputs/importance_after_all_slots"][1:], rtol=1e-6)
    assert (
        -1e4 < every[0] < -9900
    )  # of several slots of [PAD] the reference takes the last, here their mean counts
    assert -1e4 < BERT["outputs/importance_after_all_slots"][0] < -9900


# ------------------------------------------------------------------------------------------------ ScTD


def sctd_model(
    align: int = 1, body: int = 3, after: int = 1, *, train: bool = True, stack: str = SCTD_STACK
) -> Any:
    return encoder(
        S_SIZES,
        stack.format(align=align, body=body, after=after),
        train=train,
        positions=19,
        types=0,
        norm_eps=1e-5,
        always_kept=(0, 1, 2, S_SIZES["V"] - 1),
    )


def sctd_tree(group: str) -> dict[str, Any]:
    """What the case has under "params/" or a kind of gradients, laid out as the model's weights: path -> array."""
    names = {
        "sentence_encoder.embed_tokens.weight": "embed/table",
        "sentence_encoder.embed_positions.weight": "embed/position",
        "sentence_encoder.layernorm_embedding.weight": "embed/norm/scale",
        "sentence_encoder.layernorm_embedding.bias": "embed/norm/bias",
        "lm_head.bias": "head/bias",
        "lm_head.dense.bias": "head/dense/bias",
        "lm_head.layer_norm.weight": "head/norm/scale",
        "lm_head.layer_norm.bias": "head/norm/bias",
    }
    heads, width = S_SIZES["H"], S_SIZES["D"]
    found: dict[str, Any] = {}
    for name in SCTD.files:
        if not name.startswith(f"{group}/"):
            continue
        path, leaf = name.removeprefix(f"{group}/"), SCTD[name]
        if path in names:
            found[names[path]] = leaf
        elif path == "lm_head.dense.weight":
            found["head/dense/kernel"] = leaf.T
        else:
            _, _, layer, *parts, kind = path.split(".")
            part = parts[-1]
            which = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
            if part in which:
                name, shape = f"attention/{which[part]}", (heads, width // heads)
                leaf = leaf.T.reshape(width, *shape) if kind == "weight" else leaf.reshape(shape)
            elif part == "out_proj":
                name = "attention/out"
                leaf = leaf.T.reshape(heads, width // heads, width) if kind == "weight" else leaf
            elif part in ("fc1", "fc2"):
                name, leaf = f"mlp/{'up' if part == 'fc1' else 'down'}", leaf.T
            else:
                name = {"self_attn_layer_norm": "attention_norm", "final_layer_norm": "ffn_norm"}[part]
            norm = name.endswith("norm")
            end = {"weight": "scale" if norm else "kernel", "bias": "bias"}[kind]
            found[f"blocks/{name}/{end}/{layer}"] = leaf
    return found


def sctd_state(blocks: range = range(6)) -> dict[str, Any]:
    state = nested(sctd_tree("params"), blocks)
    state[STATISTICS] = {"importance": jnp.asarray(SCTD["inputs/importance"])}
    return state


def sctd_batch() -> dict[str, Any]:
    """The batch of the case, its two hidden tokens a row already hidden."""
    ids, target = SCTD["inputs/src_tokens"], SCTD["inputs/target"]
    valid = ids != 1
    predict = np.stack([np.flatnonzero(row != 1) for row in target])
    position = np.where(valid, np.cumsum(valid, axis=1) + 1, 1)
    batch = {
        "ids": ids,
        "length": valid.sum(axis=1),
        "position": position,
        "predict": predict,
        "label": np.take_along_axis(target, predict, axis=1),
        "weight": np.ones(predict.shape, np.float32),
        "word": valid.astype(np.int32),
        "bytes": np.ones(ids.shape, np.float32),
        "mask": np.ones(len(ids), np.float32),
    }
    return jax.tree.map(jnp.asarray, batch)


SCTD_VALID = SCTD["inputs/src_tokens"] != 1


class Given(SctdTask):
    """The task on a batch whose tokens are hidden already."""

    def hidden(self, model: Any, batch: Any, **how: Any) -> Any:
        return batch


@pytest.mark.parametrize(
    "compat", [pytest.param(False, id="paper"), pytest.param(True, id="code", marks=pytest.mark.slow)]
)
def test_sctd_loss_and_gradients(compat: bool) -> None:
    """Of a step that aligns: losses to rtol 1e-5, gradients to atol 1e-4 and rtol 1e-3, the new importance."""
    model, task = sctd_model(), Given(SctdConfig(reference_compat=compat))
    batch, state = sctd_batch(), sctd_state()
    held = state.pop(STATISTICS)

    def loss(params: Any) -> Any:
        return task.loss(model, {**params, STATISTICS: held}, batch, rng=jax.random.key(0), train=True)

    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(state)
    name = "code" if compat else "paper"
    count = SCTD_VALID.sum()
    np.testing.assert_allclose(value * count, SCTD[f"outputs/loss_{name}"], rtol=1e-5)
    for metric, golden in {
        "loss": "ce_sparse",
        "dense_loss": "ce_dense",
        "kl_penultimate": "kl_penultimate",
        "kl_last": "kl_last",
    }.items():
        np.testing.assert_allclose(
            metrics[metric][0], SCTD[f"outputs/{golden}"], rtol=1e-5, atol=2e-6, err_msg=metric
        )
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves(grads)}
    expected = sctd_tree(f"grads_{name}")
    assert len(expected) > 12
    for path, golden in expected.items():
        own = (
            flat[path.rsplit("/", 1)[0]][int(path.rsplit("/", 1)[1])]
            if path.startswith("blocks/")
            else flat[path]
        )
        np.testing.assert_allclose(own * count, golden, atol=1e-4, rtol=1e-3, err_msg=path)
    known = model.statistics["importance"]
    after = known.updated(held["importance"], metrics["statistics/importance"])
    np.testing.assert_allclose(after, SCTD["outputs/importance_after"], rtol=1e-5)


def test_sctd_states() -> None:
    """Indices exactly, states of real tokens to 2e-5 (the reference sets the embedding of padding to 0), logits too."""
    model, batch, state = sctd_model(), sctd_batch(), sctd_state()
    np.testing.assert_array_equal(kept(model, state, batch), SCTD["mid/keep_index"])
    everywhere = {key: leaf for key, leaf in batch.items() if key != "predict"}
    output = run(model, state, everywhere, entering=(0, 1, LAST))
    dense = run(model.rebuilt(train=False), state, batch, entering=(LAST,))
    for found, name in (
        (output.entering[0], "sparse_state0"),
        (output.entering[1], "sparse_state1"),
        (output.tokens, "sparse_state6"),
        (dense.entering[LAST], "dense_state5"),
        (dense.tokens, "dense_state6"),
    ):
        real = np.asarray(found)[SCTD_VALID]
        np.testing.assert_allclose(real, SCTD[f"mid/{name}"][SCTD_VALID], atol=2e-5, err_msg=name)
    rows, keep = np.arange(3)[:, None], SCTD["mid/keep_index"]
    there = SCTD_VALID[rows, keep]
    inside = np.asarray(output.entering[LAST])[rows, keep]
    np.testing.assert_allclose(inside[there], SCTD["mid/sparse_state5"][there], atol=2e-5)
    rest = np.asarray(output.entering[LAST])[rows, SCTD["mid/drop_index"]]
    np.testing.assert_allclose(rest, SCTD["mid/sparse_state2"][rows, SCTD["mid/drop_index"]], atol=2e-5)
    for body in (1, 2):
        short = SCTD_STACK.partition(" + block*{after}")[0]
        part = run(sctd_model(0, body, stack=short), sctd_state(range(2 + body)), batch)
        inside = np.asarray(part.tokens)[rows, keep]
        np.testing.assert_allclose(inside[there], SCTD[f"mid/sparse_state{2 + body}"][there], atol=2e-5)
    logits = np.asarray(output.logits)
    np.testing.assert_allclose(logits[SCTD_VALID], SCTD["outputs/logits_sparse"][SCTD_VALID], atol=2e-5)
    places = batch["predict"]
    found = judged(output.replace(logits=output.logits[rows, places], places=places), batch)
    np.testing.assert_allclose(np.ravel(found.nats), SCTD["outputs/masked_losses"], rtol=1e-5)
    np.testing.assert_array_equal(np.ravel(found.label), SCTD["outputs/masked_labels"])


def test_sctd_kl() -> None:
    """Of the states of the case alone, to rtol 1e-5."""
    for depth, name in ((5, "kl_penultimate"), (6, "kl_last")):
        found = semantic_consistency(
            jnp.asarray(SCTD[f"mid/sparse_state{depth}"][:, 0]),
            jnp.asarray(SCTD[f"mid/dense_state{depth}"][:, 0]),
        )
        np.testing.assert_allclose(found, SCTD[f"outputs/{name}"], rtol=1e-5, atol=1e-6)


def test_sctd_steps_that_do_not_align_compute_nothing_dense() -> None:
    """Their loss is the sparse cross-entropy and they read nothing else."""
    model, task = sctd_model(align=0), Given(SctdConfig())
    batch, state = sctd_batch(), sctd_state()
    value, metrics = jax.jit(lambda s: task.loss(model, s, batch, rng=jax.random.key(0), train=True))(state)
    np.testing.assert_allclose(value * SCTD_VALID.sum(), SCTD["outputs/ce_sparse"], rtol=1e-5)
    assert all(float(metrics[name][1]) == 0 for name in ("dense_loss", "kl_penultimate", "kl_last"))
