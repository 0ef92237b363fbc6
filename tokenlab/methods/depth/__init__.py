"""Depth: methods that let tokens go through fewer layers."""
