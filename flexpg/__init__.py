"""Exact shared-prefix training for GRPO: every prompt is encoded once, however many completions hang on it.

Axes, everywhere in this package:

    N  rollouts (sequences: prompt + completion)      S  packed tokens, a multiple of 128
    C  tokens of the longest completion               T  tokens of the longest sequence
    H  heads (Hq query, Hkv key/value)                D  head size
    E  width of the hidden states                     V  vocabulary

True means "counts" in every mask.
"""

__version__ = "0.1.0"
