/* Markdown.  A model's text becomes elements created here and text nodes, never HTML: no raw markup,
   no images, and links to http, https and mailto only. */
const BLOCKS = {
  fence: /^ {0,3}(`{3,}|~{3,})[ \t]*([^`\n]*)$/,
  heading: /^ {0,3}(#{1,6})[ \t]+(.*)$/,
  rule: /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/,
  quote: /^ {0,3}> ?/,
  item: /^([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(?=\S)/,
};
const DEEPEST = 8;  // maximum nesting of blocks, and of marks
const indent = (line) => line.match(/^[ \t]*/)[0].replaceAll("\t", "    ").length;
const begins = (line) => Object.values(BLOCKS).some((block) => block.test(line));

/* Split lines into blocks; each has its source lines and a function that creates its element */
function blocksOf(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) { at += 1; continue; }
    const [to, draw] = blockAt(lines, at);
    blocks.push({ source: lines.slice(at, to).join("\n"), draw });
    at = to;
  }
  return blocks;
}
function blockAt(lines, at) {
  const line = lines[at];
  const fence = line.match(BLOCKS.fence);
  if (fence) {
    let to = at + 1;
    const ends = (each) => each.trim().length >= fence[1].length && !each.trim().replaceAll(fence[1][0], "");
    while (to < lines.length && !ends(lines[to])) to += 1;
    const code = lines.slice(at + 1, to).join("\n");
    return [Math.min(to + 1, lines.length), () => codeBlock(code, fence[2].trim().split(/\s/)[0])];
  }
  const heading = line.match(BLOCKS.heading);
  if (heading) return [at + 1, (depth) => inline(heading[2].replace(/[ \t]+#+[ \t]*$/, ""), make(`h${Math.min(6, heading[1].length + 2)}`), depth)];
  if (BLOCKS.rule.test(line)) return [at + 1, () => make("hr")];
  if (BLOCKS.quote.test(line)) {
    const to = until(lines, at, (each) => !BLOCKS.quote.test(each));
    return [to, (depth) => fill(make("blockquote"), lines.slice(at, to).map((each) => each.replace(BLOCKS.quote, "")), depth)];
  }
  if (BLOCKS.item.test(line)) return listAt(lines, at);
  if (line.includes("|") && isRuler(lines[at + 1])) {
    const to = until(lines, at + 2, (each) => !each.includes("|"));
    return [to, (depth) => table(lines.slice(at, to), depth)];
  }
  const to = until(lines, at + 1, (each, next) => begins(each) || (each.includes("|") && isRuler(next)));
  return [to, (depth) => inline(lines.slice(at, to).join("\n"), make("p"), depth)];
}
function until(lines, at, ends) {
  while (at < lines.length && lines[at].trim() && !ends(lines[at], lines[at + 1])) at += 1;
  return at;
}
function listAt(lines, from) {
  const base = indent(lines[from]);
  const [, , mark] = lines[from].match(BLOCKS.item);
  const items = [];
  let at = from;
  for (; at < lines.length; at++) {
    const line = lines[at];
    const item = line.match(BLOCKS.item);
    if (!line.trim()) {
      const next = lines[at + 1];
      if (next === undefined || !next.trim() || (indent(next) <= base && !BLOCKS.item.test(next))) break;
      items.at(-1).push("");
    } else if (item && indent(line) < base + 2 && !BLOCKS.rule.test(line)) {
      if (/\d/.test(item[2]) !== /\d/.test(mark) || indent(line) < base) break;
      items.push([line.slice(item[0].length)]);
    } else if (indent(line) > base) items.at(-1).push(line.replace(/^[ \t]+/, " ".repeat(Math.max(0, indent(line) - base - 2))));
    else if (lines[at - 1].trim() && !begins(line)) items.at(-1).push(line);
    else break;
  }
  return [at, (depth) => {
    const list = make(/\d/.test(mark) ? "ol" : "ul");
    if (/\d/.test(mark)) list.start = parseInt(mark, 10);
    list.append(...items.map((each) => fill(make("li"), each, depth)));
    return list;
  }];
}
function fill(element, lines, depth) {
  if (depth >= DEEPEST) element.append(lines.join("\n"));
  else element.append(...blocksOf(lines).map((block) => block.draw(depth + 1)));
  return element;
}
const isRuler = (line) => line !== undefined && line.includes("|") && line.includes("-") && /^[ \t|:-]+$/.test(line);
const cellsOf = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((each) => each.trim());
function table(lines, depth) {
  const [head, ruler, ...rows] = lines.map(cellsOf);
  const side = (each = "") => (each.endsWith(":") ? (each.startsWith(":") ? "center" : "right") : "");
  const row = (cells, tag) => {
    const element = make("tr");
    head.forEach((_, index) => element.append(inline(cells[index] ?? "", make(tag, side(ruler[index])), depth)));
    return element;
  };
  const [top, body, box, element] = [make("thead"), make("tbody"), make("div", "wide"), make("table")];
  top.append(row(head, "th"));
  body.append(...rows.map((cells) => row(cells, "td")));
  element.append(top, body);
  box.append(element);
  return box;
}
function codeBlock(code, language) {
  const [box, bar, pre] = [make("div", "code"), make("div", "bar"), make("pre")];
  bar.append(make("span", "", language), copyButton(() => code));
  pre.tabIndex = 0;
  pre.append(make("code", "", code));
  box.append(bar, pre);
  return box;
}

/* Marks inside a line.  A search for the end of a mark that fails is not repeated, so the time is linear
   in the text at each nesting depth. */
const LINK = /!?\[([^[\]]{0,500})\]\(((?:[^\s()<>]|\([^\s()<>]{0,500}\)){1,2000})(?:\s+"[^"]{0,300}")?\)/y;
const BARE = /<?(https?:\/\/[^\s<>`]{1,2000})>?/y;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
function safe(address) {
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch { return null; }
}
function link(address, text, depth) {
  const element = make("a");
  Object.assign(element, { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address });
  return depth < DEEPEST ? inline(text, element, DEEPEST) : element;
}
function inline(text, element, depth = 0) {
  const missing = new Set();  // marks without an end in the rest of the text
  let plain = "";
  const add = (child) => {
    if (plain) element.append(plain);
    plain = "";
    element.append(child);
  };
  for (let at = 0; at < text.length;) {
    const found = text[at] === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? [at + 2, text[at + 1]]
      : spanAt(text, at, depth, missing);
    const [to, child] = found ?? [at + 1, text[at]];
    if (typeof child === "string") plain += child; else add(child);
    at = to;
  }
  if (plain) element.append(plain);
  return element;
}
function spanAt(text, at, depth, missing) {
  const letter = text[at];
  if (letter === "`") return codeAt(text, at, missing);
  if ("![<h".includes(letter) && depth < DEEPEST) return linkAt(text, at, depth);
  if (!"*_~".includes(letter) || depth >= DEEPEST) return null;
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at) || missing.has(mark)) continue;
    const inWord = letter === "_" && /\w/.test(text[at - 1] ?? "");
    if (inWord || !/\S/.test(text[at + mark.length] ?? " ")) continue;
    const end = endOf(text, mark, at + mark.length + 1);
    if (end < 0) missing.add(mark);
    else return [end + mark.length, inline(text.slice(at + mark.length, end), make(tag), depth + 1)];
  }
  const run = text.slice(at).match(/^([*_~])\1*/)[0];  // marks without effect
  return [at + run.length, run];
}
function endOf(text, mark, from) {
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at + 1)) {
    if (/\s/.test(text[at - 1]) || (mark[0] === "_" && /\w/.test(text[at + mark.length] ?? ""))) continue;
    if (mark.length === 2) while (text[at + 2] === mark[0]) at += 1;  // in ***, the last two
    if (mark.length === 1 && (text[at - 1] === mark || text[at + 1] === mark)) continue;  // a part of a longer mark
    return at;
  }
  return -1;
}
function codeAt(text, at, missing) {
  let end = at;
  while (text[end] === "`") end += 1;
  const mark = text.slice(at, end);
  for (let to = missing.has(mark) ? -1 : text.indexOf(mark, end); to >= 0;) {
    let after = to;
    while (text[after] === "`") after += 1;
    if (after - to === mark.length) return [after, make("code", "", text.slice(end, to).replace(/^ (.*\S.*) $/s, "$1"))];
    to = text.indexOf(mark, after);
  }
  missing.add(mark);
  return [end, mark];
}
function linkAt(text, at, depth) {
  LINK.lastIndex = BARE.lastIndex = at;
  const named = LINK.exec(text);
  if (named) {
    const address = safe(named[2]);
    return [LINK.lastIndex, address ? link(address, named[1] || named[2], depth) : named[0]];
  }
  const bare = /\w/.test(text[at - 1] ?? "") ? null : BARE.exec(text);
  if (!bare) return null;
  const whole = bare[0].startsWith("<") ? bare[1] : bare[1].replace(/[.,;:!?'")\]*_]+$/, "");
  const address = safe(whole);
  return address ? [bare[0].startsWith("<") ? BARE.lastIndex : at + whole.length, link(address, whole, DEEPEST - 1)] : null;
}

/* Show a text in an element; only changed blocks are created again */
function showMarkdown(element, text) {
  const blocks = blocksOf(text.split("\n"));
  const old = element.sources ?? [];
  let same = 0;
  while (same < blocks.length && blocks[same].source === old[same]) same += 1;
  while (element.childNodes.length > same) element.lastChild.remove();
  element.append(...blocks.slice(same).map((block) => block.draw(0)));
  element.sources = blocks.map((block) => block.source);
}

/* Copy to the clipboard; without a secure context, with execCommand */
async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* not available, or not allowed */ }
  const [box, focused] = [make("textarea", "unseen", text), document.activeElement];
  document.body.append(box);
  box.select();
  const done = document.execCommand("copy");
  box.remove();
  focused?.focus({ preventScroll: true });
  return done;
}
function copyButton(text) {
  const element = button("Copy", async () => {
    element.textContent = (await copy(text())) ? "Copied" : "Not allowed here";
    say(element.textContent);
    setTimeout(() => { element.textContent = "Copy"; }, 1500);
  }, "link copy");
  return element;
}
