"""What a job is around its steps: inputs, models put together, runs, checkpoints, and the loops themselves."""
