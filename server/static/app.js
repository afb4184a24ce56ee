// The explorer: a form, one answer, and what explains it. State lives in the address, so that a link shows the same view again.

import { $, element, percent, request, save, short, svg } from "/static/dom.js";
import { overlaps, overlapWords, pieces } from "/static/overlap.js";
import { openPanels } from "/static/panels.js";

let answer = null;
let asked = null;
let kind = "completion";
let pinned = null; // an answer to compare the next one with, and what was asked for it
let clicked = null; // the token of the query that was clicked last, and the query's text
const removals = new Map(); // ids chosen for a removal list, with the reasons
const modes = {}; // in which each index ranks by default
let serial = 0;

// --- the query

function number(name, what) {
  const value = Number($(name).value.trim().replace(",", "."));
  if (!Number.isFinite(value)) throw new Error(`${what} is a number, such as 0.1; this is ${$(name).value}.`);
  return value;
}

function read() {
  const query = {};
  if (kind === "completion") {
    if ($("prompt").value) query.prompt = $("prompt").value;
    query.completion = $("completion").value;
    if ($("against").value) query.against = $("against").value;
  } else if (kind === "text") query.text = $("text").value;
  else if (kind === "row") query.row = Number($("row").value);
  else query.queries = readLines($("lines").value);
  if ($("span").value && (kind === "completion" || kind === "text") && !$("against").value) query.span = $("span").value;
  const options = { index: $("index").value, mode: $("mode").value };
  if ($("damping").value.trim()) options.damping = number("damping", "The damping");
  if ($("layers").value.trim()) options.layers = $("layers").value.split(",").map((part) => part.trim());
  const search = { k: $("k").value.trim() ? number("k", "How many") : 10 };
  if ($("where").value.trim()) search.where = $("where").value.trim();
  if ($("group").value) search.group_by = $("group").value;
  if ($("baselines").checked) search.baselines = true;
  if ($("certified").checked) search.recall = 0.99;
  if ($("rerank").value.trim()) search.rerank = number("rerank", "How many to compute again");
  if (kind === "file" && $("mean").checked) search.mean = true;
  return { query, options, search };
}

const MOST_LINES = 16; // queries of a request whose candidates are computed again

function readLines(text) {
  const lines = text.split("\n").filter((line) => line.trim());
  return lines.map((line, i) => {
    try {
      return JSON.parse(line);
    } catch {
      throw new Error(`Line ${i + 1} of the queries is not JSON, such as {"prompt": "...", "completion": "..."}.`);
    }
  });
}

const SHOWN = ["prompt", "completion", "against", "text", "row", "index", "mode", "damping", "layers", "k", "where", "group_by", "baselines", "recall", "rerank", "span", "queries", "mean"];

function write(given) {
  if (typeof given !== "object" || given === null || Array.isArray(given)) throw new Error("This link holds no query.");
  const other = Object.keys(given).find((name) => !SHOWN.includes(name));
  if (other) throw new Error(`This link asks with ${other}, which this page does not show; its answer is at /v1/query${location.search}`);
  show(given.queries ? "file" : given.text !== undefined ? "text" : given.row !== undefined ? "row" : "completion");
  $("lines").value = (given.queries ?? []).map((query) => JSON.stringify(query)).join("\n");
  $("mean").checked = Boolean(given.mean);
  for (const name of ["prompt", "completion", "against", "text", "row", "damping", "where", "k", "mode", "rerank", "span"]) {
    if (given[name] !== undefined) $(name).value = given[name];
    else if (!["k", "mode"].includes(name)) $(name).value = "";
  }
  $("layers").value = [given.layers ?? []].flat().join(", ");
  $("baselines").checked = Boolean(given.baselines);
  $("certified").checked = given.recall !== undefined && given.recall < 1;
  if (given.index !== undefined) choose("index", given.index);
}

function choose(id, value) {
  if (![...$(id).options].some((option) => option.value === value)) throw new Error(`This link names ${value}, which is not here.`);
  $(id).value = value;
}

function show(name) {
  kind = name;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const own = tab.dataset.kind === name;
    tab.setAttribute("aria-selected", own);
    tab.tabIndex = own ? 0 : -1;
    $(`pane-${tab.dataset.kind}`).hidden = !own;
  }
  $("span-label").hidden = name !== "completion" && name !== "text";
}

async function ask({ keep = false } = {}) {
  let now;
  try {
    now = read();
  } catch (error) {
    return fail(error);
  }
  const body = { ...now.query, ...now.options, ...now.search };
  if (now.query.queries && now.search.rerank === undefined && now.query.queries.length > MOST_LINES) body.rerank = 0;
  const own = ++serial;
  view("ask");
  if (kind === "file" && !now.query.queries.length) return fail(new Error("Write or choose some queries first."));
  if (now.query.completion === "" || now.query.text === "" || Number.isNaN(now.query.row) || (kind === "row" && !$("row").value)) {
    fail(new Error(kind === "row" ? "Give the number of a row." : "Write what the model said."));
    return;
  }
  busy("asking …");
  try {
    const found = await request("/v1/query", body);
    if (own !== serial) return;
    const several = found.answers;
    [answer, asked] = [several ? several[0] : found, now];
    if (!keep) history.pushState(body, "", `?q=${encodeURIComponent(JSON.stringify(body))}`);
    render(several);
    fold();
    if (!now.query.queries) await explain(own, now);
  } catch (error) {
    if (own === serial) fail(error);
  } finally {
    if (own === serial) busy("");
  }
}

function busy(text) {
  $("state").textContent = text;
  $("go").disabled = $("complete").disabled = Boolean(text);
  $("answer").classList.toggle("busy", Boolean(text));
}

function fail(error) {
  busy("");
  $("error").hidden = false;
  $("error").textContent = error.message;
  $("empty").hidden = $("answer").hidden = true;
}

// --- the answer

// On a phone, the answer is what is seen after asking, and not the form above it.
function fold() {
  if (innerWidth > 820) return;
  $("options").open = false;
  $("results").scrollIntoView({ block: "start" });
}

function render(several = null) {
  $("error").hidden = $("empty").hidden = true;
  $("answer").hidden = false;
  const { search: s, proponents, opponents } = answer;
  const read = s.candidates < s.rows ? `${s.candidates.toLocaleString()} of ${s.rows.toLocaleString()} rows read` : `${s.rows.toLocaleString()} rows`;
  const sure = s.faiss ? `by FAISS (${s.faiss.factory}), which found ${Math.round(100 * s.faiss.proponents)} % of the best ${s.faiss.k} for held-out rows when it was made` : s.recall < 1 ? `with probability ${s.recall} none of the best is missing` : "exact";
  $("certificate").textContent = `${read}, ${sure}, ${(s.seconds * 1000).toFixed(1)} ms` + (s.estimates ? "; scores are estimates from one-bit codes" : "") + (s.note ? `; ${s.note}` : "") + (s.missing ? `; ${s.missing.toLocaleString()} rows were not searched: a part of the index does not run at present` : "");
  if (s.rerank) {
    const differ = s.rerank.difference === null ? "" : `; near that, stored and recomputed scores differ by ${short(s.rerank.difference)} (root mean square)`;
    $("certificate").textContent += `; ${s.rerank.candidates.toLocaleString()} candidates computed again ${s.rerank.unprojected_layers ? `with EK-FAC of ${s.rerank.unprojected_layers} whole layers ` : ""}${s.rerank.query_bits === 8 ? "with queries in 8 bits " : ""}in ${s.rerank.seconds.toFixed(1)} s; by stored rows, no other scores above ${short(s.rerank.highest)}${s.rerank.lowest === null ? "" : ` or below ${short(s.rerank.lowest)}`}${differ}`;
  }
  $("warnings").replaceChildren(...answer.reliability.warnings.map((warning) => element("li", {}, warning)));
  const unit = s.unit ? `Scores are ${s.unit === "nats" ? "nats" : "nats for each nat of the example's own loss"} that the loss is predicted to rise by without the example` : "Scores have no unit here; their order counts";
  $("unit").textContent = unit + (s.slope ? `; measured slope ${short(s.slope.value)} (${short(s.slope.low)} to ${short(s.slope.high)}), ${s.slope.measured_by}.` : s.unit ? "; the size was not measured against trainings, the order counts." : ".");
  renderSeveral(several);
  renderPinned();
  $("twin").href = `/v1/query?q=${encodeURIComponent(JSON.stringify({ ...asked.query, ...asked.options, ...asked.search }))}`;
  fill($("proponents"), proponents, "Nothing spoke for it.");
  fill($("opponents"), opponents, "Nothing spoke against it.");
  for (const id of ["histogram", "layers-chart", "query-heat"]) $(id).replaceChildren();
  renderGroups();
  renderBaselines();
  clipTexts();
}

function fill(list, found, nothing) {
  list.replaceChildren(...found.map(card));
  if (!found.length) list.append(element("li", { class: "note" }, nothing));
}

function clipTexts() {
  for (const button of document.querySelectorAll("button.all")) button.remove();
  for (const text of document.querySelectorAll(".card .text")) {
    text.classList.remove("clipped", "whole");
    if (text.scrollHeight > text.clientHeight + 2) clip(text);
  }
}

function clip(text) {
  text.classList.add("clipped");
  const all = element("button", { type: "button", class: "all", "aria-expanded": "false" }, "Show all");
  all.addEventListener("click", () => {
    const isWhole = text.classList.toggle("whole");
    all.textContent = isWhole ? "Show less" : "Show all";
    all.setAttribute("aria-expanded", isWhole);
  });
  text.after(all);
}

function card(a) {
  const meta = Object.entries(a.metadata).map(([name, value]) => `${name}: ${value}`).join(" · ");
  const from = element("button", { type: "button", onclick: () => searchFrom(a.row), "aria-label": `Search from ${a.id}` }, "Search from it");
  const estimate = a.error ? `± ${short(a.error)}${a.uncertain ? " (of either sign)" : ""}` : a.stored_rank ? `estimated ${short(a.stored_score)} (#${a.stored_rank})` : "";
  const share = a.share === null ? "" : `${percent(a.share)} of all ${a.score > 0 ? "for" : "against"}`;
  const unit = answer.search.unit === "nats" ? " nats" : "";
  const same = overlaps(askedText(), a.text);
  const count = element("span", { class: "overlap" }, same.length ? `${overlapWords(same)} words verbatim` : "");
  const top = element("div", { class: "top" }, `${a.rank}.`, element("span", { class: "score" }, short(a.score) + unit), element("span", {}, share), element("span", { title: "Share of the searched examples with a lower score" }, `above ${a.percentile.toFixed(a.percentile > 99 || a.percentile < 1 ? 2 : 0)} %`), element("span", {}, estimate), count, element("span", {}, a.id), element("span", {}, a.source), from, pick(a.id, a.score > 0 ? `proponent of rank ${a.rank}` : `opponent of rank ${a.rank}`, a));
  const made = element("li", { class: "card", tabindex: "0", "data-row": a.row, "aria-label": `${a.id}, score ${short(a.score)}` }, top, element("div", { class: "text" }, ...marked(a.text, same)));
  if (meta) made.append(element("div", { class: "meta" }, meta));
  made.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === made) searchFrom(a.row);
  });
  return made;
}

// What was asked, as a text, for word-for-word overlaps.
function askedText() {
  const query = answer.query;
  return [query.prompt ?? "", query.completion ?? "", query.text ?? "", ...(query.messages ?? []).map((m) => (typeof m.content === "string" ? m.content : ""))].join(" ").trim();
}

const marked = (text, ranges, offset = 0) => pieces(text, ranges, offset).map(([part, isSame]) => (isSame ? element("mark", { class: "same" }, part) : part));

// A box that puts an example on the removal list.
function pick(id, reason, details = {}) {
  const box = element("input", { type: "checkbox", "aria-label": `Put ${id} on the removal list` });
  box.checked = removals.has(id);
  box.addEventListener("change", () => {
    if (box.checked) removals.set(id, { id, row: details.row, reason, ...(details.score === undefined ? {} : { score: details.score, unit: answer?.search.unit ?? null, query: asked && { ...asked.query } }), index: $("index").value });
    else removals.delete(id);
    showTray();
  });
  return element("label", { class: "pick" }, box, "remove");
}

function showTray() {
  $("tray").hidden = !removals.size;
  $("tray-count").textContent = `${removals.size} chosen`;
}

function renderSeveral(several) {
  $("several").hidden = !several;
  $("several-list").replaceChildren(...(several ?? []).map((one, i) => {
    const title = one.query.id ?? one.query.completion ?? one.query.text ?? `query ${i + 1}`;
    const open = element("button", { type: "button", onclick: () => { answer = one; render(several); } }, "Show");
    return element("div", { class: "card" }, element("div", { class: "top" }, element("span", { class: "score" }, String(title).slice(0, 60)), open),
      ...one.proponents.slice(0, 3).map((a) => element("div", { class: "meta" }, `${short(a.score)}  ${a.id}: ${a.text.slice(0, 80)}`)));
  }));
}

function renderPinned() {
  $("pinned").hidden = !pinned || pinned.answer === answer;
  if ($("pinned").hidden) return;
  const [before, now] = [pinned.answer.proponents, answer.proponents];
  const ranks = new Map(before.map((a) => [a.id, a]));
  const shared = now.filter((a) => ranks.has(a.id)).length;
  $("pinned-title").textContent = pinned.title;
  $("pinned-shared").textContent = `${shared} of ${now.length} proponents are the same.`;
  const cell = (a, other) => (a ? [element("td", { class: other.has(a.id) ? "same-in-both" : "" }, `${a.id}: ${a.text.slice(0, 60)}`), element("td", {}, short(a.score))] : [element("td"), element("td")]);
  const present = new Set(now.map((a) => a.id));
  $("pinned").querySelector("thead").replaceChildren(element("tr", {}, ...["before", "score", "now", "score"].map((name) => element("th", { scope: "col" }, name))));
  $("pinned").querySelector("tbody").replaceChildren(...Array.from({ length: Math.max(before.length, now.length) }, (_, i) => element("tr", {}, ...cell(before[i], present), ...cell(now[i], ranks))));
}

function searchFrom(row) {
  write({ ...asked.options, ...asked.search, row });
  ask();
  $("results").focus();
}

function renderGroups() {
  $("groups").hidden = !answer.groups;
  if (!answer.groups) return;
  const heads = [asked.search.group_by, "rows", "of all for", "of all against", "influence", "95 % interval"];
  $("groups").querySelector("thead").replaceChildren(element("tr", {}, ...heads.map((h) => element("th", { scope: "col" }, h))));
  const percent = (x) => `${(100 * x).toFixed(1)} %`;
  $("groups").querySelector("tbody").replaceChildren(...answer.groups.slice(0, 50).map((g) => element("tr", {}, ...[g.value ?? "(none)", g.rows.toLocaleString(), percent(g.positive_share), percent(g.negative_share), short(g.total), `${short(g.low)} to ${short(g.high)}`].map((cell) => element("td", {}, String(cell))))));
}

function renderBaselines() {
  $("baselines-column").hidden = !answer.baselines;
  $("baselines-list").replaceChildren(...(answer.baselines || []).map((c) => element("div", { class: "card" },
    element("div", { class: "top" }, element("span", { class: "score" }, c.name), element("span", {}, c.correlation === null ? "" : `rank correlation ${c.correlation.toFixed(2)}`), element("span", {}, `has ${c.shared} of our ${answer.proponents.length}`)),
    ...c.rows.map((row, i) => element("div", { class: "meta", "data-baseline-row": row }, `${c.ids[i]} `)))));
  const index = encodeURIComponent(asked.options.index);
  for (const place of document.querySelectorAll("[data-baseline-row]")) {
    request(`/v1/rows/${place.dataset.baselineRow}?index=${index}`).then((e) => place.append(`: ${e.text.slice(0, 100)}`), () => {});
  }
}

// --- what explains it

function scoreBadge(e) {
  const turned = Math.sign(e.recomputed) !== Math.sign(e.score);
  const label = `computed again ${short(e.recomputed)}${turned ? ": of the other sign, doubtful" : ""}`;
  return element("span", { class: turned ? "turned" : "", title: "The score without the rounding of stored rows; the words' shares add up to it" }, label);
}

const MOST_BARS = 14; // layers, or else their blocks
const AT_ONCE = 5; // explanations, so that the first are seen soon

async function explain(own, now) {
  const { proponents, opponents } = answer, rows = [];
  for (let i = 0; i < Math.max(proponents.length, opponents.length); i += AT_ONCE) rows.push(...[...proponents.slice(i, i + AT_ONCE), ...opponents.slice(i, i + AT_ONCE)].map((a) => a.row));
  const histogram = request("/v1/scores", { ...now.query, ...now.options, ...(now.search.where ? { where: now.search.where } : {}) });
  histogram.then((found) => own === serial && drawHistogram(found), () => {});
  if (!rows.length) return;
  if (now.query.against) $("query-heat").textContent = "A contrast is the difference of two completions: it has no tokens of its own to colour.";
  const sums = new Map();
  for (let i = 0; i < rows.length; i += AT_ONCE) {
    busy("");
    $("state").textContent = `explaining ${i + 1} to ${Math.min(i + AT_ONCE, rows.length)} of ${rows.length} …`;
    let found;
    try {
      found = (await request("/v1/explain", { ...now.query, ...now.options, examples: rows.slice(i, i + AT_ONCE), tokens: answer.index.linear })).explanations;
    } catch (error) {
      if (own === serial) $("query-heat").textContent = `No explanation: ${error.message}`;
      return;
    }
    if (own !== serial) return;
    for (const e of found) {
      const place = document.querySelector(`ol [data-row="${e.row}"]`);
      if (place && e.example) place.querySelector(".text").replaceChildren(...heat(e.example, overlaps(askedText(), e.example.tokens.join(""))));
      if (place && !answer.search.rerank && e.recomputed !== null && Math.abs(e.recomputed - e.score) > 0.01 * Math.abs(e.score)) place.querySelector(".top .overlap").before(scoreBadge(e));
      if (answer.proponents.some((a) => a.row === e.row)) for (const part of e.layers.length > MOST_BARS ? e.blocks : e.layers) sums.set(part.name, (sums.get(part.name) || 0) + part.score);
    }
    drawLayers([...sums].map(([name, score]) => ({ name, score })));
    if (i === 0 && found[0]?.query) $("query-heat").replaceChildren(element("span", { class: "dim" }, "The query, as the first proponent sees it: "), ...clickable(found[0].query));
  }
}

function heat({ tokens, scores }, ranges = [], make = () => element("span")) {
  const strongest = Math.max(...scores.map(Math.abs), 1e-30);
  const coloured = [];
  let carried = 0;
  let offset = 0;
  tokens.forEach((token, i) => {
    const score = scores[i] + carried;
    carried = token ? 0 : score; // part of a character that a later token completes
    const strength = Math.min(1, Math.abs(score) / strongest) ** 0.7;
    const parts = marked(token, ranges, offset);
    const span = make(i, offset, token);
    offset += token.length;
    if (strength < 0.05 && span.localName === "span") {
      coloured.push(...parts);
      return;
    }
    span.append(...parts);
    if (strength >= 0.05) {
      span.title = short(score);
      span.classList.add(score > 0 ? "heat-for" : "heat-against");
      span.style.backgroundColor = `rgba(var(--${score > 0 ? "for" : "against"}-heat), ${(0.6 * strength).toFixed(3)})`;
    }
    coloured.push(span);
  });
  return coloured;
}

// The query's tokens as buttons: a click asks about that token alone, a click with Shift about all since the last one.
function clickable(shares) {
  const text = shares.tokens.join("");
  const from = answer.query.completion !== undefined ? text.lastIndexOf(answer.query.completion) : 0;
  return heat(shares, [], (i, offset, token) => {
    if (!token || offset < from || asked.query.row !== undefined || asked.query.against) return element("span");
    const button = element("button", { type: "button", class: "token" });
    button.addEventListener("click", (event) => {
      const before = event.shiftKey && clicked?.text === text ? clicked : { start: offset, end: offset + token.length };
      clicked = { text, start: offset, end: offset + token.length };
      askAbout(text, from, Math.min(before.start, offset), Math.max(before.end, offset + token.length));
    });
    return button;
  });
}

// A span must occur once: where it occurs more often, the words beside it join it until it does not.
function askAbout(text, from, start, end) {
  const asked = text.slice(from);
  let [a, b] = [start - from, end - from];
  const occurs = () => asked.split(asked.slice(a, b)).length - 1;
  while (occurs() > 1 && (a > 0 || b < asked.length)) {
    const before = asked.slice(0, a).search(/\s*\S+\s*$/);
    if (before >= 0 && a > 0) a = before;
    else b = Math.min(asked.length, b + Math.max(1, asked.slice(b).search(/\S(\s|$)/) + 1));
  }
  $("span").value = asked.slice(a, b);
  if (a !== start - from || b !== end - from) toast(`“${asked.slice(start - from, end - from).trim()}” occurs several times, so the words beside it are asked about, too.`);
  ask();
}

function drawHistogram({ edges, counts, rows }) {
  if (!counts.length) return;
  const [width, height] = [480, 84];
  const x = (score) => 1 + ((score - edges[0]) / (edges[edges.length - 1] - edges[0] || 1)) * (width - 2);
  const y = (count) => (Math.log1p(count) / Math.log1p(Math.max(...counts))) * (height - 20);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height + 14}`, role: "img", "aria-label": `Histogram of ${rows} scores from ${short(edges[0])} to ${short(edges[edges.length - 1])}, counts on a logarithmic scale` });
  counts.forEach((count, i) => picture.append(svg("rect", { x: x(edges[i]), y: height - y(count), width: Math.max(1, x(edges[i + 1]) - x(edges[i]) - 0.5), height: y(count), class: "bar-plain" })));
  for (const a of [...answer.proponents, ...answer.opponents]) picture.append(svg("line", { x1: x(a.score), x2: x(a.score), y1: 2, y2: height, class: `mark ${a.score > 0 ? "for" : "against"}` }));
  if (edges[0] < 0 && edges[edges.length - 1] > 0) {
    picture.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: height, class: "zero" }));
    const clear = x(0) > width / 8 && x(0) < (7 / 8) * width; // of the labels of the ends
    if (clear) picture.append(svg("text", { x: x(0), y: height + 12, "text-anchor": "middle" }, "0"));
  }
  picture.append(svg("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" }), svg("text", { x: 0, y: height + 12 }, short(edges[0])), svg("text", { x: width, y: height + 12, "text-anchor": "end" }, short(edges[edges.length - 1])));
  $("histogram").replaceChildren(picture);
}

function drawLayers(parts) {
  const shown = parts.sort((a, b) => Math.abs(b.score) - Math.abs(a.score)).slice(0, MOST_BARS);
  if (!shown.length) {
    $("layers-chart").replaceChildren(element("p", { class: "dim" }, "Layers cannot be told apart in these rows."));
    return;
  }
  const [width, line] = [480, 16];
  const most = Math.max(...shown.map((part) => Math.abs(part.score)), 1e-30);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${shown.length * line + 4}`, role: "img", "aria-label": `Layers by their part in the score: ${shown.slice(0, 3).map((p) => p.name).join(", ")} first` });
  shown.forEach((part, i) => picture.append(
    svg("text", { x: 0, y: i * line + 12 }, part.name.length > 34 ? `…${part.name.slice(-33)}` : part.name),
    svg("rect", { x: 215, y: i * line + 3, width: Math.max(1, (Math.abs(part.score) / most) * (width - 290)), height: line - 5, class: part.score > 0 ? "bar-for" : "bar-against" }),
    svg("text", { x: width, y: i * line + 12, "text-anchor": "end" }, short(part.score))));
  $("layers-chart").replaceChildren(picture);
}

// --- taking it away

function cell(value) {
  const text = String(value ?? "");
  const plain = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text; // a spreadsheet must not take text for a formula
  return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function exportAs(form) {
  const all = [...answer.proponents.map((a) => ({ kind: "proponent", ...a })), ...answer.opponents.map((a) => ({ kind: "opponent", ...a }))];
  if (form === "jsonl") save("answer.jsonl", all.map((a) => `${JSON.stringify(a)}\n`).join(""), "application/jsonl");
  if (form === "csv") {
    const names = ["kind", "rank", "row", "id", "score", "source", "document", "text"];
    save("answer.csv", [names, ...all.map((a) => names.map((name) => a[name]))].map((line) => `${line.map(cell).join(",")}\r\n`).join(""), "text/csv");
  }
  if (form !== "link") exported(form, all.map((a) => a.id));
  if (form === "link") (navigator.clipboard ? navigator.clipboard.writeText(location.href) : Promise.reject()).then(() => toast("The link is copied."), () => toast(location.href));
}

// The server's audit log, if it has one, names what was taken away.
function exported(form, ids) {
  request("/v1/exports", { index: $("index").value, kind: form, ids }).catch(() => {});
}

function toast(text) {
  $("state").textContent = text;
  setTimeout(() => $("state").textContent === text && ($("state").textContent = ""), 6000);
}

// --- beginning

async function columns() {
  const about = await request(`/v1/indexes/${encodeURIComponent($("index").value)}`);
  const keep = $("group").value;
  const skip = new Set(["id", "text", "chunk", "document"]);
  $("group").replaceChildren(element("option", { value: "" }, "nothing"), ...Object.keys(about.columns).filter((name) => !skip.has(name)).map((name) => element("option", { value: name }, name)));
  $("group").value = keep;
  $("complete").hidden = !about.texts;
}

async function restore(given) {
  busy("asking …");
  try {
    write(given);
    await columns();
    choose("group", given.group_by || "");
    await ask({ keep: true });
  } catch (error) {
    fail(error);
  }
}

function theme(dark) {
  document.documentElement.classList.toggle("dark", dark);
  localStorage.setItem("wherefrom-theme", dark ? "dark" : "light");
}

function view(name) {
  for (const button of document.querySelectorAll("[data-view]")) {
    button.setAttribute("aria-pressed", button.dataset.view === name);
    $(`view-${button.dataset.view}`).hidden = button.dataset.view !== name;
  }
}

// Queries to begin with, from the first training examples: what follows the first words of a text.
async function suggest() {
  const { rows } = await request(`/v1/rows?count=40&index=${encodeURIComponent($("index").value)}`);
  const chosen = rows.filter((row) => row.text.split(/\s+/).length >= 6).filter((_, i, all) => i % Math.max(1, Math.floor(all.length / 3)) === 0).slice(0, 3);
  $("suggestions-title").hidden = !chosen.length;
  $("suggestions").replaceChildren(...chosen.map((row) => {
    const words = row.text.trim().split(/(?<=\S)(?=\s)/);
    const given = { prompt: words.slice(0, 4).join(""), completion: words.slice(4, 6).join("") };
    const fill = () => {
      write({ ...given, index: $("index").value });
      ask();
    };
    return element("li", {}, element("button", { type: "button", onclick: fill }, `${given.prompt} …${given.completion}`));
  }));
}

async function begin() {
  const stored = localStorage.getItem("wherefrom-theme");
  theme(stored ? stored === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
  show("completion");
  $("options").open = innerWidth > 820;
  $("theme").addEventListener("click", () => theme(!document.documentElement.classList.contains("dark")));
  $("help").addEventListener("click", () => $("keys").showModal());
  $("ask").addEventListener("submit", (event) => (event.preventDefault(), ask()));
  const tabs = [...document.querySelectorAll("[role=tab]")];
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => show(tab.dataset.kind));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = tabs[(i + step + tabs.length) % tabs.length];
      show(next.dataset.kind);
      next.focus();
    });
  });
  for (const id of ["mode", "group", "baselines", "certified", "damping", "layers", "where", "k"]) $(id).addEventListener("change", () => answer && ask());
  $("index").addEventListener("change", () => {
    $("mode").value = modes[$("index").value];
    columns().then(() => (answer ? ask() : suggest()), fail);
  });
  addEventListener("resize", () => requestAnimationFrame(clipTexts));
  $("twin").addEventListener("click", async (event) => {
    if (!sessionStorage.getItem("wherefrom-token")) return;
    event.preventDefault(); // a plain link carries no token
    const found = await request($("twin").getAttribute("href"));
    open(URL.createObjectURL(new Blob([JSON.stringify(found, null, 1)], { type: "application/json" })));
  });
  $("complete").addEventListener("click", async () => {
    busy("the model writes …");
    try {
      $("completion").value = (await request("/v1/complete", { index: $("index").value, prompt: $("prompt").value })).completion;
      busy("");
      await ask();
    } catch (error) {
      busy("");
      fail(error);
    }
  });
  $("file").addEventListener("change", async () => {
    const [file] = $("file").files;
    if (file) $("lines").value = await file.text();
  });
  $("pin").addEventListener("click", () => {
    const title = answer.query.completion ?? answer.query.text ?? (answer.query.row === undefined ? "the answer before" : `row ${answer.query.row}`);
    pinned = pinned ? null : { answer, title: `“${String(title).trim().slice(0, 60)}” (${asked.options.index})` };
    $("pin").setAttribute("aria-pressed", Boolean(pinned));
    renderPinned();
    if (pinned) toast("The next answer stands beside this one.");
  });
  $("tray-clear").addEventListener("click", () => {
    removals.clear();
    showTray();
    for (const box of document.querySelectorAll(".pick input")) box.checked = false;
  });
  $("tray-save").addEventListener("click", () => {
    save("removed.jsonl", [...removals.values()].map((line) => `${JSON.stringify(line)}\n`).join(""), "application/jsonl");
    exported("removal list", [...removals.keys()]);
  });
  const panels = openPanels({
    index: () => $("index").value,
    body: () => ({ ...asked.query, ...asked.options, ...asked.search }),
    open: (given) => restore(given),
    pick,
    searchFrom: (row) => {
      write({ index: $("index").value, row });
      ask();
    },
    toast,
  });
  for (const button of document.querySelectorAll("[data-view]")) button.addEventListener("click", () => {
    view(button.dataset.view);
    panels[button.dataset.view]?.();
  });
  for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => exportAs(button.dataset.export));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return ask();
    if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") (event.preventDefault(), $(kind === "completion" ? "prompt" : kind === "file" ? "lines" : kind).focus());
    if (event.key === "?") $("keys").showModal();
    if (event.key === "j" || event.key === "k") {
      const cards = [...document.querySelectorAll("ol .card")];
      cards[Math.min(cards.length - 1, Math.max(0, cards.indexOf(document.activeElement) + (event.key === "j" ? 1 : -1)))]?.focus();
    }
  });
  addEventListener("popstate", (event) => {
    if (event.state) return restore(event.state);
    [answer, serial] = [null, serial + 1];
    $("answer").hidden = $("error").hidden = true;
    $("empty").hidden = false;
  });
  try {
    const indexes = await request("/v1/indexes");
    $("index").replaceChildren(...indexes.map((i) => element("option", { value: i.name }, `${i.name} (${i.rows.toLocaleString()} examples)`)));
    for (const i of indexes) modes[i.name] = i.mode;
    $("mode").value = modes[$("index").value];
    const given = new URLSearchParams(location.search).get("q");
    if (given) await restore(JSON.parse(given));
    else await columns().then(suggest);
  } catch (error) {
    fail(error);
  }
}

begin();
