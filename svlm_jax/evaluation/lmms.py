"""The model `svlm` of lmms-eval: `python -m lmms_eval --model svlm --model_args path=DIR,way=offline --tasks TASK`. Needs lmms-eval."""

from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from svlm_jax.api import load
from svlm_jax.evaluation.answers import AnswerConfig, answer, cut

IGNORED = ("batch_size", "max_batch_size", "device")  # lmms-eval passes them to every model


class Svlm(lmms):
    """Answers one request at a time.

    Args, as `--model_args`:
      path: a directory, or a name on the Hub; the bundled model where it is not given.
      dtype: of weights and computation.
      way, fps, max_frames, max_pixels, max_new_tokens: of `AnswerConfig`.
    """

    is_simple = False  # requests come as messages

    def __init__(self, path: str | None = None, dtype: str | None = None, **settings: Any):
        super().__init__()
        self.config = AnswerConfig(**{name: value for name, value in settings.items() if name not in IGNORED})
        self.model = load(path, dtype=dtype)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = []
        for request in requests:
            context, doc_to_messages, generation, doc, task, split = request.args
            messages = doc_to_messages(self.task_dict[task][split][doc])
            answers.append(cut(answer(self.model, messages, self.config, **_sampling(generation)), generation.get("until")))
            self.cache_hook.add_partial("generate_until", (context, generation), answers[-1])
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("svlm answers in words: choose a task of output_type generate_until or generate_until_multi_round")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds, for each request. The task asks anew after every answer, until it says that it has done."""
        found = []
        for request in requests:
            _, doc_to_messages, generation, doc, task, split = request.args
            row = self.task_dict[task][split][doc]
            sampling, said = _sampling(generation), []
            messages, ended, info = doc_to_messages(row), False, None
            while not ended:
                said.append(cut(answer(self.model, messages, self.config, **sampling), generation.get("until")))
                told = {"round_idx": len(said), "previous_output": list(said), "previous_round_info": info}
                messages, ended, _, info = doc_to_messages(row, **told)
            found.append(said)
        return found


def _sampling(generation: dict[str, Any]) -> dict[str, Any]:
    """lmms-eval's settings under our names; greedy where it does not sample."""
    taken: dict[str, Any] = {"max_new_tokens": int(generation["max_new_tokens"])} if generation.get("max_new_tokens") else {}
    if generation.get("do_sample", True) and generation.get("temperature"):
        taken["temperature"] = float(generation["temperature"])
        if generation.get("top_p") is not None:
            taken["top_p"] = float(generation["top_p"])
    return taken
