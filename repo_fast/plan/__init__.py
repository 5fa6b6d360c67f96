"""A run on paper: memory and time by model and phase, from its configuration, before any GPU is rented."""
