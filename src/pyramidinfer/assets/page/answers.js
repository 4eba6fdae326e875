/* One answer */
function ask(turn) {
  for (const each of document.querySelectorAll(".once")) each.remove();
  clearInterval(countdown);
  const body = requestFor(turn);
  const keep = body.compression?.keep;
  const run = { turn, body, parts: addAnswer(turn), stop: new AbortController(), answer: "", thought: "", drawn: 0,
    sent: performance.now(), first: null, last: null, base: 0, prompt: 0, pieces: 0, kv: null, usage: null,
    finish: null, told: 0, toldAt: performance.now(),
    policy: body.compression?.policy, keep, lossless: state.model?.compression?.lossless,
    label: body.compression ? body.compression.policy + (keep ? `, keep ${percent(keep, 1)}` : "") : "" };
  state.run = run;
  state.unanswered = turn.text;
  turn.status = 0;
  stuck = true;
  settle();
  clearFigures();
  schedule();
  const clock = setInterval(schedule, 100);  // shows the time to first token while waiting
  answer(run, body).catch((error) => error).then((error) => {
    clearInterval(clock);
    finish(run, run.stop.signal.aborted ? null : error);
  });
}
async function answer(run, body) {
  const response = await fetch("v1/chat/completions", { method: "POST", signal: run.stop.signal,
    headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) });
  if (!response.ok) throw await refusal(response);
  for await (const chunk of events(response.body)) take(run, chunk);
  if (!run.finish) throw new Trouble("The connection ended before the answer was complete.");
  if (run.finish === "error" || run.finish === "abort") throw new Trouble("The server ended the answer early.");
}
function take(run, chunk) {
  if (chunk.error) throw new Trouble(chunk.error.message || "The server ended the answer early.");
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content;
  const thought = choice?.delta?.reasoning_content;
  if (chunk.kv) run.kv = chunk.kv;
  if (chunk.usage) run.usage = chunk.usage;
  if (choice) run.last = performance.now();
  if (choice && chunk.kv && !run.prompt) run.prompt = chunk.kv.seen;  // does not count the first generated token
  if (text || thought) {
    run.pieces += 1;
    if (run.first === null) {
      run.first = run.last;
      run.base = chunk.kv?.seen ?? 0;
      if (state.run === run) document.body.dataset.state = "streaming";
    }
    run.answer += text ?? "";
    run.thought += thought ?? "";
    if (text) run.spoke ??= run.last;
  }
  if (choice?.finish_reason) run.finish = choice.finish_reason;
  schedule();
}
function finish(run, error) {
  const { turn, parts } = run;
  const current = state.run === run;
  parts.element.classList.remove("busy");
  if (!current) return;  // the user started a new chat
  paint();
  state.run = null;
  parts.said = run.answer;
  if (run.first === null) $("ttft").textContent = "–";
  if (error) report(run, error);
  else parts.acts.append(button("Ask again", () => again(turn, !run.answer && !run.finish), "link once"));
  if (run.answer) parts.acts.prepend(copyButton(() => run.answer));
  if (!error && (run.finish || run.answer)) state.unanswered = "";
  const notes = error && !run.answer ? [] : notesOf(run, error);
  parts.note.textContent = notes.join(" · ");
  const why = run.kv && reason(run);
  if (why && notes.length) parts.note.append(make("span", "because", ` · ${why}`));
  if (!run.answer) parts.text.hidden = true;
  keepDraft();
  describe(run.kv);
  if (!error) survive(run);
  if (!error) say(`${run.answer.slice(run.told)} – ${notes.join(", ")}`);
  settle();
  if (turn.status === 401) askForKey(true);
  follow();
}
function notesOf(run, error) {
  const notes = [];
  const count = counted(run);
  const { kv, usage } = run;
  if (run.first !== null) {
    notes.push(count === 1 ? "1 token" : `${whole.format(count)} tokens`);
    if (rate(run) !== "–") notes.push(`${rate(run)} tokens/s`);
    notes.push(`first token after ${seconds(run.first - run.sent)}`);
  }
  if (run.label) notes.push(run.label);
  if (kv) notes.push(`KV ${percent(kv.bytes, kv.full_bytes)} of full`);
  if (usage?.verifications) notes.push(`${percent(usage.accepted_tokens, usage.drafted_tokens)} of drafts accepted`);
  if (usage?.kv_keep_lowered_to) notes.push(`keep lowered to ${percent(usage.kv_keep_lowered_to, 1)} by the server`);
  if (run.finish === "length") notes.push("ended at the token limit");
  if (!error && !run.finish) notes.push(run.answer ? "stopped" : "stopped before the first token");
  else if (!error && !run.answer) notes.push("the model generated no text");
  return notes;
}
let countdown = 0;
function report(run, error) {
  const { turn, parts } = run;
  const box = make("div", "trouble");
  const known = error instanceof Trouble;
  let text = known ? error.message : run.answer ? `The connection was lost (${error.message}).`
    : `The server cannot be reached (${error.message}).`;
  if (error.status === 401)
    text = "The server asks for an API key, or this one is invalid. Enter it under Settings, API key.";
  turn.status = error.status || -1;
  if (error.status === 404) loadModel();
  const retry = button("Retry", () => again(turn, true), "framed once");
  parts.acts.append(retry);
  box.append(make("p", "", text), parts.acts);
  parts.element.append(box);
  let left = error.wait || 0;
  const tick = () => {
    retry.disabled = left > 0;
    retry.textContent = left > 0 ? `Retry in ${left} s` : "Retry";
    if (left-- <= 0) clearInterval(countdown);
  };
  clearInterval(countdown);
  if (left) { tick(); countdown = setInterval(tick, 1000); }
  say(text);
}
function again(turn, replace) {
  if (state.run) return;
  if (!valid()) return;
  if (replace) turn.answers.pop().element.remove();
  ask(turn);
}
