"""One paper, one file, in the folder of its family; found by its name, without a registry."""
