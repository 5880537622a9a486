"""What a fresh install can show without any download."""
