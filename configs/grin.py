"""GRIN 16x3.8B (arXiv 2409.12136, section 4): 32 layers of 16 experts, two of them for each token, SparseMixer-v2.

tokenlab train --config=configs/grin.py --workdir=runs/grin --config.mesh.fsdp=64
tokenlab cost --config=configs/grin.py

As published: width 4,096, 32 heads and 8 key heads of 128, experts that are SwiGLUs of 6,400, layer norm before each
half, rotary positions, a sliding window of 2,048 tokens of sequences of 4,096, r = 0.01 and a balance loss of 0.001; no
token is dropped. The published model has biases in attention and head, which the decoder here has not. Its four
trillion tokens are not public: the data is what lies in data/text/*.jsonl.xz, read as bytes unless
config.data.tokenizer says otherwise. A test holds the parameters with the published vocabulary of 32,064 against the
published 42 billion, 6.6 billion of them active. Nothing has been trained here.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.config import from_dataclass
from tokenlab.data.sources import text
from tokenlab.train import default_config

LAYER = "grin(experts=16, k=2, r=0.01, balance=0.001, expert=swiglu(hidden=6400))"


def get_config() -> ConfigDict:
    """The run."""
    config = default_config(model="decoder_lm", task="next_token")
    config.steps = 1_000_000
    config.batch_size = 1024
    config.log_every = 100
    config.eval_every = 5000
    config.checkpoint_every = 1000

    config.model.update(
        size="7B",
        stack=f"block(ffn={LAYER})*32",
        num_kv_heads=8,
        norm="layer",
        norm_eps=1e-5,
        window=2048,
        vocab_multiple=128,
        dtype="bfloat16",
        execution="scan",
        remat="full",
    )
    config.data = from_dataclass(
        text.Config(name="text", files=("data/text/*.jsonl.xz",), length=4096, prefetch=2)
    )
    config.optimizer.update(learning_rate=2e-4, weight_decay=0.1, clip=1.0)
    return config
