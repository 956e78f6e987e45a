"""Prompt sets of files: where the files come from, how they are read, and what is made of them."""
