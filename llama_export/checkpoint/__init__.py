"""A Hugging Face folder: where every tensor lies, byte by byte."""
