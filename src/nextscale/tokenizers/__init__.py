"""Tokenizers: picture <-> latent <-> codes, one file a kind."""
