"""Thin Linen modules that declare parameters and call `tokenlab.ops`, and the stack that runs them."""
