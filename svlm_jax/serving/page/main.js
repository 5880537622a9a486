// The page: one selected stream on the stage, all of them on the wall.

import { download, json, listen, onMissingKey, picture, request, setKey } from "./api.js";
import { start } from "./sources.js";

const $ = (id) => document.getElementById(id);
const PAUSE = "M7 5h4v14H7zm6 0h4v14h-4z", PLAY = "M8 5v14l11-7z";
const KEPT_LINES = 2000;
const streams = new Map(); // id: what this page knows of a stream
let model = { fps: 2, width: 336, height: 252, chunk_seconds: 1, state_bytes: 0 };
let selected = null;
let ears = new AbortController();
let follow = true; // the transcript shows its newest line

const clock = (seconds) => {
  const whole = Math.max(0, Math.floor(seconds));
  return [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60].map((part) => String(part).padStart(2, "0")).join(":");
};
const bytes = (count) => (count >= 1 << 30 ? `${(count / (1 << 30)).toFixed(1)} GiB` : `${Math.round(count / (1 << 20))} MiB`);

// Streams

function known(id) {
  if (!streams.has(id)) streams.set(id, { id, lines: [], last: 0, words: "", lags: [], status: null });
  return streams.get(id);
}

/** Only the selected stream is listened to: browsers open few connections to one server. */
function listenTo(stream) {
  ears.abort();
  ears = new AbortController();
  if (!stream.ended) listen(stream.id, stream.last, (event, id) => hear(stream, event, id), ears.signal);
}

function hear(stream, event, id) {
  stream.last = id;
  stream.lines.push(event);
  if (stream.lines.length > KEPT_LINES) stream.lines.shift();
  if (event.type === "segment" || event.type === "silence") {
    stream.words = event.text;
    stream.until = event.end;
    if (stream.video && !stream.feeder) follow_clock(stream, event.end);
  }
  if (event.type === "end") stream.ended = true;
  if (stream === selected) {
    addLine(event);
    showCaption();
  }
  showTile(stream);
}

/** The sample plays here while the server reads its own copy: keep them together. */
function follow_clock(stream, seconds) {
  const video = stream.video;
  if (Math.abs(video.currentTime - seconds) > 1.25 * model.chunk_seconds) video.currentTime = seconds;
  if (video.paused && !video.ended && stream.status?.state !== "paused") video.play().catch(() => {});
}

async function begin(kind, wish = {}) {
  const opened = await start(kind, { ...wish, model });
  Object.assign(known(opened.id), opened);
  await refresh();
  select(opened.id);
}

function select(id) {
  selected = known(id);
  follow = true;
  $("screen").querySelectorAll("video").forEach((video) => video.remove());
  if (selected.video) {
    $("screen").prepend(selected.video);
    selected.video.setAttribute("aria-label", "The stream's video");
  }
  $("preview").hidden = Boolean(selected.video);
  $("preview").removeAttribute("src");
  $("empty").hidden = true;
  $("bug").hidden = false;
  $("lines").replaceChildren();
  selected.lines.forEach(addLine);
  $("downloads").replaceChildren(...["vtt", "srt", "jsonl"].map((suffix) => {
    const link = document.createElement("a");
    link.href = `/v1/streams/${id}/captions.${suffix}`;
    link.textContent = `.${suffix}`;
    link.setAttribute("aria-label", `Download captions as ${suffix}`);
    link.onclick = (event) => { event.preventDefault(); download(link.getAttribute("href"), `${id}.${suffix}`); };
    return link;
  }));
  showCaption();
  showStatus();
  for (const stream of streams.values()) showTile(stream);
  listenTo(selected);
}

// The stage

function showCaption() {
  const span = document.createElement("span");
  span.textContent = selected.words;
  $("caption").replaceChildren(...(selected.words ? [span] : []));
}

function addLine(event) {
  const words = {
    segment: () => event.text,
    silence: () => "…",
    question: () => `You asked: ${event.text}`,
    gap: () => (event.reason === "history" ? `${event.events} earlier events are no longer kept` : `${(event.end - event.start).toFixed(0)} s were skipped (${event.reason})`),
    state: () => (event.message ? `${event.state}: ${event.message}` : event.state),
    end: () => `The stream has ended (${event.message || event.reason})`,
  }[event.type];
  if (!words) return;
  const line = document.createElement("li"), time = document.createElement("time"), text = document.createElement("span");
  line.className = event.type === "end" ? "state" : event.type;
  time.textContent = event.start === undefined ? "" : clock(event.start);
  text.textContent = words();
  line.append(time, text);
  $("lines").append(line);
  while ($("lines").children.length > KEPT_LINES) $("lines").firstChild.remove();
  if (follow) $("lines").scrollTop = $("lines").scrollHeight;
  else $("latest").hidden = false;
}

function showStatus() {
  const s = selected?.status;
  const over = !s || s.state === "ended", paused = s?.state === "paused";
  for (const element of [$("pause"), $("stop"), $("question"), $("ask").querySelector("button")]) element.disabled = over;
  $("pause").setAttribute("aria-label", paused ? "Go on" : "Pause");
  $("pause-shape").setAttribute("d", paused ? PLAY : PAUSE);
  if (!s) return;
  $("bug").className = `bug ${s.state === "running" ? (s.clock === "live" ? "live" : "playing") : ""}`;
  $("bug-text").textContent = s.state === "running" ? (s.clock === "live" ? "live" : "playing") : s.state;
  $("bug-time").textContent = clock(s.position ?? 0);
  const lag = s.lag_seconds ?? s.round_seconds;
  $("lag-name").textContent = s.lag_seconds === null ? "Round" : "Lag";
  $("lag").textContent = lag === null ? "–" : lag < 1 ? `${Math.round(lag * 1000)} ms` : `${lag.toFixed(1)} s`;
  drawLags(selected.lags);
  $("fps").textContent = selected.rate === undefined ? "–" : `${selected.rate.toFixed(1)} fps`;
  const lost = s.frames.dropped + s.frames.broken;
  $("dropped").textContent = lost ? `${lost} lost` : "none lost";
  $("dropped").classList.toggle("bad", lost > 0);
  $("memory").textContent = bytes(model.state_bytes);
  $("fill").value = s.cache.tokens / s.cache.slots;
  $("fill").title = `${s.cache.tokens} of ${s.cache.slots} places in the cache`;
}

function drawLags(lags) {
  const most = Math.max(0.001, ...lags) * 1.15;
  const points = lags.map((lag, index) => `${(index / 29) * 60},${(18 - (lag / most) * 17).toFixed(1)}`);
  $("lag-line").firstElementChild.setAttribute("points", points.join(" "));
}

// The wall

function showTile(stream) {
  let tile = document.querySelector(`[data-stream="${stream.id}"]`);
  if (!tile) {
    const item = document.createElement("li");
    item.innerHTML = '<button type="button" class="tile"><div class="shot"><img alt=""><span class="tag"></span></div><div class="words"><strong></strong><p></p></div></button>';
    tile = item.firstChild;
    tile.dataset.stream = stream.id;
    tile.onclick = () => select(stream.id);
    $("tiles").append(item);
  }
  const s = stream.status;
  tile.classList.toggle("ended", s?.state === "ended");
  tile.setAttribute("aria-pressed", String(stream === selected));
  tile.querySelector(".tag").textContent = s ? (s.state === "running" ? (s.clock === "live" ? "● live" : "▶ playing") : s.state) : "…";
  tile.querySelector("strong").textContent = s?.name || stream.id;
  tile.querySelector("p").textContent = stream.words || "…";
}

async function showPicture(stream) {
  const url = await picture(`/v1/streams/${stream.id}/frame.jpg`);
  if (!url) return;
  const images = [document.querySelector(`[data-stream="${stream.id}"] img`)];
  if (stream === selected && !stream.video) {
    $("preview").hidden = false;
    images.push($("preview"));
  }
  for (const image of images) if (image) image.src = url;
  if (stream.url) setTimeout(URL.revokeObjectURL, 3000, stream.url);
  stream.url = url;
}

// What the server says, once a second

async function refresh() {
  const listed = (await json("/v1/streams")).data, now = performance.now();
  for (const status of listed) {
    const stream = known(status.id), before = stream.status;
    if (before && stream.at && now - stream.at > 400) {
      const rate = (status.frames.received - before.frames.received) / ((now - stream.at) / 1000);
      stream.rate = stream.rate === undefined ? rate : 0.6 * stream.rate + 0.4 * rate;
    }
    const lag = status.lag_seconds ?? status.round_seconds;
    if (lag !== null && status.rounds !== before?.rounds) stream.lags = [...stream.lags, lag].slice(-30);
    Object.assign(stream, { status, at: now });
    if (stream !== selected) stream.words = status.text;
    showTile(stream);
    if (status.rounds && status.rounds !== before?.rounds) showPicture(stream);
  }
  for (const [id, stream] of streams) {
    if (!listed.some((status) => status.id === id)) {
      if (stream === selected) ears.abort();
      streams.delete(id);
      document.querySelector(`[data-stream="${id}"]`)?.parentElement.remove();
    }
  }
  const alive = listed.filter((status) => status.state !== "ended").length;
  $("places").textContent = `${alive} of ${model.places ?? "?"} places taken`;
  if (!selected && listed.length) select(listed[listed.length - 1].id);
  showStatus();
}

async function look() {
  const pill = $("server-state");
  try {
    const ready = (await fetch("/ready")).ok;
    pill.textContent = ready ? "ready" : "loading";
    pill.className = `pill ${ready ? "ready" : ""}`;
    if (!model.known) {
      const about = (await json("/v1/models")).data[0];
      model = { ...model, ...about.svlm, known: ready }; // sizes are known once it is loaded
      $("model").textContent = `${about.id} · ${model.width}×${model.height} at ${model.fps} fps · remembers ${model.vision_window} rounds of ${model.chunk_seconds} s`;
      $("notice").hidden = !model.random_weights;
      $("notice").textContent = "This model has random weights: its words mean nothing. Start the server with --model for one that has learnt.";
    }
    await refresh();
  } catch (error) {
    pill.textContent = error.status === 401 ? "needs a key" : "no connection";
    pill.className = "pill failed";
  }
  setTimeout(look, 1000);
}

// What people do

async function togglePause() {
  if (!selected || $("pause").disabled) return;
  const paused = selected.status.state !== "paused";
  selected.feeder?.pause(paused);
  if (selected.video && !selected.feeder) { if (paused) selected.video.pause(); }
  selected.status = await json(`/v1/streams/${selected.id}/${paused ? "pause" : "resume"}`, { method: "POST" });
  showStatus();
}

async function stop() {
  if (!selected) return;
  selected.feeder?.close();
  selected.video?.pause();
  await request(`/v1/streams/${selected.id}`, { method: "DELETE" });
  await refresh();
}

function openAdd() {
  $("add-error").textContent = "";
  showFields();
  $("add").showModal();
}

function showFields() {
  const kind = new FormData($("add-form")).get("kind");
  for (const field of document.querySelectorAll("[data-for]")) field.hidden = field.dataset.for !== kind;
}

$("add-button").onclick = $("add-link").onclick = openAdd;
$("add-cancel").onclick = () => $("add").close();
$("add-form").onchange = showFields;
$("add-form").onsubmit = async (event) => {
  event.preventDefault();
  $("add-start").disabled = true;
  $("add-error").textContent = "";
  try {
    const kind = new FormData($("add-form")).get("kind");
    await begin(kind, { file: $("file").files[0], url: $("url").value.trim(), query: $("query").value.trim() });
    $("add").close();
    $("stage").focus();
  } catch (error) {
    $("add-error").textContent = error.message;
  } finally {
    $("add-start").disabled = false;
  }
};
document.querySelector("[data-start=sample]").onclick = () => begin("sample").catch((error) => { $("empty").querySelector("p").textContent = error.message; });
$("pause").onclick = togglePause;
$("stop").onclick = stop;
$("ask").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("question").value.trim();
  if (!text || !selected) return;
  try {
    await request(`/v1/streams/${selected.id}/questions`, { method: "POST", json: { text } });
    $("question").value = "";
    $("question").setCustomValidity("");
  } catch (error) {
    $("question").setCustomValidity(error.message);
    $("question").reportValidity();
  }
};
$("question").oninput = () => $("question").setCustomValidity("");
$("lines").onscroll = () => {
  const lines = $("lines");
  follow = lines.scrollHeight - lines.scrollTop - lines.clientHeight < 40;
  if (follow) $("latest").hidden = true;
};
$("latest").onclick = () => { follow = true; $("lines").scrollTop = $("lines").scrollHeight; };
$("key-button").onclick = () => $("key").showModal();
$("key").onclose = () => setKey($("key-value").value.trim());
onMissingKey(() => { $("key-button").hidden = false; if (!$("key").open) $("key").showModal(); });
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, textarea, dialog") || event.ctrlKey || event.metaKey || event.altKey) return;
  const tiles = document.querySelectorAll(".tile");
  if (event.key === " " && !event.target.closest("button, a")) { event.preventDefault(); togglePause(); }
  else if (event.key === "/") { event.preventDefault(); $("question").focus(); }
  else if (event.key === "n" || event.key === "N") { event.preventDefault(); openAdd(); }
  else if (event.key >= "1" && event.key <= "9" && tiles[event.key - 1]) select(tiles[event.key - 1].dataset.stream);
});

look();
