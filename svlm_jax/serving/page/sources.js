// What this browser can send: a local file or its camera, as JPEG frames at the rate that the model looks at.

import { json, request } from "./api.js";

/** A stream that this browser feeds. `video` is what is shown, already playing. */
class Feeder {
  constructor(id, video, { live, fps, width, height }) {
    Object.assign(this, { id, video, live, fps });
    const scale = Math.min(1, width / video.videoWidth, height / video.videoHeight);
    this.canvas = document.createElement("canvas");
    this.canvas.width = Math.max(28, Math.round(video.videoWidth * scale));
    this.canvas.height = Math.max(28, Math.round(video.videoHeight * scale));
    this.sent = -1;
    this.busy = false;
    this.timer = setInterval(() => this.send(), 1000 / (2 * fps));
    if (!live) video.addEventListener("ended", () => this.finish());
  }

  async send() {
    if (this.busy || (!this.live && (this.video.paused || this.video.currentTime <= this.sent))) return;
    this.busy = true;
    try {
      const at = this.video.currentTime;
      this.canvas.getContext("2d").drawImage(this.video, 0, 0, this.canvas.width, this.canvas.height);
      const blob = await new Promise((resolve) => this.canvas.toBlob(resolve, "image/jpeg", 0.85));
      await request(`/v1/streams/${this.id}/frames${this.live ? "" : `?t=${at}`}`, { method: "POST", body: blob });
      this.sent = at;
    } catch (error) {
      if ([400, 404, 409].includes(error.status)) this.close();
    } finally {
      this.busy = false;
    }
  }

  async finish() {
    clearInterval(this.timer);
    while (this.busy) await new Promise((resolve) => setTimeout(resolve, 20));
    await request(`/v1/streams/${this.id}/frames?last=1`, { method: "POST" }).catch(() => {});
  }

  pause(paused) {
    if (this.live) return;
    if (paused) this.video.pause(); else this.video.play();
  }

  close() {
    clearInterval(this.timer);
    release(this.video);
  }
}

/** Lets go of the camera. */
function release(video) {
  video.pause();
  for (const track of video.srcObject?.getTracks?.() ?? []) track.stop();
}

function player() {
  const video = document.createElement("video");
  Object.assign(video, { muted: true, playsInline: true });
  return video;
}

async function shown(video) {
  await new Promise((resolve, reject) => {
    video.onloadeddata = resolve;
    video.onerror = () => reject(new Error("this browser cannot play the file"));
  });
  return video;
}

/** Starts a stream of that kind; gives its id and, where this browser feeds or plays it, the video and its feeder. */
export async function start(kind, { file, url, query, model }) {
  const wish = query ? { query } : {};
  const post = (more) => json("/v1/streams", { method: "POST", json: { ...wish, ...more } });
  if (kind === "sample") {
    const video = player();
    video.src = "/sample.mp4";
    const { id } = await post({ source: "sample", pace: "real" });
    return { id, video };
  }
  if (kind === "url") return { id: (await post({ source: url, pace: "real" })).id };
  const video = player();
  if (kind === "camera") {
    if (!navigator.mediaDevices) throw new Error("browsers give cameras to pages at https:// addresses and localhost alone");
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } } });
  } else {
    if (!file) throw new Error("choose a file first");
    video.src = URL.createObjectURL(file);
  }
  await shown(video);
  const live = kind === "camera";
  try {
    const { id } = await post({ source: "push", clock: live ? "live" : "file", name: live ? "camera" : file.name.slice(0, 100) });
    await video.play();
    return { id, video, feeder: new Feeder(id, video, { live, ...model }) };
  } catch (error) {
    release(video);
    throw error;
  }
}
