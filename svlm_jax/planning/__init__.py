"""What a run or a stream would take of devices that are not here: the real programs, compiled ahead of time on a CPU."""
