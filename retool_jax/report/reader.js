"use strict";
// The reader of the report's page: a list of trajectories, filters, search, and the trajectory that is opened.
// What a run wrote comes from blocks (compressed JSON in base64) and goes into the page as text alone.

const $ = id => document.getElementById(id);

// ------------------------------------------------------------------------------------------- pieces of a page

/** An element with a class and children; a string becomes text. */
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

function themeButton() {
  const button = $("theme"), names = ["auto", "light", "dark"];
  const show = name => {
    document.documentElement.dataset.theme = name;
    button.querySelector("span").textContent = name;
  };
  const kept = store => { try { return store(); } catch { return null; } };  // a page from a file may have no storage
  const stored = kept(() => localStorage.getItem("retool-theme"));
  show(names.includes(stored) ? stored : "auto");
  button.hidden = false;
  button.addEventListener("click", () => {
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    show(next);
    kept(() => localStorage.setItem("retool-theme", next));
  });
}

/** The JSON of a block. */
async function unpack(node) {
  const bytes = Uint8Array.from(atob(node.textContent), character => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}

// ------------------------------------------------------------------------------------------------ what is shown

const PYTHON = new RegExp([
  /(?<c>#[^\n]*)/,
  /(?<s>\b[rbfuRBFU]{0,2}(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?)|(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))/,
  /(?<n>\b(?:0[xXoObB][\da-fA-F_]+|\d[\d_]*(?:\.[\d_]*)?(?:[eE][+-]?\d+)?j?)\b)/,
  /(?<k>\b(?:and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield|None|True|False|true|false|null)\b)/,
  /(?<f>\b[A-Za-z_]\w*(?=\())/,
  /[A-Za-z_]\w*/,
].map(part => part.source).join("|"), "g");

/** Code as text and coloured spans. */
function highlighted(code) {
  const pieces = [];
  let last = 0;
  for (const match of code.matchAll(PYTHON)) {
    const kind = Object.keys(match.groups).find(name => match.groups[name] !== undefined);
    if (!kind) continue;
    pieces.push(code.slice(last, match.index), make("span", kind, match[0]));
    last = match.index + match[0].length;
  }
  return [...pieces, code.slice(last)];
}

/** Words with their \boxed{...} set apart. */
function said(text) {
  return text.split(/(\\boxed\{(?:[^{}]|\{[^{}]*\})*\})/).map((piece, i) => (i % 2 ? make("mark", "", piece) : piece));
}

function partNodes(detail) {
  return detail.parts.map(([kind, text, note, failed]) => {
    if (kind === "reasoning") return make("div", "reasoning", ...said(text));
    const title = (kind === "code" ? "code" : "output") + (note ? ` · ${note}` : "");
    const body = make("pre", "", ...(kind === "code" ? highlighted(text) : [text]));
    return make("div", `block ${kind}${failed ? " failed" : ""}`, make("small", "", title), body);
  });
}

/** -log-prob of a code (see `logprob_codes`). */
const surprise = code => (code / 64) ** 2;

/** Segments token by token: which were drawn, and how probable each was. */
function tokenNodes(detail, table, heat) {
  const drawn = detail.mask.flatMap((count, i) => Array(count).fill(i % 2 === 1));
  const codes = detail.ids.map(() => 0);
  let next = 0;
  drawn.forEach((sampled, i) => { if (sampled) codes[i] = detail.logprobs[next++]; });
  const nodes = detail.segments.map(([role, start, stop, text]) => {
    const body = make("div");
    if (table) {
      for (let i = start; i < stop; i++) {
        const span = make("span", drawn[i] ? "drawn" : "", (table[detail.ids[i]] ?? `[${detail.ids[i]}]`).replaceAll("\n", "↵\n"));
        span.dataset.token = `id ${detail.ids[i]}, ` + (drawn[i]
          ? `drawn, p ${Math.exp(-surprise(codes[i])).toPrecision(3)} (log p ${codes[i] === 255 ? "below -15.8" : (-surprise(codes[i])).toFixed(3)})`
          : "not drawn: no part in the loss");
        if (drawn[i]) span.style.setProperty("--heat", `${Math.min(100, Math.round(28 * Math.sqrt(codes[i] / 16)))}%`);
        body.append(span);
      }
    } else {
      body.append(make("span", role === "policy" ? "drawn" : "", text ?? ""));
    }
    const sampled = drawn.slice(start, stop).filter(Boolean).length;
    return make("div", `segment ${role}`, make("small", "", `${role} · ${stop - start} tokens, ${sampled} drawn`), body);
  });
  const box = make("div", heat ? "heat" : "", ...nodes);
  box.addEventListener("mouseover", event => { if (event.target.dataset.token) event.target.title = event.target.dataset.token; });
  return box;
}

/** Decode, wait and tool in their order. The record has the seconds of each call and of all together; what is not a
    call's is shared out by the policy's tokens. */
function timeline(detail) {
  const [start, stop] = detail.times;
  if (start === null || stop === null || !(stop > start)) return null;
  const turns = detail.segments.filter(([role]) => role === "policy").map(([, first, last]) => last - first);
  const calls = turns.map((_, turn) => detail.calls.filter(call => call[0] === turn));
  const longest = (list, key) => Math.max(0, ...list.map(call => call[key] || 0));  // calls of a turn run side by side
  const waits = calls.map(list => longest(list, 2)), runs = calls.map(list => longest(list, 3));
  const sum = list => list.reduce((a, b) => a + b, 0);
  const rest = Math.max(0, stop - start - sum(waits) - sum(runs));
  const seconds = value => (value < 1 ? `${Math.round(1000 * value)} ms` : `${value.toFixed(1)} s`);
  const track = make("div", "track");
  turns.forEach((tokens, turn) => {
    const decode = rest * tokens / Math.max(1, sum(turns));
    for (const [kind, value, title] of [
      ["decode", decode, `turn ${turn + 1}: ${tokens} tokens, about ${seconds(decode)}`],
      ["wait", waits[turn], `waited ${seconds(waits[turn])} for a worker`],
      ["ran", runs[turn], `tool ran ${seconds(runs[turn])}`],
    ]) {
      if (!value) continue;
      const piece = make("i", kind);
      piece.style.flexGrow = 1000 * value / (stop - start);
      piece.title = title;
      track.append(piece);
    }
  });
  const legend = make("div", "legend", make("i", "decode"), `decode and the rest ${seconds(rest)}`);
  if (detail.calls.length) {
    legend.append(make("i", "wait"), `wait for a worker ${seconds(sum(waits))}`, make("i", "ran"), `tool ${seconds(sum(runs))}`);
  }
  legend.title = "The record has the time of each call and of the whole; the rest is shared out by the tokens of each turn.";
  return make("div", "timeline", track, legend);
}

// ------------------------------------------------------------------------------------------------- the reader

class Reader {
  rowHeight = 58;
  tokens = false;  // the view of the opened trajectory
  heat = false;
  opened = -1;  // number of the opened trajectory
  search = 0;  // number of the search that is under way; an older one stops
  texts = [];  // of each trajectory, in lower case, once it was searched

  constructor(index) {
    this.columns = index.columns;
    this.runs = index.runs;
    this.outcomes = index.outcomes;
    this.starts = index.starts;
    this.tableOf = index.tables;
    this.count = index.columns.id.length;
    this.blocks = [...document.querySelectorAll("script.details")];
    this.shown = Array.from({ length: this.count }, (_, i) => i);
    this.form = $("filters");
    this.list = $("list");
    this.detail = $("detail");
    this.fillChoices();
    this.listen();
  }

  fillChoices() {
    const fill = (name, all, values, text = value => value) => {
      const select = this.form.elements[name];
      select.append(new Option(all, ""), ...values.map(value => new Option(text(value), value)));
      select.hidden = values.length < 2;
    };
    const distinct = column => [...new Set(this.columns[column])];
    fill("run", "all runs", this.runs.map((_, i) => i), i => this.runs[i]);
    fill("split", "all splits", distinct("split"));
    fill("step", "all steps", distinct("step").filter(step => step !== null).sort((a, b) => a - b), step => `step ${step}`);
    fill("outcome", "any verdict", distinct("outcome").sort(), i => this.outcomes[i]);
    fill("end", "any end", distinct("end").sort());
  }

  listen() {
    let typing = 0;
    this.form.addEventListener("submit", event => event.preventDefault());
    this.form.addEventListener("input", event => {
      clearTimeout(typing);
      typing = setTimeout(() => this.filter(), event.target.type === "search" ? 200 : 0);
    });
    this.form.elements.clear.addEventListener("click", () => { this.form.reset(); this.filter(); });
    this.list.addEventListener("scroll", () => requestAnimationFrame(() => this.drawRows()));
    new ResizeObserver(() => this.drawRows()).observe(this.list);
    this.list.addEventListener("click", event => {
      const row = event.target.closest(".row");
      if (row) this.open(Number(row.dataset.number));
    });
    document.addEventListener("keydown", event => this.key(event));
    window.addEventListener("hashchange", () => this.openHash());
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName), inList = event.target === this.list;
    const searching = event.target.name === "text";
    const actions = {
      j: () => this.move(1), k: () => this.move(-1),
      "/": () => { this.form.elements.text.focus(); this.form.elements.text.select(); },
      t: () => this.show(!this.tokens, this.heat), l: () => this.show(true, !(this.tokens && this.heat)),
      Escape: () => this.close(),
    };
    if (inList) Object.assign(actions, { ArrowDown: actions.j, ArrowUp: actions.k, Enter: () => this.detail.focus() });
    const inSearch = { Escape: () => { event.target.value = ""; this.filter(); event.target.blur(); }, ArrowDown: () => { this.list.focus(); this.move(1); } };
    inSearch.Enter = inSearch.ArrowDown;
    const action = typing ? searching && inSearch[event.key] : actions[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  }

  // ------------------------------------------------------------------------------------- which ones are listed

  fits(i, choice) {
    const c = this.columns;
    if (choice.run !== "" && c.run[i] !== Number(choice.run)) return false;
    if (choice.split !== "" && c.split[i] !== choice.split) return false;
    if (choice.step !== "" && c.step[i] !== Number(choice.step)) return false;
    if (choice.outcome !== "" && c.outcome[i] !== Number(choice.outcome)) return false;
    if (choice.end !== "" && c.end[i] !== choice.end) return false;
    if (choice.least !== "" && c.tokens[i] < Number(choice.least)) return false;
    if (choice.most !== "" && c.tokens[i] > Number(choice.most)) return false;
    return { "": true, used: c.calls[i] > 0, none: c.calls[i] === 0, error: c.errors[i] > 0 }[choice.tool];
  }

  /** List what the filters let through; with words to search for, block after block. */
  async filter() {
    const choice = Object.fromEntries(new FormData(this.form)), search = ++this.search;
    const words = choice.text.trim().toLowerCase();
    const all = Array.from({ length: this.count }, (_, i) => i).filter(i => this.fits(i, choice));
    this.words = words;
    if (!words) return this.listed(all, choice.sort);
    const found = [];
    for (let block = 0; block < this.blocks.length; block++) {
      const inBlock = all.filter(i => i >= this.starts[block] && i < (this.starts[block + 1] ?? this.count));
      if (!inBlock.length) continue;
      if (this.texts[inBlock[0]] === undefined) await this.readTexts(block);
      if (search !== this.search) return;
      found.push(...inBlock.filter(i => this.texts[i].includes(words)));
      if (block % 8 === 0) this.listed(found, choice.sort, `searching, ${Math.round(100 * block / this.blocks.length)} %: `);
    }
    this.listed(found, choice.sort);
  }

  async readTexts(block) {
    (await unpack(this.blocks[block])).forEach((detail, i) => {
      const texts = [detail.problem, detail.truth, detail.answer, detail.fault, ...detail.parts.map(part => part[1])];
      const number = this.starts[block] + i;
      this.texts[number] = [this.columns.id[number], ...texts].filter(text => typeof text === "string").join("\n").toLowerCase();
    });
  }

  listed(numbers, sort, state = "") {
    if (sort) {
      const column = this.columns[sort.replace("-", "")], sign = sort.startsWith("-") ? -1 : 1;
      numbers = [...numbers].sort((a, b) => sign * (column[a] - column[b]) || a - b);
    }
    this.shown = numbers;
    this.form.elements.status.textContent = `${state}${numbers.length.toLocaleString("en")} of ${this.count.toLocaleString("en")}`;
    $("rows").style.height = `${numbers.length * this.rowHeight}px`;
    this.drawRows();
    this.markFound();
  }

  /** Only the rows that can be seen are in the page. */
  drawRows() {
    const first = Math.max(0, Math.floor(this.list.scrollTop / this.rowHeight) - 4);
    const last = first + Math.ceil((this.list.clientHeight || 600) / this.rowHeight) + 8;
    const c = this.columns;
    $("rows").replaceChildren(...this.shown.slice(first, last).map((i, offset) => {
      const outcome = this.outcomes[c.outcome[i]];
      const facts = [c.split[i] + (c.step[i] === null ? "" : ` ${c.step[i]}`), `${c.tokens[i]} tok`,
        c.calls[i] ? `${c.calls[i]} ${c.calls[i] > 1 ? "calls" : "call"}` : "", c.errors[i] ? `${c.errors[i]} failed` : "",
        c.end[i] === "answered" ? "" : c.end[i], this.runs[c.run[i]]];
      const mark = make("i", outcome, { right: "✓", wrong: "✗", dropped: "–" }[outcome]);
      mark.title = outcome;
      const row = make("div", "row", make("b", "", c.problem[i] || c.id[i]), make("span", "", mark, facts.filter(Boolean).join(" · ")));
      row.style.top = `${(first + offset) * this.rowHeight}px`;
      row.dataset.number = i;
      row.id = `row-${i}`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(i === this.opened));
      return row;
    }));
    if (!this.shown.length) $("rows").append(make("p", "muted empty", "No trajectory is like that."));
    this.list.setAttribute("aria-activedescendant", `row-${this.opened}`);
  }

  // ------------------------------------------------------------------------------------ the one that is opened

  move(by) {
    if (!this.shown.length) return;
    const at = this.shown.indexOf(this.opened);
    this.open(this.shown[at < 0 ? 0 : Math.min(this.shown.length - 1, Math.max(0, at + by))]);
  }

  async open(number) {
    this.opened = number;
    const top = this.shown.indexOf(number) * this.rowHeight, bottom = top + this.rowHeight;
    if (top >= 0 && top < this.list.scrollTop) this.list.scrollTop = top;
    if (bottom > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = bottom - this.list.clientHeight;
    this.drawRows();
    let block = this.starts.findLastIndex(start => start <= number);
    if (this.block !== block) {
      const details = await unpack(this.blocks[block]);
      if (this.opened !== number) return;  // another was opened meanwhile
      this.details = details;
      this.block = block;
    }
    $("reader").classList.add("reading");
    try { history.replaceState(null, "", `#trajectory-${number}`); } catch { /* a page without an address */ }
    await this.show(this.tokens, this.heat);
    this.detail.scrollTop = 0;
  }

  openHash() {
    const match = /^#trajectory-(\d+)$/.exec(location.hash);
    if (match && Number(match[1]) < this.count) this.open(Number(match[1])).then(() => $("reader").scrollIntoView());
  }

  close() {
    $("reader").classList.remove("reading");
    this.list.focus();
  }

  /** Draw the opened trajectory: as text, or by its tokens, with or without the colours of log-probs. */
  async show(tokens, heat) {
    this.tokens = tokens;
    this.heat = heat;
    if (this.opened < 0) return;
    const number = this.opened, c = this.columns, detail = this.details[number - this.starts[this.block]];
    if (tokens && !this.tables) this.tables = await unpack($("tokens"));
    if (number !== this.opened) return;
    const outcome = this.outcomes[c.outcome[number]];
    const button = (text, pressed, action, className = "") => {
      const node = make("button", className, text);
      node.type = "button";
      if (pressed !== null) node.setAttribute("aria-pressed", String(pressed));
      node.addEventListener("click", action);
      return node;
    };
    const views = make("span", "tools", button("text", !tokens, () => this.show(false, heat)),
      button("tokens: mask", tokens && !heat, () => this.show(true, false)),
      button("tokens: log-probs", tokens && heat, () => this.show(true, true)));
    const place = [this.runs[c.run[number]], c.split[number], c.step[number] === null ? "" : `step ${c.step[number]}`, c.id[number]];
    const top = make("div", "top", button("← list", null, () => this.close(), "back"),
      make("span", `verdict ${outcome}`, { right: "✓ right", wrong: "✗ wrong", dropped: "– dropped" }[outcome]),
      make("span", "", place.filter(Boolean).join(" · ")), views);
    const terms = Object.entries(detail.reward_terms || {});
    const facts = [["answer", detail.answer ?? "none"], ["ground truth", detail.truth], ["verdict", detail.verdict],
      ["reward", detail.reward ?? "-"], ["terms", terms.length > 1 ? terms.map(([name, value]) => `${name} ${value}`).join(", ") : null],
      ["end", c.end[number]], ["fault", detail.fault], ["forced", detail.forced ? "yes" : null], ["turns", detail.turns],
      ["calls", c.calls[number]], ["failed", c.errors[number] || null], ["tokens", `${detail.prompt_tokens} + ${c.tokens[number]}`],
      ["mean surprise", c.surprise[number] === null ? null : `${c.surprise[number].toFixed(3)} nats`]];
    const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
    const shown = known.map(([name, value]) => make("span", "", `${name} `, make("b", "", String(value))));
    const table = tokens ? this.tables[this.tableOf[c.run[number]]] : null;
    const body = tokens ? [tokenNodes(detail, typeof table === "string" ? null : table, heat)] : partNodes(detail);
    if (typeof table === "string") body.unshift(make("p", "muted", `Segments as a whole, since there is no tokenizer to take them apart: ${table}`));
    this.detail.replaceChildren(top, make("h3", "", String(detail.problem)), make("div", "facts", ...shown),
      ...[timeline(detail)].filter(Boolean), ...body);
    this.markFound();
  }

  /** Colour what was searched for in the opened trajectory. */
  markFound() {
    if (!globalThis.CSS?.highlights) return;
    CSS.highlights.delete("found");
    if (!this.words || this.opened < 0) return;
    const ranges = [], walker = document.createTreeWalker(this.detail, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
      const text = node.data.toLowerCase();
      for (let at = text.indexOf(this.words); at >= 0; at = text.indexOf(this.words, at + this.words.length)) {
        const range = new Range();
        try { range.setStart(node, at); range.setEnd(node, at + this.words.length); ranges.push(range); } catch { break; }
      }
    }
    if (ranges.length) CSS.highlights.set("found", new Highlight(...ranges));
  }
}

async function start() {
  themeButton();
  if (!$("index")) return;
  const reader = new Reader(await unpack($("index")));
  $("reader").hidden = false;
  await reader.filter();
  if (location.hash.startsWith("#trajectory-")) reader.openHash();
  else if (matchMedia("(min-width: 861px)").matches && reader.count) {
    reader.opened = 0;
    await reader.open(reader.shown[0]);
  }
  document.documentElement.dataset.ready = Math.round(performance.now());
}

start();
