/* Which tokens of the conversation the server holds in which layer after an answer */
const survival = { asked: null, found: null, at: null, wanted: 0 };
function view(name) {
  $("cache").dataset.view = name;
  for (const each of ["layers", "tokens"])
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  if (name === "tokens") lookAtSurvival();
}
for (const each of ["layers", "tokens"]) $(`view-${each}`).addEventListener("click", () => view(each));

function survive(run) {
  forgetSurvival();
  if (!run.answer) return;
  const { model, compression } = run.body;
  survival.asked = { model, compression, messages: [...run.body.messages, { role: "assistant", content: run.answer }] };
  if ($("cache").dataset.view === "tokens") lookAtSurvival();
}
function forgetSurvival() {
  Object.assign(survival, { asked: null, found: null, at: null });
  survival.wanted += 1;
  tellSurvival(state.run ? "Shown after the answer" : "Nothing is held yet");
}
function tellSurvival(text) {
  $("survival").hidden = true;
  $("survival-told").textContent = text;
  $("survival-text").replaceChildren();
}
async function lookAtSurvival() {
  if (!survival.asked || survival.found) { drawSurvival(); return; }
  const number = ++survival.wanted;
  tellSurvival("Loading");
  try {
    const response = await fetch("v1/caches/survival", { method: "POST", body: JSON.stringify(survival.asked),
      headers: headers({ "Content-Type": "application/json" }) });
    if (!response.ok) throw await refusal(response);
    const found = await response.json();
    if (number !== survival.wanted) return;
    survival.found = found;
    showSurvival();
  } catch (error) {
    if (number !== survival.wanted) return;
    tellSurvival(error instanceof Trouble && error.status === 404 ? "The server holds no cache of this text."
      : error instanceof Trouble ? error.message : "The server cannot be reached.");
  }
}
function showSurvival() {
  const { layers, text } = survival.found;
  $("survival").hidden = false;
  $("survival").setAttribute("aria-label", `Which of ${survival.found.tokens} tokens ${layers.length} layers hold`);
  $("survival-text").replaceChildren(...text.map((piece, column) => {
    const element = make("span", "", piece);
    element.dataset.column = column;
    return element;
  }));
  pointAt(null);
}
const meanOf = (column) => survival.found.layers.reduce((sum, row) => sum + row[column], 0) / survival.found.layers.length;

/* The picture: positions from left to right, layers upwards as in the bars */
function drawSurvival() {
  const { found, at } = survival;
  const canvas = $("survival");
  if (!found || !canvas.clientWidth) return;
  const [wide, high] = [canvas.clientWidth, canvas.clientHeight].map((each) => Math.round(each * devicePixelRatio));
  Object.assign(canvas, { width: wide, height: high });
  const pen = canvas.getContext("2d");
  const style = getComputedStyle(canvas);
  const [rows, columns] = [found.layers.length, found.text.length];
  const edge = (index, count, size) => Math.round((index * size) / count);
  pen.fillStyle = style.getPropertyValue("--full");
  pen.fillRect(0, 0, wide, high);
  pen.fillStyle = style.getPropertyValue("--accent");
  found.layers.forEach((row, layer) => {
    const top = high - edge(layer + 1, rows, high);
    const gap = high / rows > 5 ? 1 : 0;
    row.forEach((share, column) => {
      if (!share) return;
      const left = edge(column, columns, wide);
      pen.globalAlpha = 0.15 + 0.85 * share / 100;
      pen.fillRect(left, top, Math.max(1, edge(column + 1, columns, wide) - left), high - edge(layer, rows, high) - top - gap);
    });
  });
  pen.globalAlpha = 1;
  if (!at) return;
  pen.strokeStyle = style.getPropertyValue("--text");
  pen.lineWidth = 2;
  const [left, top] = [edge(at.column, columns, wide), high - edge(at.layer + 1, rows, high)];
  pen.strokeRect(left - 1, top, edge(at.column + 1, columns, wide) - left + 2, high - edge(at.layer, rows, high) - top);
}
/* Select a cell (null: none): the text shows its layer, or without a cell the mean of all layers */
function pointAt(at) {
  const { found } = survival;
  survival.at = at;
  drawSurvival();
  const share = (column) => (at ? found.layers[at.layer][column] : meanOf(column));
  for (const piece of $("survival-text").children) {
    const column = Number(piece.dataset.column);
    piece.style.setProperty("--share", share(column) / 100);
    piece.classList.toggle("on", at?.column === column);
  }
  const first = at && at.column * found.width;
  const last = at && Math.min(first + found.width, found.tokens) - 1;
  $("survival-told").textContent = at
    ? `Layer ${at.layer}, token${first === last ? ` ${first}` : `s ${first} to ${last}`}: ${found.layers[at.layer][at.column]} % held`
    : `${whole.format(found.tokens)} tokens from left to right, layers upwards; below, the text. Point at either.`;
}
function pointed(event) {
  const { found } = survival;
  const box = $("survival").getBoundingClientRect();
  const place = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
  return { column: place((event.clientX - box.left) / box.width, found.text.length),
    layer: place((box.bottom - event.clientY) / box.height, found.layers.length) };
}
function reveal() {
  const [box, piece] = [$("survival-text"), $("survival-text").children[survival.at.column]];
  box.scrollTop = piece.offsetTop - box.clientHeight / 2;
}
for (const kind of ["pointermove", "pointerdown"])
  $("survival").addEventListener(kind, (event) => { pointAt(pointed(event)); reveal(); });
$("survival").addEventListener("pointerleave", () => { if (survival.found) pointAt(null); });
$("survival").addEventListener("keydown", (event) => {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  const [across, up] = steps[event.key] ?? [0, 0];
  if (!across && !up) return;
  event.preventDefault();
  const { found, at } = survival;
  const inside = (value, count) => Math.min(Math.max(value, 0), count - 1);
  pointAt(at ? { column: inside(at.column + across * (event.shiftKey ? 10 : 1), found.text.length), layer: inside(at.layer + up, found.layers.length) }
    : { column: 0, layer: 0 });
  reveal();
});
$("survival-text").addEventListener("pointerover", (event) => {
  const column = event.target.dataset.column;
  if (column !== undefined) pointAt({ column: Number(column), layer: survival.at?.layer ?? 0 });
});
new ResizeObserver(drawSurvival).observe($("survival"));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawSurvival);
