"""Merging of checkpoints: usable alone, knows neither policy nor environment."""
