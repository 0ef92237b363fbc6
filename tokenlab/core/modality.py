"""What a token stands for: the modalities of early-fusion models, numbered.

`Tokens.modality` and a batch's "modality" hold these numbers; what delimits a picture is text.
"""

from __future__ import annotations

MODALITIES = ("text", "image")
TEXT = 0
IMAGE = 1
