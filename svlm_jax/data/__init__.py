"""Videos and annotations, up to the arrays that the model reads. Nothing in `data.video` or `data.resize` needs jax."""
