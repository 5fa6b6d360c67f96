"""Time, memory, machines, and suites of measurements with their tables."""
