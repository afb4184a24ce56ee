// The explorer: a form, one answer, and what explains it. State lives in the address, so that a link shows the same view again.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
let answer = null;
let asked = null;
let kind = "completion";
const modes = {}; // in which each index ranks by default
let serial = 0;

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// --- the server

async function request(path, body) {
  const token = sessionStorage.getItem("wherefrom-token");
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    await askForToken(Boolean(token));
    return request(path, body);
  }
  const found = await response.json().catch(() => ({ detail: `The server answered with status ${response.status}.` }));
  if (!response.ok) throw new Error(found.detail || response.statusText);
  return found;
}

function askForToken(refused) {
  return new Promise((resolve) => {
    $("token-refused").hidden = !refused;
    if (!$("token-dialog").open) $("token-dialog").showModal();
    $("token-dialog").addEventListener("close", () => {
      sessionStorage.setItem("wherefrom-token", $("token").value.trim().replace(/[^!-~]/g, "?")); // what no header can hold is refused, too
      resolve();
    }, { once: true });
  });
}

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
  else query.row = Number($("row").value);
  const options = { index: $("index").value, mode: $("mode").value };
  if ($("damping").value.trim()) options.damping = number("damping", "The damping");
  if ($("layers").value.trim()) options.layers = $("layers").value.split(",").map((part) => part.trim());
  const search = { k: $("k").value.trim() ? number("k", "How many") : 10 };
  if ($("where").value.trim()) search.where = $("where").value.trim();
  if ($("group").value) search.group_by = $("group").value;
  if ($("baselines").checked) search.baselines = true;
  if ($("certified").checked) search.recall = 0.99;
  if ($("rerank").value.trim()) search.rerank = number("rerank", "How many to compute again");
  return { query, options, search };
}

const SHOWN = ["prompt", "completion", "against", "text", "row", "index", "mode", "damping", "layers", "k", "where", "group_by", "baselines", "recall", "rerank"];

function write(given) {
  if (typeof given !== "object" || given === null || Array.isArray(given)) throw new Error("This link holds no query.");
  const other = Object.keys(given).find((name) => !SHOWN.includes(name));
  if (other) throw new Error(`This link asks with ${other}, which this page does not show; its answer is at /v1/query${location.search}`);
  show(given.text !== undefined ? "text" : given.row !== undefined ? "row" : "completion");
  for (const name of ["prompt", "completion", "against", "text", "row", "damping", "where", "k", "mode", "rerank"]) {
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
}

async function ask({ keep = false } = {}) {
  let now;
  try {
    now = read();
  } catch (error) {
    return fail(error);
  }
  const body = { ...now.query, ...now.options, ...now.search };
  const own = ++serial;
  if (now.query.completion === "" || now.query.text === "" || Number.isNaN(now.query.row) || (kind === "row" && !$("row").value)) {
    fail(new Error(kind === "row" ? "Give the number of a row." : "Write what the model said."));
    return;
  }
  busy("asking …");
  try {
    const found = await request("/v1/query", body);
    if (own !== serial) return;
    [answer, asked] = [found, now];
    if (!keep) history.pushState(body, "", `?q=${encodeURIComponent(JSON.stringify(body))}`);
    render();
    await explain(own, now);
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

function render() {
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

const short = (number) => String(Number(Number(number).toPrecision(4)));

function card(a) {
  const meta = Object.entries(a.metadata).map(([name, value]) => `${name}: ${value}`).join(" · ");
  const from = element("button", { type: "button", onclick: () => searchFrom(a.row), "aria-label": `Search from ${a.id}` }, "Search from it");
  const top = element("div", { class: "top" }, `${a.rank}.`, element("span", { class: "score" }, short(a.score)), element("span", {}, a.error ? `± ${short(a.error)}` : a.stored_rank ? `by stored rows ${short(a.stored_score)} (#${a.stored_rank})` : ""), element("span", {}, a.id), element("span", {}, a.source), from);
  const made = element("li", { class: "card", tabindex: "0", "data-row": a.row, "aria-label": `${a.id}, score ${short(a.score)}` }, top, element("div", { class: "text" }, a.text));
  if (meta) made.append(element("div", { class: "meta" }, meta));
  made.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && event.target === made) searchFrom(a.row);
  });
  return made;
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
    element("div", { class: "meta" }, c.ids.join(", ")))));
}

// --- what explains it

function scoreBadge(e) {
  const turned = Math.sign(e.recomputed) !== Math.sign(e.score);
  const label = `exact row ${short(e.recomputed)}${turned ? ": of the other sign, doubtful" : ""}`;
  return element("span", { class: turned ? "turned" : "", title: "The score of the exact row, which the stored one estimates; the tokens' shares add up to it" }, label);
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
      if (place && e.example) place.querySelector(".text").replaceChildren(...heat(e.example));
      if (place && e.recomputed !== null && Math.abs(e.recomputed - e.score) > 0.01 * Math.abs(e.score)) place.querySelector(".top button").before(scoreBadge(e));
      if (answer.proponents.some((a) => a.row === e.row)) for (const part of e.layers.length > MOST_BARS ? e.blocks : e.layers) sums.set(part.name, (sums.get(part.name) || 0) + part.score);
    }
    drawLayers([...sums].map(([name, score]) => ({ name, score })));
    if (i === 0 && found[0]?.query) $("query-heat").replaceChildren(element("span", { class: "dim" }, "The query, as the first proponent sees it: "), ...heat(found[0].query));
  }
}

function heat({ tokens, scores }) {
  const strongest = Math.max(...scores.map(Math.abs), 1e-30);
  const marked = [];
  let carried = 0;
  tokens.forEach((token, i) => {
    const score = scores[i] + carried;
    carried = token ? 0 : score; // part of a character that a later token completes
    const strength = Math.min(1, Math.abs(score) / strongest) ** 0.7;
    if (strength < 0.05) {
      marked.push(token);
      return;
    }
    const span = element("span", { title: `${short(score)}`, class: score > 0 ? "heat-for" : "heat-against" }, token);
    span.style.backgroundColor = `rgba(var(--${score > 0 ? "for" : "against"}-heat), ${(0.6 * strength).toFixed(3)})`;
    marked.push(span);
  });
  return marked;
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

function save(name, text, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}

function cell(value) {
  const text = String(value ?? "");
  const plain = /^[=+\-@\t\r]/.test(text) && Number.isNaN(Number(text)) ? `'${text}` : text; // a spreadsheet must not take text for a formula
  return /[",\n\r]/.test(plain) ? `"${plain.replaceAll('"', '""')}"` : plain;
}

function exportAs(form) {
  const all = [...answer.proponents.map((a) => ({ kind: "proponent", ...a })), ...answer.opponents.map((a) => ({ kind: "opponent", ...a }))];
  if (form === "jsonl") save("answer.jsonl", all.map((a) => `${JSON.stringify(a)}\n`).join(""), "application/jsonl");
  if (form === "ids") save("removed.jsonl", answer.proponents.map((a) => `${JSON.stringify(a.id)}\n`).join(""), "application/jsonl");
  if (form === "csv") {
    const names = ["kind", "rank", "row", "id", "score", "source", "document", "text"];
    save("answer.csv", [names, ...all.map((a) => names.map((name) => a[name]))].map((line) => `${line.map(cell).join(",")}\r\n`).join(""), "text/csv");
  }
  if (form === "link") (navigator.clipboard ? navigator.clipboard.writeText(location.href) : Promise.reject()).then(() => toast("The link is copied."), () => toast(location.href));
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
    columns().then(() => answer && ask(), fail);
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
  for (const button of document.querySelectorAll("[data-export]")) button.addEventListener("click", () => exportAs(button.dataset.export));
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return ask();
    if (event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") (event.preventDefault(), $(kind === "completion" ? "prompt" : kind).focus());
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
    else await columns();
  } catch (error) {
    fail(error);
  }
}

begin();
