"""Network bodies, one file a kind: ``generator(call, ctx) -> hidden``."""
