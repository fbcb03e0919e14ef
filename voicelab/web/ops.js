// The operations page: the server's own counters, and the newest monitoring report.
const $ = (id) => document.getElementById(id);
function row(...cells) {
  const tr = document.createElement("tr");
  for (const c of cells) tr.insertCell().textContent = c;
  return tr;
}
function card(value, name) {
  const div = document.createElement("div"), b = document.createElement("b"), span = document.createElement("span");
  div.className = "card"; b.textContent = value; span.textContent = name;
  div.append(b, span);
  return div;
}
function parse(text) {      // Prometheus text: [{name, labels, value}]
  return [...text.matchAll(/^(\w+)(?:\{(.*?)\})? (\S+)$/gm)].map(([, name, labels, value]) => ({ name, value: Number(value),
    labels: Object.fromEntries([...(labels ?? "").matchAll(/(\w+)="(.*?)"/g)].map(([, k, v]) => [k, v])) }));
}
const flat = (o, path = "") => Object.entries(o ?? {}).flatMap(([k, v]) => v !== null && typeof v === "object" && !Array.isArray(v) ? flat(v, `${path}${k}.`) : [[path + k, v]]);
const plain = (v) => typeof v === "number" ? String(Math.round(v * 1e4) / 1e4) : typeof v === "string" ? v : JSON.stringify(v);

class Locked extends Error {}
async function get(path) {
  const key = sessionStorage.getItem("key"), response = await fetch(path, { headers: key ? { Authorization: `Bearer ${key}` } : {} });
  if (response.status === 401 || response.status === 403) throw new Locked();
  return response;
}
async function refresh() {
  try {
    const [ready, text] = await Promise.all([get("readyz").then((r) => r.json()), get("metrics").then((r) => r.text())]);
    const metrics = parse(text);
    const sum = (name, where = {}) => metrics.filter((m) => m.name === name && Object.entries(where).every(([k, v]) => m.labels[k] === v)).reduce((s, m) => s + m.value, 0);
    const n = sum("voicelab_request_seconds_count"), audio = sum("voicelab_audio_seconds_total");
    $("live").replaceChildren(card(ready.model, ready.problem ? "model; a newer one was refused" : "model in use"), card(n, "speech and log requests"),
      card(n ? `${Math.round(1000 * sum("voicelab_request_seconds_sum") / n)} ms` : "–", "mean time to answer"),
      card(audio ? (sum("voicelab_recognise_seconds_total") / audio).toFixed(3) : "–", "real-time factor"),
      card(sum("voicelab_rejects_total"), "refused because busy"), card(sum("voicelab_log_failures_total"), "not logged though allowed"), card(sum("voicelab_requests_inside"), "inside now"));
    $("requests").replaceChildren(...metrics.filter((m) => m.name === "voicelab_requests_total").map((m) => row(m.labels.endpoint, m.labels.status, m.value)));
    $("problem").hidden = true;
  } catch (e) {
    $("problem").textContent = e instanceof Locked ? "This page needs an API key with the scope admin." : "The server cannot be reached.";
    $("problem").hidden = false;
    $("key").hidden = !(e instanceof Locked);
  }
}
async function report() {
  const { window, report } = await get("v1/monitor").then((r) => r.json()).catch(() => ({}));
  if (!report) return;
  $("window").textContent = window;
  $("report").replaceChildren(...flat(report).slice(0, 200).map(([k, v]) => row(k, plain(v).slice(0, 400))));
}
$("key").addEventListener("submit", (e) => {
  e.preventDefault();
  sessionStorage.setItem("key", $("key-text").value.trim());
  $("key").hidden = true;
  refresh(); report();
});
refresh(); report(); setInterval(refresh, 5000);
