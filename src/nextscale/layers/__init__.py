"""Layers that every system is built from; no file here knows a system's name."""
