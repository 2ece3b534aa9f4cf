"""How fast a model draws, and what that costs: measured beside the published loop and beside what the machine can do.

``measure`` is ``nextscale bench``: ``drawing`` says what is drawn, ``recorder`` in which phase a generation is,
``clock`` times phases, ``work`` counts them, ``machine`` measures the machine, ``published_loop`` is the baseline,
``cold`` times a fresh process.
"""
