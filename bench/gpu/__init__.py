"""The parts of `bench.gpu_suite`, and what a GPU for minutes is given."""
