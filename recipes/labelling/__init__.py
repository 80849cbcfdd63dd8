"""The human step: people rank responses in a browser (`server`) or a shell (`terminal`), one SQLite file keeps every
answer (`store`), `export` makes training data of the answers and `agreement` says how far to trust them. It may import
`recipes.cli`, `recipes.data.cells`, `recipes.data.messages`, `recipes.data.rows` and `recipes.data.text_files`; it
needs neither torch nor a network.
"""
