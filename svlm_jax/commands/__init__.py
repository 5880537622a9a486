"""The subcommands of `svlm`, one a file: `add_parser(subparsers)`, and `run(args)`, which gives the exit code.

A module is imported when its command is called, and heavy imports belong into `run`: help must not wait for JAX.
"""

from svlm_jax.errors import UserError


class UsageError(UserError):
    """A flag's value, or flags that do not go together: exit code 2."""
