"""Evaluation: what a judge says of samples, whether they are copies, how well a tokenizer reconstructs."""
