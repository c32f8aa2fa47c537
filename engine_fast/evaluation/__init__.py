"""Measuring translations: BLEU and chrF, energies, repetition, lengths, speed; tables and the report page."""
