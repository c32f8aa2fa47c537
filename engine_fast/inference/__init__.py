"""Trained models as something people run: loading, translating streams of text, serving, exporting."""
