// Shows the OpenAPI document: every path, what it takes, and a line to try it with.

const response = await fetch("/openapi.json", { headers: authorization() });
const main = document.getElementById("paths");
const api = await response.json();

function authorization() {
  const token = sessionStorage.getItem("wherefrom-token");
  return token ? { Authorization: `Bearer ${token}` } : {};
}

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function fields(schema) {
  const name = schema?.$ref?.split("/").pop();
  const body = name ? api.components.schemas[name] : schema;
  return Object.entries(body?.properties ?? {}).map(([field, about]) => {
    const types = about.anyOf?.map((part) => part.type ?? part.$ref?.split("/").pop()) ?? [about.enum?.join(" | ") ?? about.type];
    return [field, types.filter((type) => type !== "null").join(" or "), about.default ?? "", about.description ?? "", body.required?.includes(field)];
  });
}

function table(rows) {
  const made = document.createElement("table");
  const head = made.createTHead().insertRow();
  for (const name of ["field", "type", "default", "meaning"]) head.append(Object.assign(element("th", name), { scope: "col" }));
  const body = made.createTBody();
  for (const [field, type, preset, about, required] of rows) {
    const row = body.insertRow();
    for (const text of [field + (required ? " (required)" : ""), type, preset === "" ? "" : JSON.stringify(preset), about]) row.insertCell().textContent = text;
  }
  return made;
}

main.replaceChildren();
if (!response.ok) main.append(element("p", api.detail, "note error"));
for (const [path, methods] of Object.entries(api.paths ?? {})) {
  for (const [method, about] of Object.entries(methods)) {
    const section = document.createElement("section");
    section.append(element("h2", `${method.toUpperCase()} ${path}`), element("p", about.description ?? about.summary ?? "", "dim"));
    const given = (about.parameters ?? []).map((p) => [p.name, p.schema?.type ?? "", p.schema?.default ?? "", p.description ?? `in ${p.in}`, p.required]);
    const taken = [...given, ...fields(about.requestBody?.content?.["application/json"]?.schema)];
    if (taken.length) {
      const scroll = Object.assign(element("div", "", "scroll"), { tabIndex: 0, role: "group", ariaLabel: `What ${path} takes` });
      scroll.append(table(taken));
      section.append(scroll);
    }
    main.append(section);
  }
}
