// The server's interface: requests with the key, and server-sent events that can carry one.

let key = sessionStorage.getItem("svlm-key") || "";
let askForKey = () => {};

export function onMissingKey(callback) { askForKey = callback; }
export function setKey(value) { key = value; sessionStorage.setItem("svlm-key", value); }

function headers(more = {}) { return key ? { Authorization: `Bearer ${key}`, ...more } : more; }

/** The answer to a request; an Error with the server's own words where it refuses. */
export async function request(path, { method = "GET", json, body, signal } = {}) {
  const sent = json === undefined ? { headers: headers(), body } : { headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(json) };
  const answer = await fetch(path, { method, signal, ...sent });
  if (answer.status === 401) askForKey();
  if (!answer.ok) {
    const told = await answer.json().catch(() => null);
    const error = new Error(told?.error?.message || `${answer.status} ${answer.statusText}`);
    error.status = answer.status;
    throw error;
  }
  return answer;
}

export async function json(path, options) { return (await request(path, options)).json(); }

/** An image behind the key, as an object URL; null where there is none yet. */
export async function picture(path) {
  try { return URL.createObjectURL(await (await request(path)).blob()); } catch { return null; }
}

/** Reads a stream's events behind number `last`, comes back by itself after a break, and ends with the stream. */
export async function listen(id, last, tell, signal) {
  while (!signal.aborted) {
    try {
      const resume = last ? `?last_event_id=${last}` : "";
      const answer = await request(`/v1/streams/${id}/captions${resume}`, { signal });
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        text += value;
        const events = text.split("\n\n");
        text = events.pop();
        for (const event of events) {
          const fields = Object.fromEntries(event.split("\n").map((line) => [line.slice(0, line.indexOf(":")), line.slice(line.indexOf(":") + 2)]));
          if (fields.id) last = Number(fields.id);
          if (!fields.data) continue;
          const data = JSON.parse(fields.data);
          tell(data, last);
          if (data.type === "end") return;
        }
      }
    } catch (error) {
      if (signal.aborted || [401, 403, 404].includes(error.status)) return;
    }
    await new Promise((resolve) => setTimeout(resolve, 1500));
  }
}

/** Saves a file that needs the key to be fetched. */
export async function download(path, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await (await request(path)).blob());
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}
