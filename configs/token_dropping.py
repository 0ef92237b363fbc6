"""Token dropping in miniature on the sources of Python, and at the size of BERT (arXiv 2203.13240).

tokenlab train --config=configs/token_dropping.py --workdir=runs/token_dropping
tokenlab train --config=configs/token_dropping.py:dense --workdir=runs/token_dropping_dense
tokenlab train --config=configs/token_dropping.py:random --workdir=runs/token_dropping_random
tokenlab cost  --config=configs/token_dropping.py:base

The miniature is six blocks of width 64 over 128 tokens, of which 64 go through the middle ones; evaluation is dense.
`fine_tune` learns the sentences of configs/sentences.py from what it has trained:

    tokenlab train --config=configs/token_dropping.py:fine_tune --config.init_from.path=runs/token_dropping \
        --config.init_from.fresh="('head',)" --config.data.tokenizer=runs/token_dropping/tokenizer.json \
        --workdir=runs/token_dropping_fine

"base" and "large" are as published: 256 of 512 tokens, a batch of 512, a million steps of AdamW with a rate that falls
in a straight line from 1e-4 after 10,000 steps of warm-up. At that scale nothing has been trained here.
"""

from pathlib import Path

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import load
from tokenlab.core.errors import ConfigError, suggest

HERE = Path(__file__).parent

STACKS = {
    "importance": "block*{before} + token_dropping(keep={keep})(block*{inside}) + block",
    "random": "block*{before} + token_dropping(keep={keep}, by=random)(block*{inside}) + block",
    "dense": "block*{depth}",
}
SIZES = {"base": 12, "large": 24}


def stack(kind: str, depth: int, keep: int | float) -> str:
    """L/2 - 1 dense blocks, L/2 of which the first is the bridge, and one; `keep` besides CLS."""
    return STACKS[kind].format(before=depth // 2 - 1, inside=depth // 2, depth=depth, keep=keep)


def get_config(what: str = "importance") -> ConfigDict:
    """The run: a kind of `STACKS` in miniature, "fine_tune", or a published size."""
    if what == "fine_tune":
        config = load(HERE / "sentences.py")
        config.model.stack = "block*6"
        config.model.positions = 128
        return config
    if what not in STACKS and what not in SIZES:
        raise ConfigError(f"token_dropping has no {what!r}.{suggest(what, [*STACKS, *SIZES, 'fine_tune'])}")
    config = load(f"{HERE / 'encoder_lm.py'}:{what if what in SIZES else 'miniature'}")
    # The special tokens of a vocabulary that is made here: [SEP], [CLS] and [MASK]; and padding.
    config.model.always_kept = (0, 2, 3)
    config.model.first_dropped = (1,)
    if what in SIZES:
        config.batch_size = 512
        config.model.stack = stack("importance", SIZES[what], 255)
        config.model.activation = "gelu_tanh"
        return config
    config.steps = 1500
    config.eval_every = 500
    config.checkpoint_every = 500
    config.data.length = 128
    config.model.stack = stack(what, 6, 63)
    return config
