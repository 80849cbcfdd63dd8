"""RLHF recipes: supervised fine-tuning, reward modelling and PPO on Hugging Face TRL."""
