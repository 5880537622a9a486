"""Model and training configurations: Python files whose functions return frozen dataclasses."""
