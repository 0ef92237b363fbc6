"""Meshes, where parameters and activations lie on them, and what a compiled program moves between devices."""
