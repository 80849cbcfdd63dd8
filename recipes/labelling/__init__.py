"""The human step: people rank responses in a browser (`server`) or a shell (`terminal`), one SQLite file keeps every
answer (`store`), `export` makes training data of the answers and `agreement` says how far to trust them. Of the other
rooms this one may import `recipes.cli` only; it needs neither torch nor a network.
"""
