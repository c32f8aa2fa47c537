"""Ids of the special symbols, the same in every vocabulary of this project (and in the authors' code)."""

BOS = 0
PAD = 1
EOS = 2
"""Ends every sentence; also the first input of the autoregressive decoder."""
UNK = 3
MASK = 4
"""What a CMLM's decoder reads at a position it has to fill."""
NUM_SPECIAL = 5
