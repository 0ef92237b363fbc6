"""Dropping tokens for good."""
