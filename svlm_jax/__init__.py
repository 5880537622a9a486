"""svlm-jax: understanding live video without end, in JAX."""
