"""Mixture-of-depths at the sizes of its iso-FLOP study (arXiv 2404.02258): 60M to 3B, an eighth of 2,048 tokens.

tokenlab train --config=configs/mixture_of_depths.py:220M --workdir=runs/mod_220m --config.mesh.fsdp=8
tokenlab cost --config=configs/mixture_of_depths.py:3B --chip="TPU v5p"

As published: every second block takes 12.5 % of the tokens of each sequence, sequences of 2,048, batches of 128, a
cosine over exactly the training steps. The authors' text and tokenizer are not public; here the data is what lies in
data/text/*.jsonl.xz, a document a line, read as bytes unless config.data.tokenizer says otherwise. Steps are those that
spend about 6e18 training FLOPs on dense blocks. At this scale nothing has been trained here.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.core.errors import ConfigError, suggest
from tokenlab.data.sources import text
from tokenlab.models.decoder_lm import SIZES
from tokenlab.train import default_config

STEPS = {
    "60M": 60_000,
    "125M": 27_000,
    "220M": 17_000,
    "350M": 10_000,
    "760M": 4_500,
    "1.3B": 2_900,
    "3B": 1_300,
}


def get_config(size: str = "220M") -> ConfigDict:
    """The run of one size; a "-dense" behind it is the baseline, "220M-dense"."""
    name, _, kind = size.partition("-")
    if name not in STEPS or kind not in ("", "dense"):
        known = [*STEPS, *(f"{each}-dense" for each in STEPS)]
        raise ConfigError(f"mixture_of_depths has no size {size!r}.{suggest(size, known)}")
    depth = SIZES[name][1]
    config = default_config(model="decoder_lm", task="next_token")
    config.steps = STEPS[name]
    config.batch_size = 128
    config.log_every = 100
    config.eval_every = 1000
    config.checkpoint_every = 500

    config.model.size = name
    pairs = f"(block + mod(keep=0.125)(block))*{depth // 2}"
    config.model.stack = f"block*{depth}" if kind else pairs
    config.model.dtype = "bfloat16"
    config.model.vocab_multiple = 128
    config.model.execution = "scan"
    config.model.remat = "full"
    config.data = from_dataclass(
        text.Config(name="text", files=("data/text/*.jsonl.xz",), length=2048, prefetch=2)
    )
    config.optimizer.update(learning_rate=3e-4, weight_decay=0.1, clip=1.0)
    if size == "3B":
        compiled = (
            "tokenlab compile --config=configs/mixture_of_depths.py:3B --topology=v5p:4x4x4 --outputs=32000"
        )
        laid_out = {"mesh.recipe": "fsdp:16"}
        rule = dict(
            kind="TPU v5p", devices=64, set=laid_out, step_seconds=0.122, basis="estimated", source=compiled
        )
        config.hardware = (rule,)
    return config
