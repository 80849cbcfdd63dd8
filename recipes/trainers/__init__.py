"""PPO and reward training: `ppo_trainer.py` is the loop, `ppo_math.py` its formulas, `fast/` what speeds it up.

It may import `recipes.models`, `recipes.data` and `recipes.cli`. Trainers get models and datasets and read no files.
"""
