"""The engine by itself, beside others on the same model."""
