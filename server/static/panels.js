// The views beside an answer: the corpus, saved queries, and what is known of the index.

import { $, element, percent, request, short } from "/static/dom.js";

const PAGE = 20;

export function openPanels(page) {
  let first = 0;

  const named = () => `index=${encodeURIComponent(page.index())}`;

  async function corpus(from = 0) {
    const where = $("browse-where").value.trim();
    $("browse-state").textContent = "reading …";
    try {
      const asked = new URLSearchParams({ index: page.index(), first: from, count: PAGE, sort: $("browse-sort").value, ...(where ? { where } : {}) });
      const found = await request(`/v1/rows?${asked}`);
      first = from;
      $("browse-list").replaceChildren(...found.rows.map((row) => example(row, found.unit)));
      const last = Math.min(found.matching, from + PAGE);
      $("browse-place").textContent = found.matching ? `${(from + 1).toLocaleString()} to ${last.toLocaleString()} of ${found.matching.toLocaleString()}` : "nothing matches";
      $("browse-back").disabled = from === 0;
      $("browse-next").disabled = last >= found.matching;
      $("browse-state").textContent = "";
    } catch (error) {
      $("browse-state").textContent = error.message;
    }
  }

  function example(row, unit) {
    const from = element("button", { type: "button", onclick: () => page.searchFrom(row.row), "aria-label": `Search from ${row.id}` }, "Search from it");
    const facts = [
      `row ${row.row}`,
      row.id,
      row.source,
      row.label === null ? "" : `label ${row.label}`,
      row.loss === null ? "" : `loss ${short(row.loss / row.tokens)} nats a token`,
      `self-influence ${short(row.self_influence)}${unit ? ` ${unit}` : ""}`,
      row.density_percentile === null ? "" : `in a denser place than ${row.density_percentile.toFixed(0)} % of examples`,
    ];
    const meta = Object.entries(row.metadata).map(([name, value]) => `${name}: ${value}`).join(" · ");
    const text = row.text + (row.cut ? ` … (${row.cut.toLocaleString()} characters more)` : "");
    return element("li", { class: "card", "data-row": row.row },
      element("div", { class: "top" }, ...facts.filter(Boolean).map((fact) => element("span", {}, fact)), from, page.pick(row.id, "chosen in the corpus", { row: row.row })),
      element("div", { class: "text" }, text), element("div", { class: "meta" }, meta));
  }

  async function saved() {
    try {
      const { saved: entries } = await request(`/v1/saved?${named()}`);
      $("saved-empty").hidden = entries.length > 0;
      $("saved-list").replaceChildren(...entries.map((entry) => element("li", { class: "card" },
        element("div", { class: "top" }, element("span", { class: "score" }, entry.name), element("span", {}, entry.time.slice(0, 10)), element("span", {}, entry.by),
          element("button", { type: "button", onclick: () => page.open(entry.query) }, "Ask again"),
          element("button", { type: "button", onclick: () => request(`/v1/saved/${entry.id}?${named()}`, undefined, "DELETE").then(saved, (error) => page.toast(error.message)), "aria-label": `Remove ${entry.name}` }, "Remove")),
        element("div", { class: "text" }, entry.note), element("div", { class: "meta" }, JSON.stringify(entry.query)))));
    } catch (error) {
      page.toast(error.message);
    }
  }

  async function about() {
    const index = await request(`/v1/indexes/${encodeURIComponent(page.index())}`);
    const lines = (pairs) => element("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Facts" }, element("table", {}, ...pairs.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value))))));
    const measured = index.slope
      ? [["measured by", index.slope.measured_by], ["change of the loss for each nat predicted without the slope", `${short(index.slope.value)} (${short(index.slope.low)} to ${short(index.slope.high)})`], ["rank correlation of sums with retraining (LDS)", index.slope.lds === null ? "not measured" : `${short(index.slope.lds)} (${short(index.slope.lds_low)} to ${short(index.slope.lds_high)})`]]
      : [["against trainings", "nothing was measured: wherefrom evaluate slope measures what scores are worth, and keeps it here"]];
    $("about").replaceChildren(
      element("h2", {}, "What its rows measure"),
      lines(index.tracked.flatMap((part, i) => [
        [index.tracked.length > 1 ? `model ${i + 1}` : "of the trained parameters", `${part.parameters.toLocaleString()} of ${part.of.toLocaleString()} (${percent(part.share)})`],
        ["not measured", part.left_out.slice(0, 12).join(", ") || "nothing"],
        ["layers that training changed", index.trained[i] === null ? "not known; all count as trained" : index.trained[i]],
      ])),
      element("h2", {}, "What was measured of it"), lines(measured),
      element("h2", {}, "Models"), lines(index.model_details.map((model) => [model.architecture, `${model.parameters.toLocaleString()} parameters, ${model.dtype}, ${model.id}`])),
      element("h2", {}, "Corpus"), lines([["examples", index.rows.toLocaleString()], ["deleted", index.deleted.toLocaleString()], ...Object.entries(index.about).map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? value.toLocaleString() : value])]),
      ...(index.notes.length ? [element("h2", {}, "Notes"), ...index.notes.map((note) => element("p", {}, note))] : []),
      ...index.described.flatMap((component) => [element("h2", {}, `Component ${component.name}`), lines(Object.entries(component).filter(([name]) => name !== "name").map(([name, value]) => [name.replaceAll("_", " "), typeof value === "number" ? value.toLocaleString() : value]))]));
  }

  $("browse").addEventListener("submit", (event) => (event.preventDefault(), corpus()));
  $("browse-sort").addEventListener("change", () => corpus());
  $("browse-back").addEventListener("click", () => corpus(Math.max(0, first - PAGE)));
  $("browse-next").addEventListener("click", () => corpus(first + PAGE));
  $("keep").addEventListener("click", () => $("keep-dialog").showModal());
  $("keep-dialog").addEventListener("close", async () => {
    if ($("keep-dialog").returnValue !== "save") return;
    try {
      await request("/v1/saved", { index: page.index(), name: $("keep-name").value, note: $("keep-note").value, query: page.body() });
      $("keep-name").value = $("keep-note").value = "";
      page.toast("The query is saved.");
    } catch (error) {
      page.toast(error.message);
    }
  });
  return { corpus: () => corpus(), saved, about: () => about().catch((error) => page.toast(error.message)) };
}
