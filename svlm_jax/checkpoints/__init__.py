"""Hugging Face checkpoints: read and written without PyTorch, every tensor accounted for."""
