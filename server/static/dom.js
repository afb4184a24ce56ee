// Elements of a page, numbers as people read them, and requests to the server.

export const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export function svg(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

export const short = (number) => String(Number(Number(number).toPrecision(4)));
export const percent = (share, digits = 1) => `${(100 * share).toFixed(digits)} %`;

export async function request(path, body, method = body === undefined ? "GET" : "POST") {
  const token = sessionStorage.getItem("wherefrom-token");
  const headers = { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  let response;
  try {
    response = await fetch(path, { method, headers, ...(body === undefined ? {} : { body: JSON.stringify(body) }) });
  } catch {
    throw new Error("The server does not answer. Is it still running?");
  }
  if (response.status === 401) {
    await askForToken(Boolean(token));
    return request(path, body, method);
  }
  if (response.status === 204) return null;
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

export function save(name, text, type) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  URL.revokeObjectURL(link.href);
}
