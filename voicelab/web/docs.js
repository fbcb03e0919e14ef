// The API page: /openapi.json, readable.
const element = (tag, text, className = "") => Object.assign(document.createElement(tag), { textContent: text, className });
const api = await (await fetch("openapi.json")).json();
for (const [path, methods] of Object.entries(api.paths)) for (const [method, route] of Object.entries(methods)) {
  const section = element("section", "", "card");
  const title = element("h2", "");
  title.append(element("code", `${method.toUpperCase()} ${path}`));
  section.append(title, element("p", route.description ?? route.summary, "hint"));
  const [type, body] = Object.entries(route.requestBody?.content ?? {})[0] ?? [];
  if (body) {
    const table = element("table", ""), schema = body.schema;
    for (const [name, field] of Object.entries(schema.properties ?? {})) {
      const tr = table.insertRow();
      tr.insertCell().append(element("code", name));
      tr.insertCell().textContent = (schema.required ?? []).includes(name) ? "required" : "";
      tr.insertCell().textContent = [field.description, field.enum?.join(" | ")].filter(Boolean).join(": ") || String(field.type);
    }
    section.append(element("span", type), table);
  }
  section.append(element("p", "Answers: " + Object.keys(route.responses).join(", "), "hint"));
  document.getElementById("routes").append(section, element("br", ""));
}
