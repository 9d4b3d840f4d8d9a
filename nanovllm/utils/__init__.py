"""Where models come from, how their weights are loaded, and what a step tells its attention layers."""
