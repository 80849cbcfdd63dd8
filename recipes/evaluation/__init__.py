"""The only evaluation stack: it samples policies, scores them with judges and a reward model, and reports the result.

It may import `recipes.trainers`, `recipes.models`, `recipes.data`, `recipes.formatting` and `recipes.cli`, and is used
by `scripts/evaluate.py` and `recipes.tiny_world`; docs/evaluation.md says what each figure means.
"""
