"""A live server on localhost, with real clients."""

import asyncio
import base64
import contextlib
import importlib.util
import io
import itertools
import json
import random
import re
import signal
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest
import srt
import websockets
import webvtt
from openai.types.realtime import RealtimeServerEvent
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import TypeAdapter
from server import Server, picture
from websockets.asyncio.client import connect

from svlm_jax.config import StreamConfig
from svlm_jax.data.resize import resized_size
from svlm_jax.data.video import probe, read_rounds
from svlm_jax.demo.bundle import clip_path
from svlm_jax.demo.clip import sample_path
from svlm_jax.demo.make_tiny import tiny_path
from svlm_jax.programs import use_compilation_cache
from svlm_jax.serving.service import ServeConfig, Service
from svlm_jax.streaming.engine import Engine

SERVER_EVENT = TypeAdapter(RealtimeServerEvent)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server("--streams", "3", "--state", str(tmp_path_factory.mktemp("state")))
    try:
        early = server.http.post("/v1/streams", json={"source": "sample"}), server.http.get("/ready")
        if early[1].status_code == 503:  # it compiles yet
            assert early[0].status_code == 503 and "loading" in early[0].json()["error"]["message"]
        server.ready()
        assert server.http.get("/ready").status_code == server.http.get("/health").status_code == 200
        yield server
    finally:
        code = server.stop()
    assert code == 0 and not server.errors
    assert server.lines[-1]["event"] == "server.stopped"


@pytest.fixture(scope="module")
def sample(server):
    """What the captions of the bundled clip's beginning are, and its stream."""
    id = server.open(source="sample", duration=12)
    return id, server.captions(id)


def play(server: Server, seed: int, frames: int, **wish) -> str:
    """A pushed stream by the file's clock, two frames a second, to its end."""
    id = server.open(source="push", clock="file", seed=seed, **wish)
    for index in range(frames):
        assert server.push(id, picture(1000 * seed + index)).status_code == 202
    server.push(id, last=1)
    return id


def test_the_sample_is_captioned_as_by_an_engine_of_its_own(server, sample):
    """Frame for frame, by the engine alone, whose programs are those that the server has left in the cache."""
    id, captions = sample
    stream = StreamConfig(vision_window=4, text_window=4, max_new_tokens=6, max_pixels=9408)
    use_compilation_cache()
    jax.clear_caches()  # of what was compiled in a hurry
    hurried = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        service = Service(ServeConfig(stream, model=str(tiny_path()), places=3, size=(84, 112)))
        model, spec = service.checkpoint.load(), service.spec
        engine = Engine(model.params, spec, model.tokenizer, streams=3)
        engine.open(0)
        texts = []
        for item in read_rounds(clip_path(), fps=2.0, chunk_seconds=1.0, duration=12, size=(spec.height, spec.width)):
            frames = np.zeros((3, 2, 3, spec.height, spec.width), np.uint8)
            frames[0] = item.frames.transpose(0, 3, 1, 2)
            texts.append(engine.spoken(engine.step(frames, {0: (item.start, item.end)}).tokens()[0]))
    finally:
        use_compilation_cache(False)
        jax.config.update("jax_disable_most_optimizations", hurried)
        jax.clear_caches()
    assert texts == [c["text"] for c in captions]
    assert [(c["start"], c["end"]) for c in captions] == [(r, r + 1) for r in range(12)]
    status = server.status(id)
    assert (status["state"], status["rounds"], status["position"], status["frames"]["dropped"]) == ("ended", 12, 12.0, 0)
    assert status["video"]["codec"] == "h264"


def test_a_listener_goes_on_where_it_was(server, sample):
    events = list(server.events(sample[0]))
    assert [number for number, _, _ in events] == list(range(1, 14))
    assert events[-1][1:] == ("end", {"type": "end", "reason": "finished", "message": ""})
    assert list(server.events(sample[0], last=9)) == events[9:]
    answer = server.http.get(f"/v1/streams/{sample[0]}/captions", headers={"Last-Event-ID": "soon"})
    assert answer.status_code == 400


def test_downloads(server, sample):
    id, captions = sample
    words = [c["text"] for c in captions if c["type"] == "segment"]
    files = {suffix: server.http.get(f"/v1/streams/{id}/captions.{suffix}") for suffix in ("vtt", "srt", "jsonl")}
    assert [cue.text for cue in webvtt.WebVTT.from_string(files["vtt"].text)] == words
    assert [cue.content for cue in srt.parse(files["srt"].text)] == words
    assert [json.loads(line) for line in files["jsonl"].text.splitlines()] == captions
    assert files["vtt"].headers["content-type"].startswith("text/vtt") and "attachment" in files["vtt"].headers["content-disposition"]


def test_streams_that_come_and_go_change_no_other(server):
    """One stream, alone and among others that join, pause, fail and leave at random: the same words, and none lost."""
    alone = server.captions(play(server, 7, 20))
    assert len(alone) == 10 and any(c["type"] == "segment" for c in alone)
    done, rng = threading.Event(), random.Random(3)

    def disturb(seed: int) -> None:
        while not done.is_set():
            id = server.open(source="push", clock="file", seed=seed)
            for index in range(rng.randint(1, 6)):
                server.push(id, picture(index) if rng.random() < 0.8 else b"no picture")
            if rng.random() < 0.5:
                server.http.post(f"/v1/streams/{id}/pause")
            server.http.delete(f"/v1/streams/{id}")
            seed += 10

    others = [threading.Thread(target=disturb, args=(seed,)) for seed in (1, 2)]
    for other in others:
        other.start()
    try:
        for _ in range(2):
            assert server.captions(play(server, 7, 20)) == alone
    finally:
        done.set()
        for other in others:
            other.join()
    assert server.lines[-1]["event"].startswith("stream.")


def test_a_stream_that_waits_for_its_frames_stays_whole(server):
    """Rounds of another stream run in between: it is taken out of its row and comes back, in any row."""
    alone = server.captions(play(server, 5, 12))
    slow = server.open(source="push", clock="file", seed=5)
    for index in range(12):
        server.push(slow, picture(5000 + index))
        if index % 4 == 3:
            server.captions(play(server, index, 3))
    server.push(slow, last=1)
    assert server.captions(slow) == alone
    parked = server.http.get("/metrics").text
    assert float(next(line for line in parked.splitlines() if line.startswith("svlm_parked_total")).split()[1]) >= 2


def test_a_question_is_put_into_the_next_round(server):
    plain = server.captions(play(server, 9, 6))
    id = server.open(source="push", clock="file", seed=9)
    for index in range(6):
        if index == 5:
            while server.status(id)["rounds"] < 2:
                time.sleep(0.01)
            assert server.http.post(f"/v1/streams/{id}/questions", json={"text": "Who has\n the ball?"}).status_code == 202
        server.push(id, picture(9000 + index))
    server.push(id, last=1)
    events = list(server.events(id))
    assert [data for _, name, data in events if name == "question"] == [{"type": "question", "start": 2.0, "text": "Who has the ball?"}]
    told = [data["text"] for _, name, data in events if name == "message"]
    assert told[:2] == [c["text"] for c in plain[:2]] and len(told) == 3
    for wrong in ({}, {"text": ""}, {"text": 7}, {"text": "why " * 300}):
        assert server.http.post(f"/v1/streams/{id}/questions", json=wrong).status_code == 400
    assert server.http.post(f"/v1/streams/{id}/questions", json={"text": "Who?"}).status_code == 409


def test_live_frames_are_thinned_and_gaps_are_told(server):
    """By the server's clock: rounds on time whatever the rate, and after a pause or without frames a gap with the true time."""
    id = server.open(source="push", seed=1, name="camera")
    frames = [picture(index, form="JPEG") for index in range(4)]

    def send(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            server.push(id, frames[int(time.monotonic() * 10) % 4])
            time.sleep(0.05)

    send(2.6)
    time.sleep(2.6)
    send(1.6)
    server.http.post(f"/v1/streams/{id}/pause")
    send(2.1)
    server.http.post(f"/v1/streams/{id}/resume")
    send(2.1)
    status = server.http.delete(f"/v1/streams/{id}").json()
    events = [data for _, _, data in server.events(id)]
    assert {data["reason"] for data in events if data["type"] == "gap"} >= {"late", "paused"}
    spoken = [data for data in events if data["type"] in ("segment", "silence", "gap")]
    assert spoken[0]["start"] == 0.0
    for before, after in itertools.pairwise(spoken):
        assert after["start"] == before["end"]  # nothing is left untold
    assert status["frames"]["thinned"] > 0 and status["frames"]["received"] > status["rounds"]
    assert status["lag_seconds"] is not None and status["skipped_seconds"] >= 2
    assert {data["state"] for data in events if data["type"] == "state"} == {"paused", "running"}


def test_no_place_is_left(server):
    ids = [server.open(source="push", clock="file") for _ in range(3)]
    answer = server.http.post("/v1/streams", json={"source": "push"})
    assert answer.status_code == 503 and "all 3 places are taken" in answer.json()["error"]["message"] and answer.headers["retry-after"]

    async def refused():
        async with connect(f"{server.url.replace('http', 'ws')}/v1/realtime") as socket:
            error = json.loads(await socket.recv())
            assert error["error"]["type"] == "overloaded_error" and error["svlm"] == {"retry_after": int(answer.headers["retry-after"])}
            with pytest.raises(websockets.ConnectionClosed) as closed:
                await socket.recv()
            assert closed.value.rcvd.code == 1013 and "places" in closed.value.rcvd.reason

    asyncio.run(refused())
    for id in ids:
        server.http.delete(f"/v1/streams/{id}")
    server.http.delete(f"/v1/streams/{server.open(source='sample', duration=1)}")


def bomb() -> bytes:
    out = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize("media", [b"\xff\xd8\xff garbage", picture(0)[:300], bomb(), b"<svg/>", b"GIF89a" + bytes(50)])
def test_hostile_pictures_disturb_nobody(server, media):
    """The picture is left out and counted; the stream goes on, and so does its neighbour."""
    id = server.open(source="push", clock="file", seed=7)
    for index in range(4):
        server.push(id, picture(7000 + index) if index != 2 else media)
    server.push(id, last=1)
    assert len(server.captions(id)) == 2
    status = server.status(id)
    assert status["frames"]["broken"] == 1 and status["video"]["last_error"]


@pytest.mark.parametrize(
    ("wish", "status", "told"),
    [
        ({"source": "/etc/passwd"}, 403, "--allow-files"),
        ({"source": "http://169.254.169.254/latest"}, 403, "--allow-host"),
        ({"source": "file:///etc/passwd"}, 403, "begin with one of"),
        ({"sauce": "sample"}, 400, "no setting 'sauce'"),
        ({"source": "sample", "clock": "live"}, 400, "clock"),
        ({"source": "push", "query": "why " * 300}, 400, "tokens"),
        ({"source": "push", "previous_text": "x" * 30_000}, 400, "characters"),
        ({"source": "push", "seed": 0.5}, 400, "seed"),
        ({"source": "push", "start": "now"}, 400, "start"),
        ({"resume": "../../etc/passwd"}, 404, "not the name of a stream"),
        ({"resume": "strm_0000000000000000"}, 404, "no snapshot"),
    ],
)
def test_wishes_that_are_refused(server, wish, status, told):
    answer = server.http.post("/v1/streams", json=wish)
    assert answer.status_code == status and told in answer.json()["error"]["message"]


def test_requests_that_are_refused(server):
    http = server.http
    assert http.post("/v1/streams", content=b"{").status_code == 400
    assert http.post("/v1/streams", content=b"[" * 100_000).status_code == 400
    assert http.post("/v1/streams", content=b" " * 300_000).status_code == 413
    assert http.get("/v1/streams/none").status_code == http.get("/v1/none").status_code == 404
    assert http.put("/v1/streams").status_code == 405
    assert http.post("/v1/streams", json={}, headers={"Origin": "https://evil.example"}).status_code == 403
    assert http.get("/v1/streams", headers={"Host": "evil.example"}).status_code == 403
    id = server.open(source="push", clock="file")
    assert server.push(id, bytes(5 << 20)).status_code == 413
    assert server.push(id).status_code == 400
    assert server.push(id, picture(0), t="nan").status_code == 400
    assert [server.push(id, picture(0), t=t).status_code for t in (1.0, 2.0, 1.5)] == [202, 202, 400]
    http.delete(f"/v1/streams/{id}")
    assert server.push(id, picture(0)).status_code == 400
    sample = server.open(source="sample", duration=1)
    assert server.push(sample, picture(0)).status_code == 409


def test_a_client_that_hangs_holds_nobody_up(server):
    """Half a request, and a listener that reads nothing, while another stream runs."""
    import socket

    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as half, socket.create_connection((address.host, address.port)) as deaf:
        half.sendall(b"POST /v1/streams HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        id = server.open(source="sample", duration=12)
        deaf.sendall(f"GET /v1/streams/{id}/captions HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert len(server.captions(id)) == 12


# Realtime


async def talk(server: Server, send, query: str = "clock=file&seed=7") -> tuple[list[dict], int]:
    """Everything that a connection hears, checked against OpenAI's types, and the code that it is closed with."""
    heard: list[dict] = []
    async with connect(f"{server.url.replace('http', 'ws')}/v1/realtime?{query}", max_size=None) as socket:
        task = asyncio.create_task(send(socket, heard))
        try:
            async for text in socket:
                heard.append(json.loads(text))  # noqa: PERF401 - `send` looks at it meanwhile
        except websockets.ConnectionClosedError:  # by a code that is no success
            pass
        finally:
            await task
    for event in heard:
        if event["type"] != "svlm":
            SERVER_EVENT.validate_python(event)
    return heard, socket.close_code


def binary(kind: int, seconds: float = 0.0, data: bytes = b"") -> bytes:
    return bytes([kind]) + round(seconds * 1e6).to_bytes(8, "big") + data


def test_realtime_says_what_http_says(server):
    async def send(socket, heard):
        for index in range(8):
            await socket.send(binary(1, index / 2, picture(7000 + index)))
        await socket.send(binary(2))

    heard, code = asyncio.run(talk(server, send))
    assert code == 1000 and heard[0]["type"] == "session.created" and heard[0]["session"]["svlm"]["clock"] == "file"
    expected = server.captions(play(server, 7, 8))
    told = [e for e in heard if e["type"] == "response.done"]
    assert [(e["svlm"]["type"], e["svlm"]["start"], e["svlm"]["end"]) for e in told] == [(c["type"], c["start"], c["end"]) for c in expected]
    texts = ["".join(part["text"] for item in e["response"]["output"] for part in item["content"]) for e in told]
    assert texts == [c["text"] for c in expected]
    for done in told:  # each word once, in pieces
        id = done["response"]["id"]
        pieces = [e["delta"] for e in heard if e["type"] == "response.output_text.delta" and e["response_id"] == id]
        ended = [e["text"] for e in heard if e["type"] == "response.output_text.done" and e["response_id"] == id]
        assert "".join(pieces) == "".join(ended) == "".join(p["text"] for i in done["response"]["output"] for p in i["content"])
        assert [e["type"] for e in heard if e.get("response", {}).get("id") == id] == ["response.created", "response.done"]
    assert heard[-1] == {"type": "svlm", "event_id": heard[-1]["event_id"], "svlm": {"type": "end", "reason": "finished", "message": ""}}


def test_realtime_items_instructions_and_questions(server):
    def image(index: int) -> dict:
        uri = "data:image/png;base64," + base64.b64encode(picture(index)).decode()
        item = {"type": "message", "role": "user", "content": [{"type": "input_image", "image_url": uri}]}
        return {"type": "conversation.item.create", "item": item}

    async def send(socket, heard):
        await socket.send(json.dumps({"type": "session.update", "session": {"type": "realtime", "instructions": "Who plays?"}}))
        await socket.send(json.dumps(image(0)))
        await socket.send(json.dumps({"type": "response.create"}))
        while not any(e["type"] == "response.done" for e in heard):
            await asyncio.sleep(0.01)
        text = {"type": "input_text", "text": "What is the score?"}
        await socket.send(json.dumps({"type": "conversation.item.create", "item": {"type": "message", "role": "user", "content": [text]}}))
        await socket.send(json.dumps(image(1)))
        await socket.send(json.dumps({"type": "response.cancel", "event_id": "mine"}))
        await socket.send(json.dumps({"type": "response.dance"}))
        await socket.send("{")
        await socket.send(binary(9))
        await socket.send(binary(2))

    heard, code = asyncio.run(talk(server, send))
    assert code == 1000
    updated = next(e for e in heard if e["type"] == "session.updated")
    assert updated["session"]["instructions"] == "Who plays?"
    assert sum(e["type"] == "response.done" for e in heard) == 2
    assert [e["svlm"]["text"] for e in heard if e["type"] == "svlm" and e["svlm"]["type"] == "question"] == ["What is the score?"]
    errors = [e["error"] for e in heard if e["type"] == "error"]
    assert len(errors) == 4 and errors[0]["event_id"] == "mine" and "response.dance" in errors[1]["message"]
    assert sum(e["type"] == "conversation.item.added" for e in heard) == sum(e["type"] == "conversation.item.done" for e in heard) == 3


def test_realtime_closes_what_goes_too_far(server):
    async def large(socket, heard):
        await socket.send(binary(1, 0, bytes(5 << 20)))

    async def noisy(socket, heard):
        for _ in range(20):
            await socket.send("[]")

    async def fast(socket, heard):
        with contextlib.suppress(websockets.ConnectionClosed):
            for index in range(4000):
                await socket.send(binary(1, index / 1000, b"small"))

    assert [asyncio.run(talk(server, send))[1] for send in (large, noisy)] == [1009, 1008]
    server.calm()
    assert asyncio.run(talk(server, fast, "clock=live"))[1] == 1008


def test_openais_own_client_talks_to_it(server):
    async def talk():
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client.realtime.connect(model="tiny", extra_query={"clock": "file", "seed": "7"}) as connection:
            uri = "data:image/png;base64," + base64.b64encode(picture(7000)).decode()
            content = [{"type": "input_image", "image_url": uri}]
            await connection.conversation.item.create(item={"type": "message", "role": "user", "content": content})
            await connection.response.create()
            text = ""
            async for event in connection:
                if event.type == "response.output_text.delta":
                    text += event.delta
                elif event.type == "response.done":
                    return text

    first = server.captions(play(server, 7, 1))[0]
    assert asyncio.run(talk()) == first["text"]


# WebRTC


def offered(server: Server, offer: str, kind: str = "application/sdp", **query) -> httpx.Response:
    return server.http.post("/v1/whip", content=offer, headers={"Content-Type": kind}, params=query)


def test_offers_of_cameras_that_are_refused(server):
    if importlib.util.find_spec("aiortc") is None:
        answer = offered(server, "v=0")
        assert answer.status_code == 501 and "pip install 'svlm-jax[webrtc]'" in answer.json()["error"]["message"]
        return
    server.calm()
    assert offered(server, "{}", "application/json").status_code == 415
    assert offered(server, "v" * 100_000).status_code == 413
    assert offered(server, "").status_code == 400
    assert offered(server, "v=0", seed="x").status_code == 400
    answer = offered(server, "v=0")
    assert answer.status_code == 400 and "offer" in answer.json()["error"]["message"]
    assert offered(server, "v=0", resume="strm_0000000000000000").status_code == 404


def test_a_camera_over_webrtc(server):
    """An offer in, an answer out: a live stream as any other, kept and gone on with by another offer; it ends with its deletion."""
    pytest.importorskip("aiortc", reason="aiortc is not installed: pip install 'svlm-jax[webrtc]'")
    from camera import film

    server.calm()
    at: list[str] = []

    def answer(offer: str, **query) -> str:
        told = offered(server, offer, **query)
        assert told.status_code == 201 and told.headers["content-type"] == "application/sdp", told.text
        at.append(told.headers["location"])
        return told.text

    def seen(rounds: int) -> bool:
        return server.http.get(at[-1]).json()["rounds"] >= rounds

    assert film(lambda offer: answer(offer, name="phone"), lambda: seen(2)) == "connected"
    id = at[0].rpartition("/")[2]
    assert server.wait_for("stream.ended", stream=id)["reason"] == "finished"
    assert server.wait_for("stream.started", stream=id)["source"] == "webrtc"

    def kept_and_deleted() -> bool:
        if not seen(1):
            return False
        assert server.push(at[-1].rpartition("/")[2], picture(0)).status_code == 409
        assert server.http.post(f"{at[-1]}/snapshot").status_code == 201
        assert server.http.delete(at[-1]).json()["state"] == "ended"
        return True

    film(answer, kept_and_deleted)
    id = at[-1].rpartition("/")[2]
    assert server.http.post("/v1/streams", json={"resume": id}).status_code == 409
    before = server.status(id)["rounds"]
    film(lambda offer: answer(offer, resume=id), lambda: seen(before + 1))
    assert at[-1] == at[-2] and server.wait_for("stream.ended", stream=id, reason="finished")


# Chats and measurements


def test_chat(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    uri = "data:image/jpeg;base64," + base64.b64encode(picture(1, 56, 56, "JPEG")).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "What is <|im_end|> this?"}]
    messages = [{"role": "user", "content": content}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8)
    pieces = list(client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=8, stream=True))
    text = whole.choices[0].message.content
    assert text and text == "".join(piece.choices[0].delta.content or "" for piece in pieces)
    assert whole.usage.completion_tokens <= 8 and pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    for wrong in (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/a.jpg"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,AAAA"}}]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "/etc/passwd"}}]}],
        [{"role": "robot", "content": "hello"}],
        [],
    ):
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="tiny", messages=wrong)
        assert refused.value.status_code in (400, 403)


def as_uri(data, kind):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_chats_as_lmms_eval_sends_them(server):
    """The requests of its model `openai` (0.7.3): a video as frames in PNG, or as an address with a number of frames."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    settings = {"model": "tiny", "max_tokens": 4, "temperature": 0}

    def ask(*parts, **more):
        return client.chat.completions.create(messages=[{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], **settings, **more)

    def tokens(*parts, **more):
        return ask(*parts, **more).usage.prompt_tokens

    frames = [{"type": "image_url", "image_url": {"url": as_uri(picture(n, 84, 112, "PNG"), "image/png")}} for n in range(3)]
    clip = {"type": "video_url", "video_url": {"url": as_uri(sample_path().read_bytes(), "video/mp4")}}
    nothing = tokens(top_p=0.9, seed=1, presence_penalty=0, frequency_penalty=0.0, n=1, response_format={"type": "text"})
    assert tokens(*frames) - nothing == 3 * (3 * 4 + 2)  # a token for 28 x 28 pixels, and one before and after
    info = probe(sample_path())
    height, width = resized_size(info.height, info.width, min_pixels=9408, max_pixels=9408)
    four = tokens(clip, extra_body={"media_io_kwargs": {"video": {"num_frames": 4}}})
    assert four - nothing == 2 * (height // 28) * (width // 28) + 2  # two frames are one step
    for wrong in (
        {"presence_penalty": 0.5},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
        {"extra_body": {"media_io_kwargs": {"video": {"num_frames": 0}}}},
        {"extra_body": {"media_io_kwargs": {"video": {"fps": 2}}}},
        {"extra_body": {"media_io_kwargs": 8}},
    ):
        with pytest.raises(openai.BadRequestError):
            ask(**wrong)
    with pytest.raises(openai.PermissionDeniedError, match="allow-files"):
        ask({"type": "video_url", "video_url": {"url": "file:///etc/passwd"}})


def test_metrics(server, sample):
    families = {family.name: family for family in text_string_to_metric_families(server.http.get("/metrics").text)}
    values = {(s.name, *s.labels.values()): s.value for family in families.values() for s in family.samples}
    assert values["svlm_places",] == 3 and values["svlm_rounds_total",] >= 12
    assert values["svlm_captions_total", "segment"] + values.get(("svlm_captions_total", "silence"), 0) >= 12
    assert values["svlm_stage_seconds_count", "round"] == values["svlm_rounds_total",]
    assert 0 < values["svlm_cache_fill_ratio",] < 1


def test_the_log_has_a_line_for_every_event(server, sample):
    lines = [line for line in server.lines if line.get("stream") == sample[0]]
    assert [line["event"] for line in lines] == ["stream.started", "stream.ended"]
    assert lines[1]["rounds"] == 12 and lines[1]["reason"] == "finished"


def test_the_page_is_whole_and_asks_nobody_else(server):
    """Every file that it names is there, every element that its script looks for, and nothing comes from elsewhere."""
    answer = server.http.get("/")
    assert answer.status_code == 200 and "default-src 'self'" in answer.headers["content-security-policy"]
    named = set(re.findall(r'(?:src|href)="(/[^"]+)"', answer.text))
    scripts = [server.http.get("/page/main.js").text]
    named |= {f"/page/{name}" for name in re.findall(r'from "\./([^"]+)"', scripts[0])}
    for path in named:
        assert server.http.get(path).status_code == 200, path
    assert server.http.get("/sample.mp4").content == clip_path().read_bytes()
    assert {"/page/style.css", "/page/main.js", "/page/api.js", "/page/sources.js"} <= named
    ids = set(re.findall(r'id="([^"]+)"', answer.text))
    assert set(re.findall(r'\$\("([^"]+)"\)', scripts[0])) <= ids
    texts = [server.http.get(path).text for path in named if not path.endswith(".svg")]
    assert not [text for text in (*texts, answer.text) if re.search(r"(?:src|href|url|import|fetch)[^;\n]{0,20}https?://", text)]
    assert server.http.get("/page/..%2Fapp.py").status_code == 404


# Snapshots


def test_a_stream_goes_on_after_kill_9_as_if_nothing_had_happened(tmp_path, sample):
    """Written by one server, which is killed, and read by the next: the same words as in one go, and nothing told twice."""
    flags = ["--streams", "3", "--state", str(tmp_path)]
    first = Server(*flags).ready()
    id = first.open(source="sample", pace="real", duration=12)
    while first.status(id)["rounds"] < 4:
        time.sleep(0.02)
    assert first.http.post(f"/v1/streams/{id}/snapshot").json() == {"resume": id}
    assert first.stop(signal.SIGKILL) == -signal.SIGKILL
    (tmp_path / f".{id}-abcd.part").write_bytes(b"half")
    second = Server(*flags).ready()
    assert [path.name for path in tmp_path.iterdir()] == [f"{id}.svlm"]
    assert second.http.get("/v1/snapshots").json()["data"] == [{"resume": id}]
    assert second.open(resume=id) == id
    assert second.http.post("/v1/streams", json={"resume": id}).status_code == 409
    assert second.captions(id) == sample[1]
    numbers = [number for number, _, _ in second.events(id)]
    assert numbers == list(range(1, len(numbers) + 1))
    kept = (tmp_path / f"{id}.svlm").read_bytes()
    for data in (kept[:1000], kept[:-1] + bytes([kept[-1] ^ 1]), b""):
        assert second.http.post("/v1/snapshots", content=data).status_code == 400
    assert second.http.post("/v1/snapshots", content=kept).json() == {"resume": id}
    other = second.open(source="sample", pace="real")
    while second.status(other)["rounds"] < 1:
        time.sleep(0.02)
    heard = threading.Thread(target=lambda: ends.extend(second.events(other)))
    ends: list[tuple] = []
    heard.start()
    time.sleep(0.2)
    assert second.stop(signal.SIGTERM) == 0
    heard.join()
    assert ends[-1][1:] == ("end", {"type": "end", "reason": "drain", "message": "the server stops", "resume": other})
    assert (tmp_path / f"{other}.svlm").exists()
