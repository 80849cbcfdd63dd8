"""What makes PPO fast. `PPOConfig.fast_paths` switches each part off to compare; docs/performance.md has figures."""
