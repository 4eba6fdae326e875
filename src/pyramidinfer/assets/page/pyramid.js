/* Painting, at most once per frame */
let frame = 0;
function schedule() { if (!frame) frame = requestAnimationFrame(paint); }
function paint() {
  cancelAnimationFrame(frame);
  frame = 0;
  const run = state.run;
  if (!run) return;
  if (run.answer.length > run.drawn) {
    showMarkdown(run.parts.text, run.answer);
    run.drawn = run.answer.length;
  }
  drawThought(run);
  if (run.kv) { draw(run.kv); drawHeads(run.kv, false); }
  drawFigures(run);
  follow();
  const now = performance.now();
  if (now - run.toldAt > 4000 && run.answer.length > run.told) {  // for screen readers: whole words, every four seconds
    const end = run.answer.lastIndexOf(" ") + 1;
    if (end > run.told) say(run.answer.slice(run.told, end));
    run.told = Math.max(end, run.told);
    run.toldAt = now;
  }
}
function drawThought({ parts, thought, spoke, first }) {
  if (!thought) return;
  parts.thought.hidden = false;
  if (parts.thinking.textContent.length !== thought.length) parts.thinking.textContent = thought;
  const title = spoke ? `Thought for ${seconds(spoke - first)}` : "Thinking";
  const summary = parts.thought.firstChild;
  if (summary.textContent !== title) summary.textContent = title;
}
let stuck = true;
function follow() {
  const log = $("log");
  if (stuck && state.turns.length) log.scrollTop = log.scrollHeight;
  $("newest").hidden = stuck;
}
$("log").addEventListener("scroll", () => {
  const log = $("log");
  stuck = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
  if (stuck) $("newest").hidden = true;
}, { passive: true });
new ResizeObserver(follow).observe($("log"));
$("newest").addEventListener("click", () => { stuck = true; follow(); $("input").focus(); });

function counted(run) {
  if (run.usage) return run.usage.completion_tokens;
  return run.prompt ? run.kv.seen - run.prompt + 1 : run.pieces;
}
function rate(run) {
  const span = run.last - run.first;
  const made = run.base ? run.kv.seen - run.base : run.pieces - 1;  // since the first token
  if (run.first === null || made < 1 || span < 5) return "–";
  const speed = (made * 1000) / span;
  return speed < 100 ? speed.toFixed(1) : whole.format(speed);
}
function clearFigures() {
  for (const id of ["rate", "answered", "prompted", "cached", "skipped", "accepted", "verified"]) $(id).textContent = "–";
  for (const id of ["accepted", "verified"]) $(id).parentElement.hidden = !state.model?.compression?.lossless;
}
function drawFigures(run) {
  const { kv, usage } = run;
  const now = performance.now();
  const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
  put("ttft", seconds((run.first ?? now) - run.sent));
  if (run.first !== null) {
    put("rate", rate(run));
    put("answered", whole.format(counted(run)));
    if (run.prompt) put("prompted", whole.format(run.prompt));
  }
  if (usage) {
    const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
    const skipped = usage.prefill_tokens_skipped;
    put("prompted", whole.format(usage.prompt_tokens));
    put("cached", whole.format(cached));
    const fresh = usage.prompt_tokens - cached;
    if (skipped !== undefined)
      put("skipped", whole.format(skipped)
        + (skipped > 0 && skipped <= fresh ? ` (${percent(skipped, fresh)})` : ""));
    const { drafted_tokens: drafted, accepted_tokens: accepted, verifications } = usage;
    if (verifications) {
      put("accepted", `${whole.format(accepted)} (${percent(accepted, drafted)})`);
      put("verified", (1 + accepted / verifications).toFixed(1));
    }
  }
  if (kv) {
    const share = percent(kv.bytes, kv.full_bytes);
    const [held, full] = [bytes(kv.bytes), bytes(kv.full_bytes)];
    if ($("kv").textContent !== `KV ${held} of ${full} full · ${share}`)
      $("kv").replaceChildren("KV ", make("b", "", held), ` of ${full} full · `, make("b", "", share));
    const why = reason(run);
    put("why", why);
    $("why").hidden = !why;
    put("brief", `KV ${share}` + (rate(run) === "–" ? "" : ` · ${rate(run)} tok/s`));
  }
}

/* The reason if a short text is not cut, or cut less than requested */
function reason({ kv, policy, keep, lossless }) {
  if (!policy || policy === "full" || keep === 1 || lossless) return "";
  const least = state.model?.compression?.min_context?.[policy] ?? 0;
  const share = kv.bytes / kv.full_bytes;
  const short = kv.seen < least ? `${policy} cuts texts below ${whole.format(least)} tokens (min_context) less, and this one has ${whole.format(kv.seen)}.` : "";
  if (share > 0.995) return short ? `Nothing is cut: ${short}` : `Nothing is cut: ${policy} always keeps as much as this text has.`;
  return share > keep + 0.03 ? short : "";
}

/* Layers × KV heads: the share of a text that each needs (the model's profile), and the share of this
   text that it keeps */
function map(id, layers, share, told) {
  const heads = Math.max(...layers.map((row) => row?.length ?? 0), 1);
  const cells = layers.flatMap((row, layer) => Array.from({ length: heads }, (_, head) => {
    const cell = make("i", row ? "" : "none");
    cell.title = `layer ${layer}, head ${head}: ${row ? told(row[head], layer) : "limited by its window"}`;
    if (row) cell.style.setProperty("--share", share(row[head], layer));
    cell.style.gridArea = `${layers.length - layer} / ${head + 1}`;
    return cell;
  }));
  $(id).style.setProperty("--layers", layers.length);
  $(id).replaceChildren(...cells);
  $("heads").hidden = false;
}
const drawNeeds = (needs) => map("needed", needs, (need) => need, (need) => `needs ${percent(need, 1)} of a text`);
let mapped = 0;
function drawHeads(kv, done) {
  const now = performance.now();
  if (!done && now - mapped < 400) return;
  mapped = now;
  const full = (layer) => kv.full?.[layer] ?? kv.seen;
  map("held", kv.kept, (count, layer) => count / full(layer),
    (count, layer) => `keeps ${whole.format(count)} of ${whole.format(full(layer))} (${percent(count, full(layer))})`);
}

/* The pyramid */
let rows = [];
let scale = 0;
function build(layers) {
  rows = Array.from({ length: layers }, (_, layer) => {
    const row = make("div", "layer");
    const track = make("span", "track");
    const [full, kept, count] = [make("i", "of"), make("i", "in"), make("span", "count", "")];
    row.dataset.layer = layer;
    track.append(full, kept);
    row.append(make("span", "", String(layer)), track, count);
    return { row, full, kept, count };
  });
  $("plot").replaceChildren(...rows.map((each) => each.row));
  $("plot").style.setProperty("--layers", layers);
  scale = 0;
  label();
}
function label() {  // labels only as many layers as fit
  const height = $("plot").clientHeight / (rows.length || 1);
  const every = [1, 2, 4, 5, 8, 10, 16, 20, 32].find((step) => step * height >= 12) ?? 64;
  $("plot").classList.toggle("dense", height < 4);
  rows.forEach((each, layer) => each.row.classList.toggle("quiet", layer % every !== 0));
}
new ResizeObserver(label).observe($("plot"));
function ticks(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 4) / 4));
  const steps = [1, 2, 2.5, 5, 10].map((each) => each * power).filter(Number.isInteger);
  const step = steps.find((each) => most <= 4 * each);
  scale = step * Math.ceil(most / step);
  const marks = [];
  for (let at = 0; at <= scale; at += step) {
    const mark = make("span", "", whole.format(at));
    mark.style.left = `${(100 * at) / scale}%`;
    marks.push(mark);
  }
  $("ticks").replaceChildren(...marks);
}

/* Tokens that a layer keeps: the mean over its KV heads, which may keep different numbers */
const layerMeans = (kv) =>
  kv.kept.map((heads) => heads.reduce((sum, count) => sum + count, 0) / heads.length);
function draw(kv) {
  const means = layerMeans(kv);
  if (means.length !== rows.length) build(means.length);
  const most = Math.max(kv.seen, ...means, 1);
  if (most > scale || most < scale * 0.6) ticks(most);
  const figure = $("pyramid");
  figure.classList.remove("empty");
  figure.dataset.seen = kv.seen;
  figure.dataset.kept = means.map(Math.round).join(" ");
  rows.forEach(({ full, kept, count }, layer) => {
    full.style.width = `${(100 * (kv.full?.[layer] ?? kv.seen)) / scale}%`;
    kept.style.width = `${(100 * means[layer]) / scale}%`;
    const text = whole.format(means[layer]);
    if (count.textContent !== text) count.textContent = text;
  });
}
function describe(kv) {
  if (!kv) return;
  drawHeads(kv, true);
  const each = layerMeans(kv)
    .map((count, layer) => `layer ${layer} ${whole.format(count)}`)
    .join(", ");
  $("pyramid").setAttribute("aria-label", `Tokens kept of ${kv.seen}, layer by layer: ${each}`);
}
function clearPyramid() {
  const figure = $("pyramid");
  figure.classList.add("empty");
  figure.setAttribute("aria-label", "No tokens yet");
  delete figure.dataset.seen;
  delete figure.dataset.kept;
  build(rows.length);
  $("ticks").replaceChildren();
  $("kv").textContent = "KV: nothing yet";
  $("why").hidden = true;
  $("held").replaceChildren();
  forgetSurvival();
  $("brief").textContent = "";
  clearFigures();
  $("ttft").textContent = "–";
}
