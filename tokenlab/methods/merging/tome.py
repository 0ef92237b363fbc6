"""tome: token merging as published (Bolya et al., ICLR 2023, arXiv 2210.09461).

Claim: without training, ViT-S/16 at r = 13 goes from 953 to 1,564 images/s on a V100 for 81.4 -> 79.3 % ImageNet top-1,
ViT-L/16 at r = 7 from 95 to 167 for 85.8 -> 84.3 % (the authors' figures).

Between attention and feed-forward of every block, r tokens merge:

    metric = mean over heads of the keys                               [B, N, Dh]      (section 3.2)
    A = even positions, B = odd positions; each a in A finds its most similar b in B   (section 3.3)
    the r closest pairs merge: x = (s_a x_a + s_b x_b) / (s_a + s_b), s = s_a + s_b    (CLS never merges)
    the next attention adds log(s) to the logits of its keys                           (equation 1)

so `block(between=tome(8))*12` is the paper's network. It differs from the generic `merge` in one thing: the authors put
the merged tokens behind the others, and what is even and what is odd in the next block follows from that order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tokenlab.layers.items.merge import Merge


@dataclass(frozen=True)
class ToMe(Merge):
    """`tome(8)`: `merge(8)` in the authors' order of tokens. See `Merge` for the arguments."""

    order: ClassVar[str] = "reference"
    identity: ClassVar[str] = "block(between=tome(0)) + block"
    examples: ClassVar[tuple[str, ...]] = ("block(between=tome(4))*2", "block + tome(0.25) + block")


item = ToMe
BENCHMARK = {"8 a block": "block(between=tome(8))*12"}
