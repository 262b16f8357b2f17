// The playground: ghost text in an editor, where its time went, and how sure the model was.
import {
  Decoration, EditorState, EditorView, Prec, StateEffect, StateField, WidgetType, defaultKeymap,
  drawSelection, highlightActiveLine, history, historyKeymap, keymap, lineNumbers,
} from "/playground/editor.min.js";

const PAUSE_MS = 30; // Letters of one fast burst share a request.
const MAX_ROWS = 8;
const MAX_NEW_TOKENS = { line: 40, block: 120 };
const STOPS = { line: ["\n"], block: ["\n\n"] };
const ANCHOR_LINES = 64; // The window's first line moves in steps, so that the cache keeps fitting.
const CHARS_PER_TOKEN = 2; // Cautious for code: the window is cut in characters, fitted in tokens.
const UNSURE = 0.5;
const START = "import math\n\n\ndef mean(values):\n    ";

const byId = (id) => document.getElementById(id);
const sessionId = Array.from(crypto.getRandomValues(new Uint8Array(8)),
  (byte) => byte.toString(16).padStart(2, "0")).join("");
let model = { maxSeqLen: 2048, fillsIn: true };

// ---- the suggestion: text and tokens that belong at one place -------------------------------

/** `text` continues the document at `at`; its first `typed` UTF-16 units stand there already. */
const setSuggestion = StateEffect.define();

const suggestionField = StateField.define({
  create: () => null,
  update(value, transaction) {
    for (const effect of transaction.effects) {
      if (effect.is(setSuggestion)) return effect.value;
    }
    if (value && transaction.docChanged) return typedThrough(value, transaction);
    if (value && transaction.selection && !isAtCursor(value, transaction.state)) return null;
    return value;
  },
  provide: (field) => EditorView.decorations.from(field, (value) => {
    if (!value || value.typed >= value.text.length) return Decoration.none;
    const widget = Decoration.widget({ widget: new Ghost(value), side: 1 });
    return Decoration.set([widget.range(value.at + value.typed)]);
  }),
});

/** The rest of a suggestion if what was typed is its beginning, else null. */
function typedThrough(value, transaction) {
  let inserted = null;
  transaction.changes.iterChanges((fromA, toA, _fromB, _toB, text) => {
    const fits = inserted === null && fromA === toA && fromA === value.at + value.typed;
    inserted = fits ? text.toString() : false;
  });
  if (!inserted || !value.text.startsWith(inserted, value.typed)) return null;
  return { ...value, typed: value.typed + inserted.length };
}

function isAtCursor(value, state) {
  const { main } = state.selection;
  return main.empty && main.head === value.at + value.typed;
}

/** The suggestion that can be accepted now, as its remaining text; "" if there is none. */
function remaining(state) {
  const value = state.field(suggestionField);
  return value && isAtCursor(value, state) ? value.text.slice(value.typed) : "";
}

class Ghost extends WidgetType {
  constructor(suggestion) {
    super();
    this.suggestion = suggestion;
  }

  eq(other) {
    return other.suggestion === this.suggestion;
  }

  toDOM() {
    const ghost = document.createElement("span");
    ghost.className = "ghost";
    ghost.setAttribute("aria-hidden", "true"); // Said by #spoken instead.
    for (const [token, text] of tokenTexts(this.suggestion)) {
      const span = document.createElement("span");
      span.textContent = text;
      describe(span, token);
      ghost.append(span);
    }
    return ghost;
  }

  ignoreEvent() {
    return true;
  }
}

/** [token, the part of its text that is not typed yet], leaving out empty parts. */
function tokenTexts({ text, typed, tokens }) {
  const parts = [];
  tokens.forEach((token, index) => {
    const end = index + 1 < tokens.length ? tokens[index + 1].start : text.length;
    const part = text.slice(Math.max(token.start, typed), end);
    if (part) parts.push([token, part]);
  });
  return parts;
}

// ---- asking the server -----------------------------------------------------------------------

let timer = 0;
let running = null;

function cancel() {
  clearTimeout(timer);
  running?.abort();
  running = null;
}

function ask(view) {
  cancel();
  timer = setTimeout(() => complete(view), PAUSE_MS);
}

async function complete(view) {
  const { state } = view;
  if (!state.selection.main.empty) return;
  const at = state.selection.main.head;
  const abort = running = new AbortController();
  const started = performance.now();
  let seen = null;
  let timings;
  let suggestion = { at, text: "", typed: 0, tokens: [] };
  try {
    for await (const chunk of stream(body(state, at), abort.signal)) {
      const [choice] = chunk.choices;
      if (choice && (choice.text || choice.logprobs?.tokens.length)) {
        if (choice.text) seen ??= performance.now() - started;
        suggestion = extend(suggestion, choice);
        if (!show(view, suggestion)) return abort.abort();
      }
      timings = chunk.albor?.timings ?? timings;
      if (chunk.usage) addRow(suggestion.text, timings, chunk.usage, seen);
    }
    say("");
    byId("spoken").textContent = suggestion.text ? `Suggestion: ${suggestion.text}` : "";
  } catch (error) {
    if (!abort.signal.aborted) say(error.message);
  } finally {
    if (running === abort) running = null;
  }
}

/** Show what has come so far, if it still continues what stands at the cursor. */
function show(view, suggestion) {
  const old = view.state.field(suggestionField);
  const typed = old && old.at === suggestion.at ? old.typed : 0;
  const next = { ...suggestion, typed };
  if (!isAtCursor(next, view.state)) return false;
  view.dispatch({ effects: setSuggestion.of(next) });
  return true;
}

function body(state, at) {
  const scope = byId("scope").value;
  const [prefix, suffix] = codeAround(state.doc, at, MAX_NEW_TOKENS[scope]);
  return {
    model: "default",
    prompt: prefix || "\n",
    ...(model.fillsIn ? { suffix } : {}),
    max_tokens: MAX_NEW_TOKENS[scope],
    stop: STOPS[scope],
    temperature: 0,
    logprobs: 4,
    stream: true,
    stream_options: { include_usage: true },
    albor: { session: `playground-${sessionId}` },
  };
}

/** The code before and after the cursor, as much as surely fits the model's context. */
function codeAround(doc, at, numNew) {
  const budget = Math.max(64, model.maxSeqLen - numNew - 16) * CHARS_PER_TOKEN;
  const suffix = doc.sliceString(at, at + Math.floor(budget / 4));
  const minStart = Math.max(0, at - (budget - suffix.length));
  let start = 0;
  if (minStart > 0) {
    const line = doc.lineAt(minStart).number;
    const anchor = Math.ceil(line / ANCHOR_LINES) * ANCHOR_LINES + 1;
    start = anchor <= doc.lines ? doc.line(anchor).from : minStart;
    if (start > at) start = minStart;
  }
  return [doc.sliceString(start, at), suffix];
}

async function* stream(request, signal) {
  const headers = { "content-type": "application/json" };
  if (byId("key").value) headers.authorization = `Bearer ${byId("key").value}`;
  const response = await fetch("/v1/completions", {
    method: "POST", headers, body: JSON.stringify(request), signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

async function refusal(response) {
  if (response.status === 401) byId("key-label").hidden = false;
  const answer = await response.json().catch(() => ({}));
  return new Error(answer.error?.message ?? `the server answered ${response.status}`);
}

/** The suggestion with one more chunk; offsets come in characters, strings count in UTF-16. */
function extend(suggestion, { text, logprobs }) {
  const whole = suggestion.text + text;
  const units = [0];
  for (const character of whole) units.push(units.at(-1) + character.length);
  const tokens = (logprobs?.tokens ?? []).map((own, index) => ({
    text: own,
    start: units[Math.min(logprobs.text_offset[index], units.length - 1)],
    probability: Math.exp(logprobs.token_logprobs[index]),
    others: Object.entries(logprobs.top_logprobs?.[index] ?? {}),
  }));
  return { ...suggestion, text: whole, tokens: [...suggestion.tokens, ...tokens] };
}

// ---- what is shown beside the editor ---------------------------------------------------------

function say(text) {
  byId("status").textContent = text;
}

function addRow(text, timings, usage, seen) {
  const row = byId("timings").tBodies[0].insertRow(0);
  const ms = (value) => (value === undefined || value === null ? "–" : value.toFixed(1));
  const numCached = usage.prompt_tokens_details.cached_tokens;
  const perToken = timings && timings.decode_ms / Math.max(1, timings.num_new_tokens - 1);
  const first = text.split("\n").find((line) => line.trim()) ?? "";
  for (const cell of [first.trim() || "(nothing)", ms(timings?.queue_ms), numCached,
    usage.prompt_tokens - numCached, ms(timings?.prefill_ms), ms(timings?.first_token_ms),
    ms(perToken), ms(timings?.total_ms), ms(seen)]) {
    row.insertCell().textContent = cell;
  }
  while (byId("timings").tBodies[0].rows.length > MAX_ROWS) {
    byId("timings").tBodies[0].deleteRow(-1);
  }
}

let shown;

function showTokens(suggestion) {
  if (suggestion === shown) return;
  shown = suggestion;
  hideTip();
  byId("tokens").replaceChildren(...(suggestion ? tokenTexts(suggestion) : []).map(([token]) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = visible(token.text);
    button.className = token.probability < UNSURE ? "unsure" : "";
    describe(button, token);
    button.setAttribute("aria-label", `${visible(token.text)} ${percent(token.probability)}`);
    return button;
  }));
}

/** Show a token's probabilities while `element` is pointed at or has the focus. */
function describe(element, token) {
  element.dataset.probability = token.probability.toFixed(4);
  const open = () => showTip(element, token);
  element.addEventListener("pointerenter", open);
  element.addEventListener("focus", open);
  element.addEventListener("pointerleave", hideTip);
  element.addEventListener("blur", hideTip);
}

function showTip(element, token) {
  const tip = byId("tip");
  const others = token.others.sort((a, b) => b[1] - a[1])
    .map(([text, logprob]) => `${percent(Math.exp(logprob)).padStart(7)}  ${visible(text)}`);
  tip.textContent = [`${visible(token.text)}  ${percent(token.probability)}`, ...others].join("\n");
  tip.hidden = false;
  const box = element.getBoundingClientRect();
  const below = box.bottom + 6 + tip.offsetHeight <= innerHeight;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(0, box.top - tip.offsetHeight - 6)}px`;
  tip.style.left = `${Math.max(0, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  element.setAttribute("aria-describedby", "tip");
}

function hideTip() {
  byId("tip").hidden = true;
}

const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→");
const percent = (part) => `${(100 * part).toFixed(1)} %`;

// ---- the editor ------------------------------------------------------------------------------

function accept(length) {
  return (view) => {
    const text = remaining(view.state);
    if (!text) return false;
    const part = text.slice(0, length(text));
    const at = view.state.selection.main.head;
    view.dispatch({
      changes: { from: at, insert: part },
      selection: { anchor: at + part.length },
      userEvent: "input.complete",
      scrollIntoView: true,
    });
    return true;
  };
}

function hide(view) {
  const busy = running !== null || view.state.field(suggestionField) !== null;
  cancel();
  view.dispatch({ effects: setSuggestion.of(null) });
  return busy;
}

const acceptAll = accept((text) => text.length);
const acceptWord = accept((text) => text.match(/^\s*(?:[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]+|$)/u)[0].length);

/** A new line starts where the one above does, and the suggestion decides the rest. */
function newLine(view) {
  const line = view.state.doc.lineAt(view.state.selection.main.head);
  view.dispatch(view.state.replaceSelection(`\n${line.text.match(/^[ \t]*/)[0]}`),
    { userEvent: "input", scrollIntoView: true });
  return true;
}

const theme = EditorView.theme({
  "&": { height: "100%", color: "var(--ink)", backgroundColor: "var(--panel)" },
  "&.cm-focused": { outline: "none" },
  ".cm-scroller": { fontFamily: "var(--mono)", fontSize: "14px", lineHeight: "1.5" },
  ".cm-content": { caretColor: "var(--ink)" },
  ".cm-cursor": { borderLeftColor: "var(--ink)", borderLeftWidth: "2px" },
  ".cm-gutters": {
    backgroundColor: "var(--panel)", color: "var(--dim)", borderRight: "1px solid var(--line)",
  },
  ".cm-activeLine": { backgroundColor: "var(--active)" },
  "&.cm-focused > .cm-scroller > .cm-selectionLayer .cm-selectionBackground, .cm-selectionBackground":
    { background: "var(--select)" },
  ".ghost": { color: "var(--ghost)", fontStyle: "italic", whiteSpace: "pre-wrap" },
  ".ghost > span:hover": { textDecoration: "underline" },
});

const watch = EditorView.updateListener.of((update) => {
  const suggestion = update.state.field(suggestionField);
  showTokens(suggestion);
  if (!update.docChanged && !update.selectionSet) return;
  if (suggestion && remaining(update.state)) return; // Typed through: nothing to ask.
  if (update.selectionSet && !update.docChanged) cancel();
  if (update.docChanged) ask(update.view);
});

// In a shadow root CodeMirror adopts style sheets instead of writing <style>, which the
// Content-Security-Policy forbids.
const root = byId("editor").attachShadow({ mode: "open" });
const view = new EditorView({
  root,
  parent: root,
  state: EditorState.create({
    doc: START,
    selection: { anchor: START.length },
    extensions: [
      lineNumbers(), history(), drawSelection(), highlightActiveLine(), EditorView.lineWrapping,
      EditorState.tabSize.of(4), suggestionField, watch, theme,
      EditorView.contentAttributes.of({ "aria-label": "Code", spellcheck: "false" }),
      Prec.highest(keymap.of([
        { key: "Tab", run: acceptAll },
        { key: "Ctrl-ArrowRight", mac: "Cmd-ArrowRight", run: acceptWord },
        { key: "Escape", run: hide },
        { key: "Enter", run: newLine },
      ])),
      keymap.of([...defaultKeymap, ...historyKeymap]),
    ],
  }),
});
byId("scope").addEventListener("change", () => ask(view));
byId("key").addEventListener("change", () => start());

async function start() {
  const headers = byId("key").value ? { authorization: `Bearer ${byId("key").value}` } : {};
  try {
    const response = await fetch("/v1/models", { headers });
    if (!response.ok) throw await refusal(response);
    const { id, meta } = (await response.json()).data[0];
    model = { maxSeqLen: meta.max_seq_len, fillsIn: Boolean(meta.fim) };
    const fim = model.fillsIn ? "fills in the middle" : "continues only";
    byId("model").textContent = `${id} · ${fim} · ${meta.max_seq_len} tokens of context`;
    say("");
    view.focus();
    ask(view);
  } catch (error) {
    say(error.message);
  }
}

await start();
