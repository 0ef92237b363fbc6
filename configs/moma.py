"""MoMa at its published sizes (arXiv 2407.21770): 90M, 435M and 1.4B decoders of text and images, 4,096 tokens long.

tokenlab train --config=configs/moma.py:435M-4t4i --workdir=runs/moma_435m --config.mesh.fsdp=64 --config.mesh.expert=4
tokenlab cost --config=configs/moma.py:1.4B-4t4i --chip="TPU v5p"

Kinds are dense, 1t1i, 4t4i, 6t2i, 7t1i and 8x, and mod-1t1i and mod-4t4i of 110M, 635M and 2.3B, whose added layers
spend what every second one saves. As published: norms behind each half of a block, normed queries and keys, vocabulary
65,536, Adam with a straight line from 1e-4 to 1e-6 after 4,000 steps, 6.3 million tokens a step (8.4 for 1.4B).
Auxiliary routers learn beside the model; published is a second run for them: `optimizer.only=("*/auxiliary_*",)`.

The authors' data and tokenizers are not public. In their place stand emoji in 32 x 32 grey levels, as many codes as
their pictures have, half of each row; take a codes file of your own as config.data.codec. At this scale nothing has
been trained here.
"""

from ml_collections.config_dict import ConfigDict

from tokenlab.core.errors import ConfigError, suggest
from tokenlab.train import default_config

SIZES = {
    # name: width D, depth L, heads H, tokens of a step, steps; F is 8/3 D, as the published parameter counts say
    "90M": (512, 8, 8, 1536 * 4096, 160_000),
    "435M": (1024, 24, 16, 1536 * 4096, 160_000),
    "1.4B": (2048, 24, 16, 2048 * 4096, 120_000),
    "110M": (512, 14, 8, 1536 * 4096, 160_000),
    "635M": (1024, 40, 16, 1536 * 4096, 160_000),
    "2.3B": (2304, 32, 18, 2048 * 4096, 120_000),
}
EXPERTS = {
    "dense": "",
    "1t1i": "moma(text=1, image=1{slack})",
    "4t4i": "moma(text=4, image=4{slack})",
    "6t2i": "moma(text=6, image=2{slack})",
    "7t1i": "moma(text=7, image=1{slack})",
    "8x": "moma(mixed=8)",
}
ROUTED = ("110M", "635M", "2.3B")
LENGTH = 4096


def known() -> list[str]:
    """The names of all runs."""
    plain = [f"{size}-{kind}" for size in SIZES if size not in ROUTED for kind in EXPERTS]
    return plain + [f"{size}-mod-{kind}" for size in ROUTED for kind in ("1t1i", "4t4i")]


def stack_of(size: str, kind: str) -> str:
    """The blocks of a run; those that a router lets a quarter of the tokens into keep places for half as many more."""
    depth = SIZES[size][1]
    name = kind.removeprefix("mod-")
    if name == "dense":
        return f"block*{depth}"
    block = f"block(ffn={EXPERTS[name].format(slack='')})"
    if name == kind:
        return f"{block}*{depth}"
    inside = f"block(ffn={EXPERTS[name].format(slack=', slack=1.5')})"
    return f"(mod(keep=0.25, gate=sigmoid)({inside}) + {block})*{depth // 2}"


def get_config(run: str = "435M-4t4i") -> ConfigDict:
    """A run by its name, "435M-4t4i" or "635M-mod-4t4i"."""
    if run not in known():
        raise ConfigError(f"moma has no run {run!r}.{suggest(run, known())}")
    size, _, kind = run.partition("-")
    width, _, heads, tokens, steps = SIZES[size]
    config = default_config(model="decoder_lm", task="mixed_next_token", data="image_text")
    config.steps = steps
    config.batch_size = tokens // LENGTH
    config.log_every = 100
    config.eval_every = 2000
    config.checkpoint_every = 1000

    config.model.size = "60M"
    config.model.width = width
    config.model.mlp_dim = round(8 * width / 3)
    config.model.num_heads = heads
    config.model.num_kv_heads = heads
    config.model.stack = stack_of(size, kind)
    config.model.norm_placement = "res_post"
    config.model.qk_norm = True
    config.model.vocab_multiple = 65_536
    config.model.dtype = "bfloat16"
    config.model.execution = "scan"
    config.model.remat = "full"

    config.data.pictures = "emoji"
    config.data.size = 32
    config.data.codec = "grey(256)"
    config.data.length = LENGTH
    config.data.pictures_per_row = 2

    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule.name = "linear"
    config.optimizer.schedule.warmup_steps = 4000
    config.optimizer.schedule.final = 0.01
    if run == "1.4B-4t4i":
        compiled = "tokenlab compile --config=configs/moma.py:1.4B-4t4i --topology=v5p:8x8x8 --outputs=65536"
        laid_out = {"mesh.recipe": "fsdp_expert:4"}
        rule = dict(
            kind="TPU v5p", devices=512, set=laid_out, step_seconds=0.521, basis="estimated", source=compiled
        )
        config.hardware = (rule,)
    return config
