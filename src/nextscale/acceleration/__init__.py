"""Published speed-ups as hooks of a run: one file a method, by slug."""
