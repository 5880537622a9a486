"""Device kernels, each a folder with a contract, a reference and backends. They import jax only."""
