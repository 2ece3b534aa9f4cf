"""The command line: thin, no mathematics. PyTorch is imported inside the commands, so that help comes at once."""
