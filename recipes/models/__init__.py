"""Tokenizers, bases and adapters: loading them, checking that they fit together, switching roles, sampling.

It imports `recipes.cli` and nothing else of `recipes`; how a model is trained is the business of `recipes.trainers`.
"""
