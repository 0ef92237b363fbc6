"""An encoder that guesses hidden tokens: BERT in miniature on the sources of Python, in minutes on two CPU cores.

tokenlab train --config=configs/encoder_lm.py --workdir=runs/encoder
tokenlab train --config=configs/encoder_lm.py --workdir=runs/encoder_words --config.task.hide=words
tokenlab cost  --config=configs/encoder_lm.py

Two blocks of width 64, 64 tokens at a time from a vocabulary of 1,000 that is trained on the text itself. The text is
the standard library of the Python that runs, so numbers differ a little from version to version.

One seed on Python 3.11, 1,000 steps in 5 minutes on two cores that others used too: 5.31 nats a hidden token on the
validation split and 5.41 on the test split, accuracy 0.12. A unigram of the training tokens has 5.93 on the former. For
some 300 steps the loss stays at that of the unigram, as it does for encoders; it is still falling at the end.

"tiny", "mini", "small", "medium", "base" and "large" give the published sizes with the settings of BERT: 512 tokens, a
batch of 256, a million steps; text of one's own as documents in files, and a vocabulary of 30,522.

    tokenlab train --config=configs/encoder_lm.py:base --config.data.files="corpus/*.jsonl" --workdir=runs/base
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.data.sources import text
from tokenlab.train import default_config


def get_config(size: str = "miniature") -> ConfigDict:
    """The run: "miniature", or a published size."""
    small = size == "miniature"
    config = default_config(model="encoder_lm", task="masked_lm", data="python_text")
    if small:
        config.data.encoder = True
        config.steps = 1000
        config.batch_size = 32
        config.log_every = 50
        config.eval_every = 500
        config.checkpoint_every = 500
        config.eval.batch_size = 64
        config.model.size = "toy"
        config.model.width = 64
        config.model.stack = "block*2"
        config.data.length = 64
        config.data.tokenizer = "bpe(1000)"
        config.data.isolate = False
        config.optimizer.learning_rate = 3e-3
        return config

    config.steps = 1_000_000
    config.batch_size = 256
    config.log_every = 1000
    config.eval_every = 20_000
    config.checkpoint_every = 5_000
    config.model.size = size
    config.model.dropout = 0.1
    config.model.attention_dropout = 0.1
    config.model.vocab_multiple = 64
    config.model.dtype = "bfloat16"
    config.model.execution = "scan"
    config.data = from_dataclass(
        text.Config(
            name="text",
            files=("corpus/*.jsonl",),
            length=512,
            tokenizer="bpe(30522)",
            isolate=False,
            encoder=True,
            prefetch=2,
        )
    )
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 0.01
    config.optimizer.schedule.name = "linear"
    config.optimizer.schedule.warmup_steps = 10_000
    return config
