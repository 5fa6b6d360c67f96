"""The trainer beside its peers: `python -m bench.trainer`."""
