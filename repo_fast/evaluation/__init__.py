"""Evaluates policies side by side on the same prompts; `repo_fast.evaluate` is its command line."""
