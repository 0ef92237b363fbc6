"""The generic stack items: one a file, found by its name. A file offers `item`, a subclass of `Item`."""
