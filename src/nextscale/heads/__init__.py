"""Heads: what happens between two canvas writes, one file a kind."""
