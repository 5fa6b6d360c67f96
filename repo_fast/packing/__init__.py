"""Sequences in one row, and work evened out over rows and ranks."""
