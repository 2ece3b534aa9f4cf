"""Conditions: what the picture is of, one file a kind."""
