"""Measuring: what a round costs on this machine, stage by stage, and what it could cost at least (`svlm bench stream`)."""
