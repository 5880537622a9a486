"""How lmms-eval finds the models of this project: the entry point `lmms_eval.models`. Imports nothing until it is asked."""

from typing import Any


def manifest() -> Any:
    """The model id `svlm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="svlm", chat_class_path="svlm_jax.evaluation.lmms.Svlm")
