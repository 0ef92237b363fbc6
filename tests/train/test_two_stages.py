"""MoMa as it is published: the model with experts that choose, then auxiliary routers alone, then causal evaluation."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from tokenlab import evaluate, train
from tokenlab.models.state import flat
from tokenlab.train.checkpoint import load_params
from tokenlab.train.config import default_config
from tokenlab.train.records import read_metrics, read_run

MAIN = "block(ffn=moma(text=2, image=2, text_share=0.66, decide=topk))*2"
CAUSAL = "block(ffn=moma(text=2, image=2, text_share=0.66, weight=1.0))*2"
ROUTERS = ("blocks/moma/auxiliary_*",)


@pytest.mark.slow
def test_two_stages_give_a_causal_model_of_the_same_weights(tmp_path: Path) -> None:
    config = default_config(model="decoder_lm", task="mixed_next_token", data="image_text")
    config.update(steps=60, batch_size=16, log_every=20, eval_every=0, checkpoint_every=0)
    config.data.update(size=4, length=48)
    config.optimizer.schedule.warmup_steps = 0
    config.optimizer.learning_rate = 3e-3
    config.eval.batch_size = 64
    config.model.update(size="nano", stack=MAIN, leaks=True)
    first = train.run(config, tmp_path / "main")

    config.model.update(stack=CAUSAL, leaks=False)
    config.init_from.update(path=str(tmp_path / "main"), fresh=ROUTERS)
    config.optimizer.update(only=ROUTERS, learning_rate=1e-2)
    second = train.run(config, tmp_path / "routers")

    # What is not trained is the main model bit for bit; all auxiliary routers moved, and nothing else was counted.
    main, both = (flat(load_params(tmp_path / name)[0]) for name in ("main", "routers"))
    fresh = {path for path in both if "/auxiliary_" in path}
    assert set(both) - set(main) == fresh and len(fresh) == 4
    for path, leaf in main.items():
        np.testing.assert_array_equal(both[path], leaf)
    spent = [read_metrics(tmp_path / name)[-1]["flops"] for name in ("main", "routers")]
    assert spent[1] < 0.7 * spent[0]
    assert "only blocks/moma/auxiliary_*" in read_run(tmp_path / "routers")["optimizer"]

    # They learned who is taken: better than the more frequent answer, which is right for a half.
    records = [each for each in read_metrics(tmp_path / "routers") if each["split"] == "train"]
    for name in ("text", "image"):
        accuracies = [each[f"moma_accuracy_{name}"] for each in records]
        assert accuracies[-1] > max(0.55, accuracies[0])
    assert records[-1]["moma_loss"] < records[0]["moma_loss"]

    # Evaluation lets tokens decide for themselves; that costs little beside looking ahead.
    losses = [found["validation"]["loss"] for found in (first, second)]
    assert abs(losses[1] - losses[0]) < 0.25

    trained = {name: evaluate.load(tmp_path / name) for name in ("main", "routers")}
    batch = trained["routers"].source.split("validation").batch(np.arange(4))
    batch = {key: batch[key] for key in ("ids", "modality", "segment", "position")}
    cut = 30
    later = {key: value.copy() for key, value in batch.items()}
    for key, value in later.items():
        value[:, cut:] = np.roll(batch[key], 1, axis=0)[:, cut:]
    assert (later["ids"] != batch["ids"]).any(axis=1).all()
    changed = {}
    for name, each in trained.items():
        run = jax.jit(lambda params, batch, model=each.model: model.apply(params, batch).logits)
        before, after = (np.asarray(run(each.params, given)) for given in (batch, later))
        changed[name] = np.abs(after - before)[:, :cut].max()
        assert (after[:, cut:] != before[:, cut:]).any()
    assert changed["routers"] == 0
    assert changed["main"] > 0  # which is why a language model that looks ahead has to be told to
