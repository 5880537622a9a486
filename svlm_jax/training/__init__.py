"""Fine-tuning: a packed forward, its loss, one pure step, and the loop around it."""
