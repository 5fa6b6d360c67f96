"""What is optimised: algorithms, KL shaping, multipliers, preference losses. Pure tensors."""
