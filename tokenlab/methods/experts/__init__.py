"""Experts: many feed-forward networks, of which a token uses some."""
