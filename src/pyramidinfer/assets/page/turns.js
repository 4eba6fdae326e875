/* The conversation */
const answerOf = (turn) => turn.answers.filter((each) => each.said).at(-1)?.said;
function messagesFor(turn) {
  const list = [];
  if ($("system").value.trim()) list.push({ role: "system", content: $("system").value });
  for (const each of state.turns) {
    if (each === turn) break;
    const answer = answerOf(each);
    if (answer) list.push({ role: "user", content: each.text }, { role: "assistant", content: answer });
  }
  list.push({ role: "user", content: turn.text });
  return list;
}
function requestFor(turn) {
  const body = { messages: messagesFor(turn), stream: true, temperature: Number($("temperature").value || 0),
    stream_options: { include_usage: true, include_kv: true } };
  if (state.model) body.model = state.model.id;
  if ($("max-tokens").value) body.max_tokens = Number($("max-tokens").value);
  const policy = $("policy").value;
  if (policy) body.compression = policy === "full" ? { policy } : { policy, keep: Number($("keep").value) };
  return body;
}
function addTurn(text) {
  const turn = { text, answers: [], element: make("article", "turn"), user: make("div"), status: 0 };
  turn.element.append(turn.user);
  drawUser(turn);
  state.turns.push(turn);
  $("welcome").hidden = true;
  $("turns").append(turn.element);
  return turn;
}
function drawUser(turn) {
  const { text, user } = turn;
  const acts = make("div", "acts");
  user.className = "user";
  user.replaceChildren(make("h3", "unseen", "You"), make("p", "", text), acts);
  if (text.length > 500 || text.split("\n").length > 6) {
    const more = `Show all ${whole.format(text.trim().split(/\s+/).length)} words`;
    user.classList.add("long");
    const toggle = button(more, () => {
      const open = !user.classList.toggle("long");
      toggle.textContent = open ? "Show less" : more;
      toggle.setAttribute("aria-expanded", String(open));
    });
    toggle.setAttribute("aria-expanded", "false");
    acts.append(toggle);
  }
  acts.append(copyButton(() => turn.text), button("Edit", () => edit(turn)));
}

/* Edit a message in place: later messages are removed, and it is sent again */
function edit(turn) {
  if (state.run) { hint("Still answering: Escape stops it"); return; }
  clearInterval(countdown);
  const form = make("form", "editor");
  const box = make("textarea", "field");
  box.value = turn.text;
  box.setAttribute("aria-label", "Message");
  const close = () => { drawUser(turn); $("input").focus({ preventScroll: true }); };
  const send = make("button", "main", "Send");
  form.append(box, send, button("Cancel", close, "plain"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (state.run) { hint("Still answering: Escape stops it"); return; }
    if (!box.value.trim() || !valid()) return;
    turn.text = box.value;
    for (const later of state.turns.splice(state.turns.indexOf(turn) + 1)) later.element.remove();
    for (const old of turn.answers.splice(0)) old.element.remove();
    drawUser(turn);
    ask(turn);
  });
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  turn.user.className = "user editing";
  turn.user.replaceChildren(form);
  box.style.height = `${box.scrollHeight + 2}px`;
  box.focus();
}
function addAnswer(turn) {
  const parts = { element: make("div", "answer busy"), text: make("div", "text"), note: make("p", "note"),
    acts: make("div", "acts"), thought: make("details", "thought"), thinking: make("div"), said: "" };
  parts.thought.append(make("summary", "", "Thinking"), parts.thinking);
  parts.thought.hidden = true;
  parts.element.append(make("h3", "unseen", "Answer"), parts.thought, parts.text, parts.note, parts.acts);
  turn.element.append(parts.element);
  turn.answers.push(parts);
  return parts;
}
function settle() {
  const busy = Boolean(state.run);
  const held = [$("send"), $("stop"), document.body, null].includes(document.activeElement);
  document.body.dataset.state = busy ? (state.run.first === null ? "waiting" : "streaming") : "idle";
  $("stop").hidden = !busy;
  $("send").hidden = busy;
  hint(busy ? "Escape stops" : usualHint, true);
  if (held) (calm.matches ? $(busy ? "stop" : "send") : $("input")).focus({ preventScroll: true });
}
const usualHint = "Enter sends · Shift+Enter: new line";
