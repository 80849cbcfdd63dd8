"""Tokenizers, bases and adapters: loading them, checking that they fit together, switching roles, sampling.

It may import `recipes.data` and `recipes.cli`; how a model is trained is the business of `recipes.trainers`.
"""
