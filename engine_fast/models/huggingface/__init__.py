"""Encoder-decoders of Hugging Face as teachers. transformers (the extra `hf`) is imported in here, and when needed.

network: the teacher. tokens: its tokenizer as our vocabularies. renumber: its tables in our order. contract: what is
asked of it. importing: all of that, from a directory or the hub to a model directory of ours.
"""
