/* The message box */
function grow() {
  const box = $("input");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}
function keepDraft() { store("draft", [state.unanswered, $("input").value].filter((each) => each.trim()).join("\n\n")); }
function setInput(text) {
  $("input").value = text;
  grow();
  keepDraft();
}
function valid() {
  const wrong = [$("max-tokens"), $("temperature")].find((each) => !each.checkValidity());
  if (!wrong) return true;
  panel("settings");
  wrong.reportValidity();
  return false;
}
function send() {
  const text = $("input").value;
  if (state.run) { hint("Still answering: Escape stops it"); return; }
  if (!text.trim()) { $("input").focus(); return; }
  if (!valid()) return;
  const turn = addTurn(text);
  setInput("");
  ask(turn);
}
function stop() { state.run?.stop.abort(); }
$("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("input").addEventListener("input", () => { grow(); keepDraft(); });
$("input").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  send();
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && state.run && !event.isComposing) { event.preventDefault(); stop(); }
});
$("new").addEventListener("click", () => {
  stop();
  state.run = null;
  state.turns = [];
  state.unanswered = "";
  clearInterval(countdown);
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  clearPyramid();
  keepDraft();
  stuck = true;
  follow();
  say("New chat");
  settle();
  if (!calm.matches) $("input").focus();
});
