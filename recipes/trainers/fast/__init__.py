"""What makes PPO fast. `PPOConfig.fast_paths` switches each part off to compare; docs/performance.md has figures."""

FAST_PATHS = (
    "response_logps",
    "length_sorting",
    "sampling_logps",
    "drop_finished",
    "packed_weights",
    "fused_adapters",
    "early_backward",
)
