/* A random document in the vocabulary of the shipped model */
const W = Object.fromEntries(Object.entries({
  thing: "archive atlas camera compass crown diary globe harp lantern map mirror piano scroll telescope violin",
  place: "room hall vault locker office cellar", first: "Ada Clara Edith Felix Greta Hugo Ivan Julia Leon Mira Nadia Olga Paula Silas Vera",
  last: "Arden Bailey Calder Dalton Ellis Finch Garner Holt Innes Kemp Larkin Mercer Nolan Porter Quinn Reed Stone Thorne Walsh York",
  who: "baker gardener teacher sailor farmer painter doctor weaver carpenter singer miller librarian",
  how: "old quiet young tired cheerful patient clever gentle careful proud", look: "small heavy broken wooden silver dusty narrow bright blue red",
  object: "basket lamp letter ladder blanket kettle boat rope bottle book chair bell", site: "bridge market harbour river forest church garden station valley mill square tower",
  move: "walked ran hurried wandered returned climbed", act: "carried repaired found lost bought sold cleaned borrowed hid",
  manner: "slowly quietly quickly happily carefully again alone", time: "morning evening afternoon night spring summer autumn winter",
  sky: "rain snow wind fog sun storm", did: "covered reached crossed left touched",
  to: "to across from", at: "near at in", link: "while because after before and", when: "in at",
}).map(([name, words]) => [name, words.split(" ")]));
const CLAUSES = ["the how who move manner to the site", "the how who act the look object at the site",
  "the sky did the site", "the look object was IN the site"];
const pick = (list) => list[Math.floor(Math.random() * list.length)];
function clause() {
  const fixed = new Set(["the", "was", "IN"]);
  return pick(CLAUSES).split(" ").map((word) =>
    fixed.has(word) ? word.toLowerCase() : pick(W[word])).join(" ");
}
function sentence() {
  const shape = Math.floor(Math.random() * 4);
  const text = shape === 0 ? `${pick(W.when)} the ${pick(W.time)} , ${clause()}`
    : shape === 1 ? `${clause()} ${pick(W.link)} ${clause()}` : clause();
  return `${text[0].toUpperCase()}${text.slice(1)} .`;
}
function madeUp(words = 300, count = 4) {
  const lasts = [...W.last];
  const facts = Array.from({ length: count }, () => {
    const [last] = lasts.splice(Math.floor(Math.random() * lasts.length), 1);
    return { of: `${pick(W.thing)} of ${pick(W.first)} ${last}`, at: `${pick(W.place)} ${100 + Math.floor(Math.random() * 900)}` };
  });
  const text = [];
  for (let left = words - 10 * count; left > 0; left -= text.at(-1).split(" ").length) text.push(sentence());
  for (const fact of facts)
    text.splice(Math.floor(Math.random() * (text.length + 1)), 0, `The ${fact.of} is in ${fact.at} .`);
  return `${text.join(" ")} Where is the ${pick(facts).of} ?`;
}
$("example").addEventListener("click", () => {
  const box = $("input");
  const had = box.value.trim();
  if (had || !calm.matches) {
    box.focus();
    box.select();  // replaces the selection, so that the browser's undo restores a draft
  }
  if (document.activeElement !== box || !document.execCommand("insertText", false, madeUp())) box.value = madeUp();
  grow();
  keepDraft();
  box.scrollTop = box.scrollHeight;
  if (had) hint("Undo (Ctrl+Z) restores your text");
});
