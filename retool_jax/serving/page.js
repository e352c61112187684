"use strict";
// A chat with the server that this page comes from, over /v1/responses. Everything that the model, its programs or a
// client wrote is inserted into the page only as text; the Content-Security-Policy (serving/page.py) forbids anything else.

const SHORT = 1024;  // tokens; with a shorter context a question does not continue the conversation by default
const EXAMPLES = ["Compute 347 * 826.", "What is the gcd of 462 and 198?", "What is 123 to the power 456 modulo 789?"];
const LOGS = "code_interpreter_call.outputs";
const $ = id => document.getElementById(id);
const settings = $("settings"), log = $("log"), question = $("ask").elements.question;

let previous = null;  // id of the response that the next one continues
let begun = 0;  // number of chats; an answer of an earlier chat is not continued
let asking = null;  // aborts the request that is being answered
let served = {};  // the model's entry in /v1/models

/** An element with a class and children; a string becomes text. */
function make(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter(child => child !== null && child !== undefined));
  return node;
}

function button(words, act) {
  const node = make("button", "", words);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

// ----------------------------------------------------------------------------------------------------- the server

/** A request; throws an Error with the server's message. */
async function call(path, options = {}) {
  const headers = { "Content-Type": "application/json" };
  if (settings.elements.token.value) headers.Authorization = `Bearer ${settings.elements.token.value}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  if (response.status === 401) openSettings(true, "token");
  throw new Error(told?.error?.message ?? `the server said ${response.status}`);
}

/** The events of a stream, as objects. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the answer broke off before its end");
    const blocks = (text + value).split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find(line => line.startsWith("data: ")).slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function connect() {
  const line = $("model");
  try {
    [served] = (await (await call("v1/models")).json()).data;
    line.textContent = `${served.id}, up to ${served.max_model_len.toLocaleString("en")} tokens`;
    line.title = line.textContent;
    line.className = "muted up";
    $("python").hidden = !served.tools.includes("code_interpreter");
    $("ask").elements.follows.checked = served.max_model_len >= SHORT;
  } catch (error) {
    line.textContent = error.message;
    line.className = "muted down";
  }
}

function body(text) {
  const { temperature, max_output_tokens, seed, python } = settings.elements;
  const follows = $("ask").elements.follows.checked ? previous : null;
  const asked = { input: text, stream: true, include: [LOGS], previous_response_id: follows };
  if (!follows && python.checked && served.tools?.includes("code_interpreter")) {
    asked.tools = [{ type: "code_interpreter", container: { type: "auto" } }];
  }
  for (const field of [temperature, max_output_tokens, seed]) if (field.value) asked[field.name] = Number(field.value);
  return asked;
}

// ------------------------------------------------------------------------------------------------------ an answer

const PYTHON = new RegExp([
  /(?<c>#[^\n]*)/,
  /(?<s>(?:\b[rbfuRBFU]{1,2})?(?:"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?))/,
  /(?<n>\b\d[\w.]*)/,
  /(?<k>\b(?:and|as|assert|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|not|or|pass|raise|return|try|while|with|yield|None|True|False)\b)/,
  /\w+/,
].map(part => part.source).join("|"), "g");

/** Code as text and coloured spans. */
function coloured(code) {
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

/** Words as text, with the content of \boxed{...} marked. */
function boxed(words) {
  const pieces = [];
  let last = 0;
  for (const { index } of words.matchAll(/\\boxed\s*\{/g)) {
    const start = words.indexOf("{", index) + 1;
    let end = start;
    for (let depth = 1; end < words.length; end++) {
      depth += (words[end] === "{") - (words[end] === "}");
      if (!depth) break;
    }
    if (index < last || end === words.length) continue;
    const mark = make("mark", "", words.slice(start, end));
    mark.title = "the final answer";
    pieces.push(words.slice(last, index), mark);
    last = end + 1;
  }
  return [...pieces, words.slice(last)];
}

const HEADS = { in_progress: "Python, running", completed: "Python", failed: "a call that cannot be read", incomplete: "Python, not run to its end" };

/** The display of an item: its node, and functions that change it. */
const SHOWS = {
  message() {
    const node = make("p", "text");
    node.dir = "auto";
    return { node, grow: words => node.append(words), end: item => node.replaceChildren(...boxed(item.content[0]?.text ?? "")) };
  },
  reasoning() {
    const text = make("div", "text"), node = make("details", "thought", make("summary", "", "Thought"), text);
    node.open = true;
    text.dir = "auto";
    return { node, grow: words => text.append(words), end: () => {} };
  },
  code_interpreter_call() {
    const head = make("small", "", HEADS.in_progress), code = make("pre", "");
    const node = make("div", "block", head, code);
    return {
      node,
      grow: words => code.replaceChildren(...coloured(code.textContent + words)),
      end(item) {
        head.textContent = HEADS[item.status];
        node.classList.toggle("failed", item.status !== "completed");
        const printed = (item.outputs ?? []).map(output => output.logs).join("\n");
        if (item.outputs) node.append(make("div", "output", make("small", "", "Output"), make("pre", "", printed || "(nothing)")));
      },
    };
  },
};

/** An answer in the page, which grows with its events. */
class Answer {
  constructor() {
    this.items = new Map();
    this.blocks = make("div", "growing", make("p", "waiting", "waiting for its first token"));
    this.told = make("span", "", "");
    this.foot = make("div", "foot", this.told);
    this.node = make("li", "answer", this.blocks, this.foot);
    this.began = performance.now();
    this.clock = setInterval(() => { this.told.textContent = this.seconds(); }, 100);
  }

  seconds() { return `${((performance.now() - this.began) / 1000).toFixed(1)} s`; }

  take(event) {
    if (event.type === "response.output_item.added" && SHOWS[event.item.type]) {
      this.blocks.querySelector(".waiting")?.remove();
      const shown = SHOWS[event.item.type]();
      this.items.set(event.item.id, shown);
      this.blocks.append(shown.node);
    } else if (event.type.endsWith(".delta")) {
      this.items.get(event.item_id)?.grow(event.delta);
    } else if (event.type === "response.output_item.done") {
      this.items.get(event.item.id)?.end(event.item);
    } else if (event.response?.error) {
      throw new Error(event.response.error.message);
    }
  }

  /** End the answer with a response, or with the reason `why`: it was stopped, or an error. */
  end(response, why) {
    clearInterval(this.clock);
    this.blocks.className = "";
    this.blocks.querySelector(".waiting")?.remove();
    for (const thought of this.blocks.querySelectorAll("details.thought")) thought.open = !response;
    if (why) this.blocks.append(make("p", "problem", why));
    const parts = [this.seconds()];
    if (response) {
      const { output_tokens: drawn, input_tokens: read } = response.usage;
      const reason = response.incomplete_details?.reason.replaceAll("_", " ");
      parts.push(`${drawn} tokens drawn`, `${read} read`, reason ? `cut off: ${reason}` : "complete");
      const details = make("div", "details");
      details.hidden = true;
      const opener = button("Details", () => openDetails(opener, details, response.id));
      opener.setAttribute("aria-expanded", "false");
      this.foot.append(opener);
      this.node.append(details);
    }
    this.told.textContent = parts.join(" · ");
  }
}

// -------------------------------------------------------------------------------------------------------- details

async function openDetails(opener, details, id) {
  details.hidden = !details.hidden;
  opener.setAttribute("aria-expanded", String(!details.hidden));
  if (details.hidden || details.firstChild) return;
  try {
    const path = `v1/trajectories/${id}`;
    const [trajectory] = (await (await call(`${path}?tokens=true`)).json()).data;
    details.append(...describe(trajectory, path));
  } catch (error) {
    details.replaceChildren(make("p", "problem", error.message));
  }
}

/** Nodes with a trajectory's numbers and all of its tokens. */
function describe(trajectory, path) {
  const { ids, tokens, sampled, logprobs, versions } = trajectory;
  const drawn = logprobs.filter((_, index) => sampled[index]);
  const sum = drawn.reduce((total, each) => total + each, 0);
  const facts = {
    end: trajectory.end, turns: trajectory.turns, programs: trajectory.tool_calls.length, tokens: ids.length, drawn: drawn.length,
    "log-probability": sum.toFixed(2), "mean of a token": drawn.length ? (sum / drawn.length).toFixed(3) : "none", record: path,
  };
  const entries = Object.entries(facts).map(([name, value]) => make("span", "", `${name} `, make("b", "", String(value))));
  const save = button("Save as JSON", () => {
    const link = make("a", "");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(trajectory)], { type: "application/json" }));
    link.download = `${trajectory.id.replace(/\W+/g, "-")}.json`;
    link.click();
    URL.revokeObjectURL(link.href);
  });
  const pointed = make("p", "pointed", "Point at a token. The warmer its colour, the less likely it was.");
  const segments = trajectory.segments.map(segment => {
    const spans = ids.slice(segment.start, segment.stop).map((id, offset) => {
      const index = segment.start + offset, span = make("span", "", tokens[index]);
      if (sampled[index]) span.style.setProperty("--heat", `${Math.min(Math.round(-logprobs[index] * 40), 100)}%`);
      span.dataset.index = index;
      return span;
    });
    return make("div", `segment ${segment.role}`, make("small", "", `${segment.role}, ${spans.length} tokens`), make("div", "", ...spans));
  });
  const tell = event => {
    const index = event.target.dataset?.index;
    if (index === undefined) return;
    const share = sampled[index] ? `log-prob ${logprobs[index].toFixed(4)} (${(100 * Math.exp(logprobs[index])).toPrecision(3)} %), weights ${versions[index]}` : "not drawn";
    pointed.textContent = `token ${index}: ${JSON.stringify(tokens[index])}, id ${ids[index]}, ${share}`;
  };
  const whole = make("div", "", ...segments);
  whole.addEventListener("pointerover", tell);
  whole.addEventListener("click", tell);  // for touch screens
  return [make("div", "facts", ...entries, save), whole, pointed];
}

// ----------------------------------------------------------------------------------------------------------- chat

async function ask(text) {
  const chat = begun, stops = new AbortController(), answer = new Answer();
  asking = stops;
  busy();
  $("empty").hidden = true;
  const asked = make("li", "asked", text);
  asked.dir = "auto";
  log.append(asked, answer.node);
  scrollTo(0, document.body.scrollHeight);
  try {
    const response = await call("v1/responses", { method: "POST", body: JSON.stringify(body(text)), signal: stops.signal });
    for await (const event of events(response)) {
      const follows = innerHeight + scrollY > document.body.scrollHeight - 60;
      answer.take(event);
      if (["response.completed", "response.incomplete"].includes(event.type)) {
        answer.end(event.response, "");
        if (chat === begun) previous = event.response.id;
      }
      if (follows) scrollTo(0, document.body.scrollHeight);
    }
  } catch (error) {
    answer.end(null, error.name === "AbortError" ? "Stopped. The next question goes on from the answer before this one." : error.message);
    if (!question.value && chat === begun && error.name !== "AbortError") question.value = text;
  }
  if (asking === stops) asking = null;
  busy();
}

function busy() {
  $("send").hidden = Boolean(asking);
  $("stop").hidden = !asking;
  $("new").disabled = !log.firstChild;
}

function openSettings(open, name) {
  settings.hidden = !open;
  $("set").setAttribute("aria-expanded", String(open));
  if (open) settings.elements[name].focus();
}

function themes() {
  const names = ["auto", "light", "dark"];
  const kept = act => { try { return act(); } catch { return null; } };  // storage may be disabled
  const show = name => {
    document.documentElement.dataset.theme = name;
    $("theme").querySelector("span").textContent = name;
  };
  const stored = kept(() => localStorage.getItem("retool-theme"));
  show(names.includes(stored) ? stored : "auto");
  $("theme").addEventListener("click", () => {
    const next = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
    show(next);
    kept(() => localStorage.setItem("retool-theme", next));
  });
  settings.elements.token.value = kept(() => sessionStorage.getItem("retool-token")) ?? "";
  settings.elements.token.addEventListener("change", event => {
    kept(() => sessionStorage.setItem("retool-token", event.target.value));
    connect();
  });
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const text = question.value.trim();
  if (asking || !text || !settings.reportValidity()) return;
  question.value = "";
  ask(text);
});
question.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
document.addEventListener("keydown", event => { if (event.key === "Escape") asking?.abort(); });
$("stop").addEventListener("click", () => asking?.abort());
$("set").addEventListener("click", () => openSettings(settings.hidden, "temperature"));
settings.addEventListener("submit", event => event.preventDefault());
$("new").addEventListener("click", () => {
  asking?.abort();
  asking = previous = null;
  begun += 1;
  log.replaceChildren();
  $("empty").hidden = false;
  busy();
  question.focus();
});
$("examples").append(...EXAMPLES.map(text => make("li", "", button(text, () => { if (!asking) ask(text); }))));
themes();
connect();
question.focus();
