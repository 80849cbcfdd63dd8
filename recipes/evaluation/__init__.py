"""Evaluation: what alignment gained, and what it cost. The command is scripts/evaluate.py, see docs/evaluation.md.

metrics.py         means with intervals, KL, distinct-n, win rates
frontier.py        best-of-n, the optimal policy at every KL, over-optimisation curves
reward_quality.py  how well a reward model orders pairs
judges.py          Python functions, an LLM, people
policies.py        samples of a policy and their log-probabilities
measure.py         everything that is measured, once, and kept
plots.py report.py report.json, report.html, PNG files, W&B
"""
