"use strict";
const $ = (id) => document.getElementById(id);
const state = { model: null, turns: [], run: null, unanswered: "" };
const calm = matchMedia("(hover: none)");

/* Helpers */
function make(tag, name, text) {
  const element = document.createElement(tag);
  if (name) element.className = name;
  if (text !== undefined) element.textContent = text;
  return element;
}
function button(label, act, name = "link") {
  const element = make("button", name, label);
  element.type = "button";
  element.addEventListener("click", act);
  return element;
}
const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const percent = (part, all) => (all > 0 ? `${Math.round((100 * part) / all)} %` : "–");
const seconds = (ms) => (ms < 999.5 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 9950 ? 2 : 1)} s`);
function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  for (; count >= 999.5 && unit < 4; unit++) count /= 1024;
  return `${unit && count < 99.95 ? count.toFixed(1) : Math.round(count)} ${units[unit]}`;
}
function store(name, value) {
  try {
    if (value) sessionStorage.setItem(name, value); else sessionStorage.removeItem(name);
  } catch { /* storage is disabled or full */ }
}
function stored(name) {
  try { return sessionStorage.getItem(name) || ""; } catch { return ""; }
}
const say = (text) => { $("live").textContent = text; };
const hint = (text, usual) => {
  $("hint").textContent = text;
  $("hint").classList.toggle("usual", Boolean(usual));
  if (!usual) say(text);
};

/* The server */
class Trouble extends Error {
  constructor(message, status = 0, wait = 0) { super(message); Object.assign(this, { status, wait }); }
}
function headers(more) {
  const key = stored("api-key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : { ...more };
}
async function refusal(response) {
  const text = await response.text().catch(() => "");
  let said = "";
  try { const body = JSON.parse(text); said = body.error?.message ?? body.detail; } catch { /* not JSON */ }
  if (typeof said !== "string" || !said)
    said = `The server answered ${response.status} ${response.statusText}`.trim() + ".";
  const after = response.headers.get("Retry-After");
  const wait = after ? Number(after) || (Date.parse(after) - Date.now()) / 1000 : 0;
  return new Trouble(said, response.status, Math.min(Math.max(Math.ceil(wait) || 0, 0), 120));
}
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
        else if (!line && data.length) {
          const text = data.join("\n");
          data = [];
          if (text === "[DONE]") return;
          yield JSON.parse(text);
        }
      }
    }
  } finally { reader.cancel().catch(() => {}); }
}
async function loadModel() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (!response.ok) throw await refusal(response);
    const model = (await response.json()).data[0];
    const compression = model.compression;
    state.model = model;
    $("model").textContent = [model.id, model.layers && `${model.layers} layers`,
      model.max_model_len && `context ${whole.format(model.max_model_len)}`].filter(Boolean).join(" · ");
    if (model.max_model_len) {
      $("max-tokens").max = model.max_model_len;
      if ($("max-tokens").value > model.max_model_len) $("max-tokens").value = model.max_model_len;
    }
    if (compression) {
      const wanted = $("policy").value || saved.policy;
      const names = compression.policies;
      $("policy").replaceChildren(...names.map((name) => new Option(name, name)));
      $("policy").value = names.includes(wanted) ? wanted : compression.policy;
      const keep = $("keep").dataset.set ? $("keep").value : saved.keep ?? compression.keep ?? 0.45;
      Object.assign($("keep"), { min: compression.min_keep, max: compression.max_keep });
      $("keep").value = keep;
    }
    showKeep();
    if (model.heads) drawNeeds(model.heads);
    if (model.layers && !state.run && $("pyramid").classList.contains("empty")) build(model.layers);
    hint(usualHint, true);
    return true;
  } catch (error) {
    if (error.status === 401) askForKey(false);
    hint(error.status === 401 ? "This server asks for an API key (Settings)."
      : error instanceof Trouble ? error.message : "The server cannot be reached.");
    return false;
  }
}
function askForKey(focus) {
  $("key-box").open = true;
  panel("settings");
  if (focus) $("key").focus();
}

/* Settings */
let saved = {};
try { saved = JSON.parse(stored("settings") || "{}"); } catch { /* invalid: use the defaults */ }
for (const [name, id] of [["maxTokens", "max-tokens"], ["temperature", "temperature"], ["system", "system"]])
  if (saved[name] !== undefined) $(id).value = saved[name];
function saveSettings() {
  saved = { policy: $("policy").value, keep: $("keep").value, maxTokens: $("max-tokens").value,
    temperature: $("temperature").value, system: $("system").value };
  store("settings", JSON.stringify(saved));
}
function showKeep() {
  const full = $("policy").value === "full";
  $("keep").disabled = full;
  const share = Math.round(100 * $("keep").value);
  $("keep-now").textContent = full ? "everything" : `${share} %`;
  const policy = $("policy").value;
  const { rules = {}, policy: own, kv_dtype: stored = "auto", lossless } = state.model?.compression ?? {};
  const rule = !rules[policy] ? "" : `${policy}${policy === own ? " goes by" : ":"} ${rules[policy]}.`;
  const all = lossless ? `Lossless: nothing is dropped, and ${full ? own : policy} chooses what is read to guess ahead. ` : "";
  $("rule").textContent = all + rule + (stored === "auto" ? "" : ` Keys and values are stored in ${stored}.`);
  $("keep").setAttribute("aria-valuetext", full ? "everything" : `${share} percent of the tokens`);
}
$("settings").addEventListener("change", (event) => { if (event.target !== $("key")) saveSettings(); });
$("policy").addEventListener("change", showKeep);
$("keep").addEventListener("input", () => { $("keep").dataset.set = "1"; showKeep(); });
$("key").value = stored("api-key");
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  store("api-key", $("key").value.trim());
  if (!(await loadModel())) { $("key").select(); return; }
  const last = state.turns.at(-1);
  $("input").focus();
  if (last?.status === 401 && !state.run) again(last, true);
});
function panel(name) {
  const main = document.querySelector("main");
  main.dataset.panel = name;
  for (const each of ["cache", "settings"])
    $(`show-${each}`).setAttribute("aria-expanded", String(each === name));
}
for (const each of ["cache", "settings"])
  $(`show-${each}`).addEventListener("click", () => panel(document.querySelector("main").dataset.panel === each ? "" : each));
