"""PPO and reward training: `ppo_trainer.py` is the loop, `ppo_math.py` its formulas, `fast/` what speeds it up.

It imports `recipes.models` and the rooms below. Trainers get models and datasets and read no dataset files.
"""
