"""What the backward pass keeps of the forward pass, by name; the rest is computed again.

Extra work of a decoder layer, in parts of its forward products at 7B sizes: `nothing` 0, `gate_up` 0.58 (the step as a whole: 19%),
`products` 0 (norms, rotations, attention and activations alone), `full` 1 (the step: 33%).
"""

from collections.abc import Callable
from typing import Any

import jax

from svlm_jax.errors import UserError

KEPT = ("qkv", "heads", "out")  # names in `model.text` that all policies but `full` keep
RESIDUALS = "attention_residuals"  # what a library kernel keeps for its own backward pass, where it lets us name it
KERNELS = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper")  # cuDNN's primitives, whose residuals have no name

_names = jax.checkpoint_policies.save_only_these_names


def _or_kernel(policy: Callable[..., Any]) -> Callable[..., Any]:
    """The policy, and the results of library attention kernels are kept as well, so that none runs twice."""

    def keep(primitive: Any, *args: Any, **params: Any) -> Any:
        return primitive.name in KERNELS or policy(primitive, *args, **params)

    return keep


# None: nothing is recomputed
POLICIES: dict[str, Callable[..., Any] | None] = {
    "nothing": None,
    "products": _or_kernel(_names(*KEPT, "gate_up", RESIDUALS)),
    "gate_up": _or_kernel(_names(*KEPT, RESIDUALS)),
    "full": jax.checkpoint_policies.nothing_saveable,
}
SUMMARIES = {
    "nothing": "keeps everything, recomputes nothing",
    "products": "keeps the results of all products and of attention; recomputes norms, rotations and activations",
    "gate_up": "keeps the products of attention; recomputes gate and up, by far the largest to keep",
    "full": "keeps each layer's input; recomputes all of it",
}


def check_policy(name: str) -> None:
    """UserError where there is no such policy."""
    if name not in POLICIES:
        raise UserError(f"remat {name!r} is unknown: {'; '.join(f'{each} {summary}' for each, summary in SUMMARIES.items())}")


def rematerialised(body: Callable[..., Any], policy: str, *, scanned: bool) -> Callable[..., Any]:
    """`body` with its intermediate results kept or recomputed as POLICIES[policy] has it; `scanned`: it is the body of a scan."""
    check_policy(policy)
    chosen = POLICIES[policy]
    return body if chosen is None else jax.checkpoint(body, policy=chosen, prevent_cse=not scanned)
