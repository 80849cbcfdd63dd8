"""What makes PPO fast. `PPOConfig.fast_paths` switches each saving off to compare; docs/performance.md has figures."""

FAST_PATHS = (
    "response_logps",
    "length_sorting",
    "sampling_logps",
    "old_values",
    "live_rows",
    "packed_weights",
    "fused_adapters",
    "early_backward",
)
