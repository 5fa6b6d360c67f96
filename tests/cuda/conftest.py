"""These tests need a process that was told of a GPU (`tests/cuda/fake.py`): `tests/test_cuda_paths.py` starts it."""

import os

collect_ignore_glob = [] if os.environ.get("ABSENT_GPU") else ["test_*.py"]
