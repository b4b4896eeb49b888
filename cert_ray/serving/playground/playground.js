// The playground: asks the server that it came from, streams, and shows how the answer came about.
// No network assets, no storage: a key stays in its field.

const EXAMPLES = {
  "Sort a table": `import pandas as pd

df = pd.DataFrame({"city": ["Rome", "Oslo", "Cairo"], "people": [2.8, 0.7, 10.1]})
# the cities by people, most first
ranking =`,
  "Group and sum": `import pandas as pd

def total_by_month(df):
    """Sum the column 'amount' for each value of the column 'month'."""
    return`,
  "Drop missing": `import pandas as pd

df = pd.read_csv("measurements.csv")
# remove rows in which the column 'value' is missing
df =`,
  "Normalise": `import numpy as np

x = np.array([[1.0, 2.0], [3.0, 4.0]])
# every row divided by its sum
y =`,
};
const SHOWN_ANSWERS = 8;
const element = (id) => document.getElementById(id);
const numbers = ["n", "temperature", "top_p", "max_tokens", "seed"];
let running = null;

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, bad = false) {
  element("status").textContent = text;
  element("status").classList.toggle("bad", bad);
}

function headers() {
  const key = element("key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function readRequest() {
  const body = { model: element("model").value || "cert", prompt: element("prompt").value };
  for (const name of numbers) {
    if (element(name).value !== "") body[name] = Number(element(name).value);
  }
  return body;
}

// ---- the same request, as text ----

function asPython(value) {
  // Every JSON string is a Python string, but for characters beyond the basic plane, which JSON.stringify leaves alone.
  return JSON.stringify(value);
}

function showCode() {
  const body = readRequest();
  const url = new URL("v1", document.baseURI).href;
  const wantsKey = !element("key-label").hidden;
  const json = JSON.stringify(body, null, 1).replaceAll("'", "'\\''");
  const keyLine = wantsKey ? ` \\\n  -H "Authorization: Bearer $CERT_RAY_API_KEY"` : "";
  element("curl").textContent =
    `curl ${url}/completions \\\n  -H 'Content-Type: application/json'${keyLine} \\\n  -d '${json}'`;
  const key = wantsKey ? `os.environ["CERT_RAY_API_KEY"]` : `"unused"`;
  const options = Object.entries(body).map(([name, value]) => `    ${name}=${asPython(value)},\n`).join("");
  element("python").textContent =
    `${wantsKey ? "import os\n\n" : ""}import openai\n\nclient = openai.OpenAI(base_url=${asPython(url)}, api_key=${key})\n` +
    `completion = client.completions.create(\n${options})\nprint(completion.choices[0].text)`;
}

async function copy(event) {
  const button = event.currentTarget;
  const text = element(button.dataset.copies).textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(element(button.dataset.copies));
    button.textContent = "Selected";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 1500);
}

// ---- sketches and what was filled in ----

// Offsets of the server count code points, those of JavaScript's strings count UTF-16 units.
function pieces(candidate) {
  const points = Array.from(candidate.text);
  const found = [];
  let end = 0;
  for (const hole of candidate.placeholders) {
    found.push({ text: points.slice(end, hole.start).join("") });
    found.push({ text: points.slice(hole.start, hole.end).join(""), hole: true });
    end = hole.end;
  }
  found.push({ text: points.slice(end).join("") });
  if (!candidate.text.includes("\n")) found[0].text = found[0].text.trimStart();
  return found.filter((piece) => piece.text !== "");
}

// What may be filled into a placeholder, by its word. Adjacent strings are one placeholder.
const STRING = `[a-zA-Z]{0,2}(?:"(?:[^"\\\\\\n]|\\\\.)*"|'(?:[^'\\\\\\n]|\\\\.)*')`;
const STRINGS = `${STRING}(?:\\s*${STRING})*`;
const NUMBER = "[0-9][0-9_a-fA-FxXoO]*";
const REAL = "[0-9_]*\\.?[0-9_]*(?:[eE][+-]?[0-9_]+)?[jJ]?";
const NAME = "[\\p{L}_][\\p{L}\\p{N}_]*";
const FILLERS = {
  number: NUMBER, float: REAL, floatexponant: REAL, complex: REAL,
  func: NAME, AnClass: NAME, variable: NAME, argument: NAME,
};

// The parts of `answer` that stand where the sketch has a hole; null where the answer does not follow the sketch.
export function filledParts(answer, sketch) {
  const escape = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
  const pattern = pieces(sketch).map((piece) => (
    piece.hole ? `(${FILLERS[piece.text] ?? STRINGS})` : escape(piece.text.trim()).replace(/\s+/g, "\\s+")));
  const match = new RegExp(`^\\s*${pattern.join("\\s*")}\\s*$`, "du").exec(answer);
  return match ? match.indices.slice(1) : null;
}

function showAnswerText(target, prompt, answer, sketch) {
  const lines = prompt.split("\n");
  const last = lines.at(-1) || lines.slice(-2).join("\n");
  target.replaceChildren(make("span", { className: "prompt", textContent: last }));
  const filled = sketch ? filledParts(answer, sketch) : null;
  let end = 0;
  for (const [from, to] of filled ?? []) {
    target.append(answer.slice(end, from), make("mark", { textContent: answer.slice(from, to) }));
    end = to;
  }
  target.append(answer.slice(end));
  return filled !== null;
}

function showSketches(vote) {
  element("sketches").replaceChildren(...vote.candidates.map((candidate) => {
    const code = make("p", { className: "sketch" });
    for (const piece of pieces(candidate)) {
      code.append(piece.hole ? make("span", { className: "hole", textContent: piece.text }) : piece.text);
    }
    if (!candidate.text.trim()) code.append(make("em", { textContent: "(empty)" }));
    const votes = `${candidate.votes} of ${vote.sketches}`;
    const bar = make("progress", { max: vote.sketches, value: candidate.votes });
    bar.setAttribute("aria-label", `${votes} votes`);
    return make("li", {}, make("div", { className: "votes" }, votes, bar), code);
  }));
  const early = vote.undecided ? ` The vote was certain with ${vote.undecided} samples still being drawn.` : "";
  element("sketches-note").textContent = `The first has most votes. Placeholders are underlined.${early}`;
}

const ROUTES = {
  model: "one plain model, without sketches",
  sketcher: "the sketch holds no placeholder, so it is the answer",
  generator: "the generator filled in the sketch",
  constrained: "the generator, held to the sketch, filled it in",
  generator_empty_sketch: "the sketch is empty, so the generator saw the prompt alone",
  generator_long_sketch: "the sketch does not fit the window, so the generator saw the prompt alone",
  sketcher_empty_generator: "the generator gave nothing, so the sketches are the answer",
};

function showTimes(trace, usage, firstS, totalS) {
  const rows = Object.entries(trace.timings_s).map(([stage, seconds]) => [`Stage: ${stage}`, seconds]);
  const stages = rows.reduce((sum, [, seconds]) => sum + seconds, 0);
  if (firstS !== null) rows.push(["To the first event", firstS]);
  if (!trace.from_cache) rows.push(["Network, queue", Math.max(0, totalS - stages)]);
  rows.push(["Total", totalS]);
  element("timing").tBodies[0].replaceChildren(...rows.map(([name, seconds]) => {
    const bar = make("progress", { max: totalS, value: Math.min(seconds, totalS) });
    bar.setAttribute("aria-hidden", "true");
    return make("tr", {}, make("th", { scope: "row", textContent: name }),
      make("td", { className: "number", textContent: `${(1000 * seconds).toFixed(0)} ms` }), make("td", {}, bar));
  }));
  const rate = usage.completion_tokens / totalS;
  element("timing").caption.textContent =
    `${usage.prompt_tokens} prompt tokens, ${trace.sketch_tokens} of sketches, ${usage.completion_tokens} of answers ` +
    `(${rate.toFixed(0)} a second)${trace.from_cache ? ", from the cache" : ""}; seed ${trace.seed}.`;
}

// ---- answers ----

class Answers {
  constructor(prompt) {
    this.prompt = prompt;
    this.texts = new Map();
    this.sketch = null;
    this.nodes = new Map();
    element("answers").replaceChildren();
  }

  add(choice) {
    this.texts.set(choice.index, (this.texts.get(choice.index) ?? "") + choice.text);
    if (choice.index >= SHOWN_ANSWERS) return;
    if (!this.nodes.has(choice.index)) {
      const code = make("code");
      this.nodes.set(choice.index, code);
      element("answers").append(make("li", {}, make("pre", {}, code)));
    }
    showAnswerText(this.nodes.get(choice.index), this.prompt, this.texts.get(choice.index), this.sketch);
  }

  // Equal answers become one, the most frequent first.
  finish(trace) {
    const counts = new Map();
    for (const [, text] of [...this.texts].sort(([one], [other]) => one - other)) {
      counts.set(text, (counts.get(text) ?? 0) + 1);
    }
    const ordered = [...counts].sort(([, one], [, other]) => other - one);
    const shown = ordered.slice(0, SHOWN_ANSWERS).map(([text, count]) => {
      const code = make("code");
      const follows = showAnswerText(code, this.prompt, text, this.sketch);
      const parts = this.texts.size > 1 ? [`${count} of ${this.texts.size}`] : [];
      if (!text.trim()) parts.push("empty");
      else if (this.sketch?.placeholders.length && !follows) parts.push("departs from the sketch");
      return make("li", {}, make("p", { className: "answer-line", textContent: parts.join(", ") }), make("pre", {}, code));
    });
    element("answers").replaceChildren(...shown);
    const more = ordered.length - shown.length;
    const by = trace.model && trace.model !== element("model").value ? ` Answered by ${trace.model}.` : "";
    const marked = this.sketch?.placeholders.length
      ? [" Filled-in details are ", make("mark", { textContent: "marked" }), "."] : [];
    element("answers-note").replaceChildren(
      `Route: ${ROUTES[trace.route] ?? trace.route}.${by}`, ...marked,
      more > 0 ? ` ${more} rarer answers are not shown.` : "");
  }
}

// ---- asking ----

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.replace(/^data: /, "");
      if (line === "[DONE]") return;
      yield JSON.parse(line);
    }
  }
}

async function refusal(response) {
  let message = `${response.status} ${response.statusText}`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not OpenAI's shape: the status must do */ }
  if (response.status === 401) element("key-label").hidden = false;
  const wait = response.headers.get("Retry-After");
  return new Error(wait ? `${message} (again in ${wait} s)` : message);
}

async function complete() {
  const body = readRequest();
  const answers = new Answers(body.prompt);
  const began = performance.now();
  let firstS = null;
  let ended = false;
  const response = await fetch(new URL("v1/completions", document.baseURI), {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers() },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal: running.signal,
  });
  if (!response.ok) throw await refusal(response);
  for await (const event of events(response)) {
    firstS ??= (performance.now() - began) / 1000;
    if (event.error) throw new Error(event.error.message);
    if (event.cert?.vote) {
      answers.sketch = event.cert.vote.candidates[0] ?? null;
      showSketches(event.cert.vote);
      say("The sketch is chosen; drawing the answer.");
    }
    event.choices.forEach((choice) => { if (choice.text || choice.finish_reason) answers.add(choice); });
    if (event.usage) {
      ended = true;
      answers.finish(event.cert);
      showTimes(event.cert, event.usage, firstS, (performance.now() - began) / 1000);
    }
  }
  if (!ended) throw new Error("The answer ended early.");
}

// Not `disabled`: that takes the focus from the button that was just pressed.
function showRunning(is) {
  element("run").setAttribute("aria-disabled", is);
  element("stop").setAttribute("aria-disabled", !is);
}

async function run() {
  if (running) return;
  running = new AbortController();
  showRunning(true);
  element("sketches").replaceChildren();
  element("timing").tBodies[0].replaceChildren();
  element("results").setAttribute("aria-busy", "true");
  say("Drawing sketches.");
  try {
    await complete();
    say("Done.");
  } catch (error) {
    const stopped = error.name === "AbortError";
    say(stopped ? "Stopped." : error.message, !stopped);
  } finally {
    running = null;
    showRunning(false);
    element("results").removeAttribute("aria-busy");
  }
}

async function listModels() {
  try {
    const response = await fetch(new URL("v1/models", document.baseURI), { headers: headers() });
    if (!response.ok) throw await refusal(response);
    const chosen = element("model").value;
    const models = (await response.json()).data.map((model) => model.id);
    element("model").replaceChildren(...models.map((id) => make("option", { value: id, textContent: id })));
    if (models.includes(chosen)) element("model").value = chosen;
    say("");
  } catch (error) {
    say(error.message, true);
  }
  showCode();
}

function start() {
  for (const [name, prompt] of Object.entries(EXAMPLES)) {
    element("examples").append(make("button", {
      type: "button",
      textContent: name,
      onclick: () => {
        element("prompt").value = prompt;
        showCode();
        element("request").requestSubmit();
      },
    }));
  }
  element("prompt").value = Object.values(EXAMPLES)[0];
  element("request").addEventListener("submit", (event) => {
    event.preventDefault();
    run();
  });
  element("request").addEventListener("input", showCode);
  element("key").addEventListener("change", listModels);
  element("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) element("request").requestSubmit();
    if (event.key === "Escape") running?.abort();
  });
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", copy));
  listModels();
}

start();
