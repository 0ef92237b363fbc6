"""Merging tokens into fewer."""
