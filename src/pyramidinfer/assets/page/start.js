build(12);
setInput(stored("draft"));
hint(usualHint, true);
loadModel();
if (!calm.matches) $("input").focus();
