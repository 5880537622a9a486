"""The page in a browser: what a person does there, and what comes of it."""

import json

import pytest
import webvtt
from browser import Browser, chromium
from server import Server

pytestmark = pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
LINES = "[...document.querySelectorAll('#lines li')].map((line) => [line.className, line.querySelector('span').textContent])"


@pytest.fixture(scope="module")
def server():
    server = Server("--streams", "3")
    try:
        yield server.ready()
    finally:
        code = server.stop()
    assert code == 0 and not server.errors


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path)
    yield browser
    browser.close()


def test_sample_question_answer_and_downloads(server, browser):
    browser.open(server.url)
    browser.until("document.querySelector('#server-state')?.textContent === 'ready'")
    browser.until("document.querySelector('#notice').textContent.includes('random weights')")
    browser.click("[data-start=sample]")

    # Captions lie over the video, which plays
    browser.until("document.querySelector('#screen video')?.currentTime > 0")
    browser.until("document.querySelector('#caption span')?.textContent")
    inside = """(() => { const [c, s] = ['#caption span', '#screen'].map((name) => document.querySelector(name).getBoundingClientRect());
        return c.width > 0 && c.left >= s.left && c.right <= s.right && c.top >= s.top && c.bottom <= s.bottom; })()"""
    assert browser.run(inside)

    # A question in mid-stream, by keyboard alone
    browser.press("/")
    browser.until("document.activeElement.id === 'question'")
    browser.type("Who has the ball?")
    browser.press("Enter", 13)
    browser.until(f"{LINES}.some(([kind]) => kind === 'question')")
    browser.until(f"(() => {{ const kinds = {LINES}.map(([kind]) => kind); return kinds.slice(kinds.indexOf('question')).includes('segment'); }})()")
    assert browser.run("document.querySelector('#question').value") == ""

    # To the end, which is put here: the transcript is what the server said
    browser.click("#stop")
    browser.until(f"{LINES}.at(-1)[1].startsWith('The stream has ended')")
    id = browser.run("document.querySelector('#downloads a').getAttribute('href').split('/')[3]")
    events = [(name, data) for _, name, data in server.events(id)]
    told = [[data["type"], data.get("text") or "…"] for name, data in events if name == "message"]
    shown = browser.run(LINES)
    assert [line for line in shown if line[0] in ("segment", "silence")] == told
    assert ["question", "You asked: Who has the ball?"] in shown
    kinds = [data["type"] for _, data in events]
    asked = kinds.index("question")
    answer = next(data["text"] for _, data in events[asked:] if data["type"] == "segment")
    assert answer in [text for _, text in shown]

    # Caption files
    for suffix in ("vtt", "jsonl"):
        browser.click(f"#downloads a[href$='.{suffix}']")
    words = [text for kind, text in told if kind == "segment"]
    assert [cue.text for cue in webvtt.WebVTT.from_string(browser.downloaded(f"{id}.vtt"))] == words
    lines = [json.loads(line) for line in browser.downloaded(f"{id}.jsonl").splitlines()]
    assert [line["text"] for line in lines if line["type"] == "segment"] == words
    assert not browser.problems


def test_several_streams_and_a_phone(server, browser):
    browser.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
    browser.open(server.url)
    browser.until("document.querySelector('#server-state')?.textContent === 'ready'")
    before = len(server.http.get("/v1/streams").json()["data"])  # the page shows those too, a moment later
    browser.until(f"document.querySelectorAll('[data-stream]').length === {before}")
    for count in (1, 2):
        browser.click("#add-button")
        browser.click("#add-start")
        browser.until(f"document.querySelectorAll('[data-stream]').length === {before + count} && !document.querySelector('#add').open")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")  # nothing runs off the side
    chosen = "document.querySelector('#downloads a').getAttribute('href')"
    now = browser.until(chosen)
    ids = browser.run("[...document.querySelectorAll('[data-stream]')].map((tile) => tile.dataset.stream)")
    other = next(id for id in ids if id not in now and server.status(id)["state"] == "running")
    browser.click(f"[data-stream='{other}']")
    browser.until(f"{chosen}.includes('{other}')")
    browser.click("#stop")
    browser.until(f"{LINES}.at(-1)?.[1].startsWith('The stream has ended')")
    assert server.status(other)["state"] == "ended"
    assert not browser.problems


def test_a_camera_is_commented_until_it_is_let_go(server, browser):
    server.calm()
    browser.open(server.url)
    browser.until("document.querySelector('#server-state')?.textContent === 'ready'")
    browser.click("#add-button")
    browser.click("label:has([value=camera])")
    browser.click("#add-start")
    browser.until("!document.querySelector('#add').open")
    id = browser.until("document.querySelector('#downloads a')?.getAttribute('href').split('/')[3]")
    browser.until(f"{LINES}.filter(([kind]) => kind === 'segment' || kind === 'silence').length >= 3")
    status = server.status(id)
    assert status["state"] == "running" and status["clock"] == "live" and status["rounds"] >= 3
    assert browser.run("document.querySelector('#screen video').srcObject.getVideoTracks()[0].readyState") == "live"
    browser.click("#stop")
    browser.until(f"{LINES}.at(-1)?.[1].startsWith('The stream has ended')")
    tracks = "document.querySelector('#screen video')?.srcObject?.getTracks()"
    browser.until(f"{tracks}?.every((track) => track.readyState === 'ended') ?? true")  # its light goes out
    assert server.status(id)["state"] == "ended" and not browser.problems
