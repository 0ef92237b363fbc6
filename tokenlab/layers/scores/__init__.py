"""Generic scores for `by=...`: one a file, found by its name. A file offers `score`, a subclass of `Score`."""
