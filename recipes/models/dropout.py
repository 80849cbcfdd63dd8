"""Dropout that TRL's `disable_dropout` does not reach."""

from torch import nn


def disable_dropout_rates(model: nn.Module) -> None:
    """Set dropout that layers keep as a number to 0: TRL's `disable_dropout` reaches `nn.Dropout` modules only."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
