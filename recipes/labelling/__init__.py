"""The human step: people rank the responses a model gave, and say why.

`store` keeps every answer in one SQLite file, `server` and `terminal` are two ways to give them, `export` turns them
into training data and `agreement` says how far they can be trusted. Nothing here needs torch or a network.
"""
