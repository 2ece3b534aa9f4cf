"""Training objectives: the training twin of each sampling loop, and the tokenizers' losses."""
