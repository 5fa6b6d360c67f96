"""repo_fast: a fast trainer for safe RLHF by Rectified Policy Optimization (RePO, arXiv 2410.19933)."""

__version__ = "0.1.0"
