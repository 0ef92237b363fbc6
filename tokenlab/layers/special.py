"""How a block feeds its special tokens (CLS, registers) otherwise than the others: `block(special=NAME)`.

A method file offers `special(defaults, **arguments) -> Special`. The J special tokens of width D in front of a sequence
are joined to one vector of width J D; the block norms it, with weights of its own, hands it to the module, and adds the
result to it:

    z = z + module(Norm(z))        z [B, J D], the special tokens after attention
    p = p + FFN(Norm(p))           p [B, N, D], all others, through the feed-forward layer of the block

Both halves read what attention gave, and neither computes anything for the tokens of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn


@dataclass(frozen=True)
class Special:
    """What a block runs on its special tokens.

    Attributes:
      module: maps [B, J * D] to [B, J * D]; offers `axes()` like any layer.
      shared: one copy of its weights, under `shared/NAME`, serves all blocks that name it; False gives each block its
        own, under `blocks/NAME`.
    """

    module: nn.Module
    shared: bool = True
