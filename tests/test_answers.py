"""Questions about videos and pictures: what the model is shown and asked, offline and in a stream, and the model `svlm` of lmms-eval."""

import importlib
import importlib.metadata
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import small
from PIL import Image as Pictures

from svlm_jax.captions import Caption
from svlm_jax.checkpoints.load import LoadedModel
from svlm_jax.data.chat import Clip, Image
from svlm_jax.demo.clip import sample_path
from svlm_jax.errors import UserError
from svlm_jax.evaluation import answers
from svlm_jax.evaluation.answers import AnswerConfig, answer, cut

CLIP = str(sample_path())  # 12 s


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return LoadedModel(*small.model(1, 0), small.tokenizer(), tmp_path_factory.mktemp("model"))


def asked(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Who scores?"}]}]


def test_offline(model, monkeypatch):
    seen = {}

    def generate(model, chat, **settings):
        seen.update(chat=chat, settings=settings)
        return SimpleNamespace(text="Red")

    monkeypatch.setattr(answers, "generate", generate)
    picture = Pictures.new("RGB", (90, 50), (255, 0, 0))
    video = {"type": "video", "url": CLIP, "start_time": 2.0, "end_time": 5.0}
    config = AnswerConfig(max_pixels=56 * 84)
    assert answer(model, asked(video, {"type": "image", "url": picture}), config, max_new_tokens=7) == "Red"
    clip, image, text = seen["chat"][0]["content"]
    assert isinstance(clip, Clip) and clip.fps == 2.0 and clip.frames.shape[:2] == (6, 3) and text == "Who scores?"
    assert isinstance(image, Image) and image.frame.shape == (3, 56, 84) and (image.frame[0] == 255).all() and not image.frame[1:].any()
    assert seen["settings"] == {"max_new_tokens": 7, "temperature": 0.0}
    answer(model, asked({"type": "video", "url": CLIP}), AnswerConfig(max_frames=6, max_pixels=56 * 84))
    clip = seen["chat"][0]["content"][0]
    assert clip.frames.shape[0] == 6 and clip.fps == 0.5 and seen["settings"]["max_new_tokens"] == answers.BUDGET
    expected = [clip.frames[i] for i in range(6)]
    assert len({frame.tobytes() for frame in expected}) == 6  # six moments, 2 s apart


def test_in_stream(model, monkeypatch):
    seen = {}

    def stream(source, model, **settings):
        seen.update(settings, source=source)
        texts = ["before", "", "It is red.", "after"]
        return [
            SimpleNamespace(caption=Caption(start, start + 1.0, text)) for start, text in zip((9.0, 10.0, 11.0, 12.0), texts, strict=True)
        ]

    monkeypatch.setattr(answers, "Commentary", stream)
    config = AnswerConfig(way="streaming", max_new_tokens=9)
    assert answer(model, asked({"type": "video", "url": CLIP}), config, max_new_tokens=99) == "It is red."
    assert seen["questions"] == [(10.0, "Who scores?")] and seen["duration"] == 12.0 and seen["start"] == 0.0
    assert (seen["query"], seen["max_new_tokens"], seen["temperature"]) == ("", 9, 0.0)
    answer(model, asked({"type": "video", "url": CLIP, "start_time": 2.5, "end_time": 3.0}), config)
    assert seen["questions"] == [(2.5, "Who scores?")]
    with pytest.raises(UserError, match="one video and no pictures, not 0"):
        answer(model, asked(), config)


def test_mistakes(model):
    with pytest.raises(UserError, match="'audio', which the model cannot take"):
        answer(model, asked({"type": "audio", "url": "x.wav"}), AnswerConfig())
    with pytest.raises(UserError, match="way 'live' is unknown"):
        AnswerConfig(way="live")
    with pytest.raises(UserError, match="from 99 s there is nothing to be shown"):
        answer(model, asked({"type": "video", "url": CLIP, "start_time": 99.0}), AnswerConfig())
    assert cut(" A. Because\n\nB", ["\n\n", "."]) == "A" and cut("A b", None) == "A b" == cut("A b", "")


def test_the_model_of_lmms_eval(monkeypatch):
    """Requests as lmms-eval 0.7 makes them; its two classes are stood in for where it is not installed."""
    base = type(
        "lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {}), "cache_hook": SimpleNamespace(add_partial=lambda *a: None)}
    )
    for name, contents in (
        ("lmms_eval", {}),
        ("lmms_eval.api", {}),
        ("lmms_eval.api.instance", {"Instance": object}),
        ("lmms_eval.api.model", {"lmms": base}),
    ):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    manifests = types.ModuleType("lmms_eval.models.registry_v2")
    manifests.ModelManifest = lambda **given: given
    monkeypatch.setitem(sys.modules, "lmms_eval.models", types.ModuleType("lmms_eval.models"))
    monkeypatch.setitem(sys.modules, "lmms_eval.models.registry_v2", manifests)
    monkeypatch.delitem(sys.modules, "svlm_jax.evaluation.lmms", raising=False)
    (point,) = importlib.metadata.entry_points(group="lmms_eval.models", name="svlm")
    where = point.load()()
    assert where["model_id"] == "svlm"
    module, _, name = where["chat_class_path"].rpartition(".")
    glue = importlib.import_module(module)
    monkeypatch.setitem(sys.modules, module, glue)
    monkeypatch.setattr(glue, "load", lambda path, dtype: (path, dtype))
    calls = []
    monkeypatch.setattr(
        glue, "answer", lambda model, messages, config, **sampling: calls.append((model, messages, config, sampling)) or "A. Yes\n\nNo"
    )
    made = getattr(glue, name)(path="models/x", way="streaming", fps=4, batch_size=1, max_batch_size=None, device="cpu")
    made.task_dict = {"task": {"test": [{"q": "Who?"}]}}
    settings = {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9, "do_sample": False, "until": ["\n\n"]}

    def request(generation):
        return SimpleNamespace(args=("context", lambda doc: [doc["q"]], generation, 0, "task", "test"))

    assert made.generate_until([request(settings), request(settings | {"do_sample": True})]) == ["A. Yes"] * 2
    assert calls[0] == (("models/x", None), ["Who?"], AnswerConfig(way="streaming", fps=4), {"max_new_tokens": 16})
    assert calls[1][3] == {"max_new_tokens": 16, "temperature": 0.7, "top_p": 0.9} and made.is_simple is False
    with pytest.raises(NotImplementedError, match="generate_until"):
        made.loglikelihood([])

    asked_of = []

    def rounds(doc, round_idx=None, previous_output=None, previous_round_info=None):
        asked_of.append((round_idx, previous_output, previous_round_info))
        if round_idx is None:
            return [doc["q"], "first"]
        return ([doc["q"], round_idx] if round_idx < 3 else None), round_idx == 3, previous_output, {"round": round_idx}

    calls.clear()
    request = SimpleNamespace(args=("context", rounds, settings, 0, "task", "test"))
    assert made.generate_until_multi_round([request] * 2) == [["A. Yes"] * 3] * 2
    assert [messages for _, messages, _, _ in calls[:3]] == [["Who?", "first"], ["Who?", 1], ["Who?", 2]] and len(calls) == 6
    assert asked_of[:4] == [
        (None, None, None),
        (1, ["A. Yes"], None),
        (2, ["A. Yes"] * 2, {"round": 1}),
        (3, ["A. Yes"] * 3, {"round": 2}),
    ]


def test_frames_are_those_of_the_seconds(model):
    part = answers._part(model, {"type": "video", "url": CLIP, "start_time": 3.0, "end_time": 4.0}, AnswerConfig(max_pixels=56 * 84))
    whole = answers._part(model, {"type": "video", "url": CLIP}, AnswerConfig(max_pixels=56 * 84))
    assert (part.frames == whole.frames[6:8]).all() and len(whole.frames) == 24 and part.frames.dtype == np.uint8
