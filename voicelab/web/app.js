// The voice-search page: push to talk or hands-free. Words appear while somebody speaks (/vosk); then a WAV file goes to /v1/search, and results come back.
import { Ear } from "./ear.js";

const $ = (id) => document.getElementById(id);
const LONGEST = 30;          // seconds; then the recording ends by itself
const SHORTEST = 0.25;       // seconds; less is a slip of the finger
const SILENCE = 0.004;       // a peak below this is no speech: it is not sent
const TAP = 350;             // milliseconds; a shorter press is a tap, which starts and a second one stops
const BEFORE = 0.6;          // seconds of sound kept from before speech was noticed, hands-free: a first "s" has no pitch

const visit = crypto.randomUUID ? crypto.randomUUID() : String(Math.random()).slice(2);   // names this visit, so that it can be erased
let take = null;             // the recording that is running
let lastClip = null;         // the clip that a "Try again" sends
let answered = null;         // the last answer
let sending = false;
let handsFree = false;

// ---- recording

async function recorder(rate) {
  const context = new AudioContext(rate ? { sampleRate: rate } : {});
  await context.audioWorklet.addModule("recorder.js");
  return context;
}

async function openMicrophone() {
  if (!navigator.mediaDevices?.getUserMedia) throw new DOMException("", "InsecureContext");
  let context = await recorder(16000);                              // before the microphone is open, so that no first word is lost
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: true, noiseSuppression: false, autoGainControl: true } });
    try {
      context.createMediaStreamSource(stream);                      // some browsers refuse another rate than the microphone's
    } catch {
      await context.close();
      context = await recorder();
    }
    await context.resume();
    return { stream, context };
  } catch (e) {
    stream?.getTracks().forEach((t) => t.stop());
    if (context.state !== "closed") context.close();
    throw e;
  }
}

async function start() {
  if (take || sending) return;
  const mine = take = { pieces: [], samples: 0, peak: 0, stopped: false, ear: handsFree ? new Ear() : null };
  tell();
  show("waiting", "Waiting for the microphone …");
  try {
    Object.assign(mine, await openMicrophone());
  } catch (e) {
    if (take === mine) take = null;
    show("idle", "Ready");
    return tell(microphoneProblem(e));
  }
  if (mine.stopped) { close(mine); if (take === mine) take = null; return show("idle", "Ready"); }
  const node = new AudioWorkletNode(mine.context, "recorder");
  node.port.onmessage = ({ data }) => {
    if (mine.stopped) return;
    let peak = 0;
    for (const s of data) peak = Math.max(peak, Math.abs(s));
    meter(peak);
    if (mine.ear) return listen(mine, data, mine.ear.hear(data, mine.context.sampleRate));
    keep(mine, data, peak);
    if (mine.samples > LONGEST * mine.context.sampleRate) stop();
  };
  mine.context.createMediaStreamSource(mine.stream).connect(node);
  show("recording", mine.ear ? "Speak when you like …" : "Listening …");
}

function keep(t, data, peak) {
  t.pieces.push(data);
  t.samples += data.length;
  t.peak = Math.max(t.peak, peak);
  if (t.peak >= SILENCE && !t.live) t.live = new Live(t.context.sampleRate, t.pieces);       // silence stays here
  else t.live?.send(data);
}

// ---- hands-free: the page itself decides when somebody speaks (ear.js), so that silence and noise never leave the device

function listen(t, data, what) {
  if (sending) t.ear.forget();                                                          // one query at a time
  if (sending || what === "silence") {
    t.pieces.push(data);
    t.samples += data.length;
    while (t.samples - t.pieces[0].length > BEFORE * t.context.sampleRate) t.samples -= t.pieces.shift().length;
    return;
  }
  if (what === "began") show("recording", "Listening …");
  keep(t, data, 1);
  if (what !== "ended" && t.samples < LONGEST * t.context.sampleRate) return;
  lastClip = wav(t.pieces, t.samples, t.context.sampleRate);
  t.live?.close();
  Object.assign(t, { pieces: [], samples: 0, peak: 0, live: null });
  t.ear.forget();
  send(lastClip);
}

// ---- words while somebody speaks; the search does not depend on them

class Live {
  constructor(rate, pieces) {
    this.waiting = [...pieces];
    this.said = [];
    const key = sessionStorage.getItem("key");
    try { this.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/vosk`, key ? ["realtime", `openai-insecure-api-key.${key}`] : []); } catch { return; }
    this.socket.onopen = () => {
      this.socket.send(JSON.stringify({ config: { sample_rate: Math.round(rate), words: false } }));
      for (const piece of this.waiting.splice(0)) this.send(piece);
    };
    this.socket.onmessage = ({ data }) => {
      const heard = JSON.parse(data);
      if (heard.text) this.said.push(heard.text);
      if (!heard.error) $("partial").textContent = [...this.said, heard.partial ?? ""].join(" ").trim();
    };
  }
  send(data) {
    if (this.socket?.readyState === WebSocket.CONNECTING) return void this.waiting.push(data);
    if (this.socket?.readyState === WebSocket.OPEN) this.socket.send(Int16Array.from(data, (s) => Math.max(-1, Math.min(1, s)) * 32767));
  }
  close() { if (this.socket) { this.socket.onmessage = this.socket.onopen = null; this.socket.close(); } }
}

function close(t) {
  t.live?.close();
  t.stream?.getTracks().forEach((track) => track.stop());
  t.context?.close();
  meter(0);
}

function stop(cancel = false) {
  const t = take;
  if (!t || t.stopped) return;
  t.stopped = true;
  if (!t.context) return;                        // still opening: `start` sees `stopped`
  take = null;
  close(t);
  const seconds = t.samples / t.context.sampleRate;
  if (cancel) return show("idle", "Cancelled");
  if (t.ear && !t.ear.speaking) return show("idle", "Ready");
  if (seconds < SHORTEST) return show("idle", "That was too short. Hold the button while you speak.");
  if (t.peak < SILENCE) return show("idle", "I heard nothing, so nothing was sent.");
  lastClip = wav(t.pieces, t.samples, t.context.sampleRate);
  send(lastClip);
}

function wav(pieces, n, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * n));
  const text = (at, s) => [...s].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * n, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * n, true);
  let at = 44;
  for (const piece of pieces) for (const s of piece) { view.setInt16(at, Math.max(-1, Math.min(1, s)) * 32767, true); at += 2; }
  return new Blob([view], { type: "audio/wav" });
}

// ---- sending

const withKey = (headers = {}) => { const key = sessionStorage.getItem("key"); return key ? { ...headers, Authorization: `Bearer ${key}` } : headers; };
const scopes = () => [...document.querySelectorAll(".consent input:checked")].map((b) => b.value);

async function send(clip, tries = 0) {
  sending = true;
  tell();
  show("thinking", "Recognising …");
  const body = new FormData();
  body.append("file", clip, "speech.wav");
  const consent = scopes();
  const headers = consent.length ? { "X-Voicelab-Consent": consent.join(","), "X-Voicelab-Subject": visit, "X-Voicelab-Device": matchMedia("(pointer: coarse)").matches ? "touch" : "desktop" } : {};
  try {
    const response = await fetch("/v1/search", { method: "POST", body, headers: withKey(headers) });
    if (response.status === 401) return askForKey();
    if (response.status === 503 || response.status === 429) return await busy(response, clip, tries);
    const answer = await response.json().catch(() => null);
    if (!response.ok) return fail(answer?.error?.message ? `The server refused this: ${answer.error.message}.` : `The server failed (${response.status}).`);
    sending = false;
    render(answer);
    if (take) show("recording", "Speak when you like …"); else show("idle", "Ready");
  } catch {
    fail("The server cannot be reached. Is it running?");
  }
}

async function busy(response, clip, tries) {
  const seconds = Number(response.headers.get("Retry-After")) || 1;
  if (tries >= 3) return fail("The server is busy with other people. Please try again in a moment.");
  for (let s = seconds; s > 0; s--) {
    show("thinking", `The server is busy. Trying again in ${s} s …`);
    await new Promise((done) => setTimeout(done, 1000));
  }
  return send(clip, tries + 1);
}

function askForKey() {
  fail(sessionStorage.getItem("key") ? "The server did not accept this API key." : "This server asks for an API key.");
  $("key").hidden = false;
  $("key-text").focus();
}

function fail(message) {
  sending = false;
  if (take) stop(true);
  show("idle", "Ready");
  tell(message, true);
}

// ---- what the page shows

function show(state, text) {
  document.body.dataset.state = state;
  $("talk").setAttribute("aria-pressed", String(state === "recording"));
  $("status").textContent = text;
  if (state !== "recording" || text !== "Listening …") $("partial").textContent = "";
}

function meter(peak) {
  const level = peak > 0 ? Math.max(0, Math.min(1, 1 + Math.log10(peak + 1e-6) / 2.5)) : 0;
  $("level").style.setProperty("--level", level.toFixed(3));
  $("talk").style.setProperty("--level", level.toFixed(3));
}

function tell(message = "", again = false) {
  $("problem").hidden = !message;
  $("problem-text").textContent = message;
  $("again").hidden = !again;
}

function microphoneProblem(e) {
  return {
    NotAllowedError: "The microphone is blocked. Allow it for this page in the browser's address bar, then press the button again.",
    NotFoundError: "No microphone was found. Plug one in, then press the button again.",
    NotReadableError: "Another program is using the microphone. Close it, then press the button again.",
    InsecureContext: "The browser gives a page the microphone only over HTTPS or on this computer's own address (localhost).",
  }[e.name] ?? `The microphone could not be opened (${e.name}).`;
}

function element(tag, text, className) {
  const e = document.createElement(tag);
  e.textContent = text;
  if (className) e.className = className;
  return e;
}

function render(answer) {
  answered = answer;
  $("answer").hidden = false;
  const words = answer.words.map((w) => {
    const e = element("span", w.word, `w c${Math.min(4, Math.floor(w.confidence * 5))}`);
    e.title = `${Math.round(w.confidence * 100)} % sure`;
    return e;
  });
  $("transcript").replaceChildren(...(words.length ? words.flatMap((w, i) => (i ? [" ", w] : [w])) : [element("em", "no words")]));
  const kept = { metrics: "measurements", transcript: "the words", audio: "the recording" }[answer.logged];
  $("kept").textContent = answer.logged === "none" ? (scopes().length ? "Not kept: the log could not be written" : "Nothing was kept") : `Kept: ${kept}`;
  if (answer.logged !== "none") $("forget").hidden = false;
  $("feedback").hidden = false;
  $("correct").hidden = true;
  $("thanks").textContent = "";
  $("found").textContent = answer.results.length ? (answer.results.length === 1 ? "1 result" : `${answer.results.length} results`) : "Nothing was found for this";
  $("results").replaceChildren(...answer.results.map(result));
}

function result(r) {
  const item = document.createElement("li");
  const link = element("a", r.title);
  if (/^(https?:|\/|#)/.test(r.url)) link.href = r.url;
  link.rel = "noopener noreferrer";
  item.append(link, element("span", r.url.replace(/^https?:\/\//, ""), "url"), element("p", r.snippet));
  return item;
}

// ---- was this right?

async function judge(correct, correction = null) {
  $("feedback").hidden = $("correct").hidden = true;
  try {
    const response = await fetch("/v1/feedback", { method: "POST", headers: withKey({ "Content-Type": "application/json" }), body: JSON.stringify({ request_id: answered.request_id, correct, correction }) });
    if (!response.ok) throw new Error();
    const { logged } = await response.json();
    $("thanks").textContent = logged === "none" ? "Thank you. Nothing of this search was kept, so neither is your answer."
      : correction && logged !== "transcript" ? "Thank you. Your answer was kept, without the words: you did not allow those." : "Thank you. Your answer was kept.";
  } catch { $("thanks").textContent = "Your answer could not be sent."; }
}

async function forget() {
  try {
    const response = await fetch(`/v1/subjects/${encodeURIComponent(visit)}`, { method: "DELETE", headers: withKey() });
    if (!response.ok) throw new Error();
    const gone = await response.json();
    $("consent-state").textContent = `Deleted: ${gone.rows === 1 ? "1 search" : `${gone.rows} searches`}, ${gone.audio === 1 ? "1 recording" : `${gone.audio} recordings`}.`;
    $("kept").textContent = "Deleted";
    $("forget").hidden = true;
  } catch { $("consent-state").textContent = "That could not be deleted now. Please try again."; }
}

function consentChanged() {
  const names = scopes().map((s) => ({ metrics: "measurements", transcript: "the words", audio: "your voice", training: "for learning" }[s]));
  $("consent-state").textContent = names.length ? `From the next search on: ${names.join(", ")}.` : "Nothing. Your recording is turned into words, answered, and forgotten.";
}

// ---- hands and keys

let pressed = 0;
const button = $("talk");
function press() {
  if (take) { stop(); pressed = 0; } else { pressed = performance.now(); start(); }
}
function release() {
  if (pressed && performance.now() - pressed > TAP && !handsFree) stop();
  pressed = 0;
}
button.addEventListener("pointerdown", (e) => { if (e.button === 0) { button.setPointerCapture(e.pointerId); press(); } });
button.addEventListener("pointerup", release);
button.addEventListener("pointercancel", release);
button.addEventListener("contextmenu", (e) => e.preventDefault());
const elsewhere = (e) => e.target !== button && e.target.closest?.("input, button, a, textarea, select, summary");
document.addEventListener("keydown", (e) => {
  if (e.key === "Escape") { stop(true); pressed = 0; }
  if ((e.key === " " || (e.key === "Enter" && e.target === button)) && !elsewhere(e)) { e.preventDefault(); if (!e.repeat) press(); }
});
document.addEventListener("keyup", (e) => { if (e.key === " " && !elsewhere(e)) { e.preventDefault(); release(); } });
window.addEventListener("blur", () => { if (pressed) release(); });

$("handsfree").addEventListener("change", (e) => { handsFree = e.target.checked; if (take) stop(true); if (handsFree) start(); });
$("again").addEventListener("click", () => lastClip && send(lastClip));
$("right").addEventListener("click", () => judge(true));
$("wrong").addEventListener("click", () => { $("feedback").hidden = true; $("correct").hidden = false; $("correction").value = answered.text; $("correction").focus(); });
$("correct").addEventListener("submit", (e) => { e.preventDefault(); judge(false, $("correction").value.trim() || null); });
$("forget").addEventListener("click", forget);
$("key").addEventListener("submit", (e) => {
  e.preventDefault();
  sessionStorage.setItem("key", $("key-text").value.trim());                  // for as long as this tab is open
  $("key").hidden = true;
  if (lastClip) send(lastClip);
});
$("handsfree").checked = false;
document.querySelectorAll(".consent input").forEach((box) => { box.checked = false; box.addEventListener("change", consentChanged); });

show("idle", "Ready");
fetch("/v1/models", { headers: withKey() }).then((r) => r.json()).then((m) => { $("model").textContent = `Model ${m.data[0].version}`; }).catch(() => {});
