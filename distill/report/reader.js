"use strict";
// A reader: a form that filters items, a list that selects one, an article that shows it.
// All data is model output, so text enters the page through textContent alone: no markup is ever built from strings.

const data = JSON.parse(document.getElementById("data").textContent);

function el(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name === "class") node.className = value;
    else if (name === "text") node.textContent = value;
    else if (name === "onclick") node.addEventListener("click", value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function option(value, text) {
  return el("option", { value, text });
}

function mark(role) {
  const key = document.querySelector(`.key.${role}`);
  return key ? key.cloneNode(true) : document.createTextNode("");
}

function count(number) {
  return number === null || number === undefined ? "–" : number.toLocaleString("en");
}

function judged(pass) {
  if (pass === null) return el("span", { class: "unknown", text: "not judged" });
  return el("span", { class: pass ? "pass" : "fail", text: pass ? "✓ accepted" : "✗ rejected" });
}

function folded(title, text, open) {
  const body = el("pre", { tabindex: "0", text });
  return el("details", { class: "reasoning", open }, el("summary", { text: title }), body);
}

// Where the problems of a family all begin alike, what tells them apart begins after that: family -> its length.
function sharedStarts(items) {
  const starts = new Map();
  for (const { family, problem } of items) {
    if (!starts.has(family)) {
      starts.set(family, { first: problem, length: problem.length, alone: true });
      continue;
    }
    const start = starts.get(family);
    if (problem === start.first) continue;
    start.alone = false;
    while (!problem.startsWith(start.first.slice(0, start.length))) start.length -= 1;
  }
  return starts;
}

function gist(item, starts) {
  const start = starts.get(item.family);
  if (start.alone) return item.problem;
  const words = start.first.slice(0, start.length).search(/\S*$/);
  return words > 0 ? `… ${item.problem.slice(words)}` : item.problem;
}

// `view` says what a reader shows: its controls, which items they keep, an item's row and its details.
class Reader {
  constructor(section, kind, items, view) {
    Object.assign(this, { kind, items, view, current: null, shown: [], starts: sharedStarts(items) });
    this.form = section.querySelector("form");
    this.list = section.querySelector(".list ul");
    this.found = section.querySelector(".found");
    this.detail = section.querySelector(".detail");
    const families = [...new Set(items.map((item) => item.family))].sort();
    this.form.elements.family.append(option("", "all"), ...families.map((name) => option(name, name)));
    view.controls(this.form.elements);
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("input", (event) => this.changed(event.target));
    this.list.addEventListener("keydown", (event) => this.key(event));
    this.refresh();
  }

  changed(control) {
    if (control.name === "unfold") {
      for (const node of this.detail.querySelectorAll("details.reasoning")) node.open = control.checked;
    } else {
      this.refresh();
    }
  }

  refresh() {
    const fields = this.form.elements;
    const needle = fields.search.value.trim().toLowerCase();
    this.shown = this.items.filter(
      (item) =>
        (!fields.family.value || item.family === fields.family.value) &&
        this.view.keeps(item, fields) &&
        (!needle || this.view.texts(item).some((text) => String(text).toLowerCase().includes(needle))),
    );
    this.found.textContent = `${this.shown.length} of ${this.items.length} shown here`;
    this.list.replaceChildren(...this.shown.map((item) => el("li", {}, this.row(item))));
    this.select(this.shown.includes(this.current) ? this.current : this.shown[0] || null);
  }

  row(item) {
    const what = el("span", { class: "what", text: gist(item, this.starts) });
    const family = el("span", { text: item.family });
    const verdict = this.view.verdict(item, this.form.elements);
    return el("button", { type: "button", onclick: () => this.open(item) }, family, verdict, what);
  }

  // Show an item without moving the page, the focus or the address.
  select(item) {
    this.current = item;
    for (const [index, node] of [...this.list.querySelectorAll("button")].entries()) {
      const active = this.shown[index] === item;
      node.setAttribute("aria-current", active);
      node.tabIndex = active ? 0 : -1;
      if (active) this.keepInSight(node);
    }
    if (!item) {
      this.detail.replaceChildren(el("p", { class: "unknown", text: "Nothing matches these filters." }));
      return;
    }
    this.detail.replaceChildren(...this.view.detail(item, this.form.elements), this.steps());
    this.detail.scrollTop = 0;
  }

  keepInSight(node) {
    const top = node.offsetTop - this.list.offsetTop;
    if (top < this.list.scrollTop) this.list.scrollTop = top;
    const below = top + node.offsetHeight - this.list.clientHeight;
    if (below > this.list.scrollTop) this.list.scrollTop = below;
  }

  // Show an item because a person chose it: the address names it, and on a phone the page moves to it.
  open(item) {
    this.select(item);
    history.replaceState(null, "", `#${this.kind}/${encodeURIComponent(item.id)}`);
    if (this.detail.offsetTop > this.list.offsetTop + this.list.offsetHeight - 1) {
      this.detail.scrollIntoView({ block: "start" });
    }
  }

  steps() {
    const at = this.shown.indexOf(this.current);
    const step = (text, to) =>
      el("button", { type: "button", text, disabled: !this.shown[to], onclick: () => this.open(this.shown[to]) });
    return el("div", { class: "step" }, step("Previous", at - 1), step("Next", at + 1));
  }

  key(event) {
    const by = { ArrowDown: 1, j: 1, ArrowUp: -1, k: -1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    const next = this.shown[this.shown.indexOf(this.current) + by];
    event.preventDefault();
    if (!next) return;
    this.select(next);
    history.replaceState(null, "", `#${this.kind}/${encodeURIComponent(next.id)}`);
    this.list.querySelector('[aria-current="true"]').focus();
  }

  // Follow a link to an item; filters that hide it are cleared.
  visit(item) {
    if (!this.shown.includes(item)) {
      this.form.reset();
      this.refresh();
    }
    this.select(item);
    this.detail.scrollIntoView({ block: "nearest" });
    this.detail.focus({ preventScroll: true });
  }
}
