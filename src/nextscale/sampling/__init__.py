"""Sampling: loops, guidance, filters, editing, scoring. Read ``steps.py`` first."""
