"""RLHF recipes: supervised fine-tuning, reward modelling and PPO on Hugging Face TRL.

The rooms stand on floors; imports go down only, and each room's `__init__.py` says which (tests/test_architecture.py):

    tiny_world
    sft.py  reward.py  ppo.py  evaluation  labelling
    trainers                   formatting.py (the interface of data)
    models
    data
    cli
"""
