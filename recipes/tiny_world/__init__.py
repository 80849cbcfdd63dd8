"""The embedded default: a small world with its gold judge, simulated labeler, base model and quickstart (README.md).

It stands on the top floor and may import every room of `recipes`, but no script; no other room imports it.
"""
