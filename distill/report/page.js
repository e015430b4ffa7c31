// What the two readers show, the values under the pointer in the training charts, and the theme button.

function question(item) {
  const reference = item.reference === null ? "no reference answer" : `reference answer: ${item.reference}`;
  return el("div", { class: "text" }, el("pre", { class: "problem", text: item.problem }), el("p", { class: "meta", text: reference }));
}

const traceView = {
  controls(fields) {
    const failed = new Set(data.traces.flatMap((item) => item.verdicts.filter((v) => !v[1]).map((v) => v[0])));
    fields.verdict.append(option("", "all"), option("accepted", "accepted"), option("rejected", "rejected"));
    fields.verdict.append(...[...failed].sort().map((name) => option(`failed:${name}`, `failed ${name}`)));
  },
  keeps(item, fields) {
    const wanted = fields.verdict.value;
    if (wanted === "accepted") return item.accepted === true;
    if (wanted === "rejected") return item.accepted === false;
    return !wanted || item.verdicts.some((v) => !v[1] && v[0] === wanted.slice("failed:".length));
  },
  texts: (item) => [item.problem, item.reasoning, item.response, item.id, item.problem_id],
  verdict(item) {
    const failed = item.verdicts.find((v) => !v[1]);
    return failed ? el("span", { class: "fail", text: `✗ ${failed[0]}` }) : judged(item.accepted);
  },
  detail(item, fields) {
    const [prompt, reasoning, answer] = item.tokens;
    const meta = [`trace ${item.id}`, `sample ${item.sample}`, `ended by ${item.finish_reason}`];
    meta.push(`tokens: ${count(prompt)} prompt, ${count(reasoning)} reasoning, ${count(answer)} answer`);
    const verdicts = item.verdicts.map(([name, pass, reason]) =>
      el(
        "li",
        {},
        el("span", { class: pass ? "pass" : "fail", text: pass ? "✓" : "✗", "aria-label": pass ? "passed" : "failed" }),
        el("span", { text: name }),
        el("span", { class: "reason", text: reason }),
      ),
    );
    const none = el("p", { class: "unknown", text: "The filters have not run on this trace." });
    const side = verdicts.length ? el("ul", { class: "verdicts" }, ...verdicts) : none;
    return [
      el("h3", {}, document.createTextNode(`${item.family} `), judged(item.accepted)),
      el("p", { class: "meta" }, ...meta.map((text) => el("span", { text }))),
      el(
        "div",
        { class: "trace" },
        el(
          "div",
          { class: "text" },
          el("h4", { text: "Problem" }),
          question(item),
          item.reasoning
            ? folded(`Reasoning, ${count(reasoning)} tokens`, item.reasoning, fields.unfold.checked)
            : el("p", { class: "unknown", text: "No reasoning." }),
          el("h4", { text: "Answer" }),
          item.response
            ? el("pre", { class: "said", text: item.response })
            : el("p", { class: "unknown", text: "No text after the reasoning." }),
        ),
        el("div", { class: "side" }, el("h4", { text: "Verdicts" }), side),
      ),
    ];
  },
};

const ROLES = { base: "base", answers_only: "answers only" };
const OUTCOMES = [["", "all"], ["right", "student right"], ["wrong", "student wrong"]];
const PAIRS = [["right", "wrong", "student right, {} wrong"], ["wrong", "right", "student wrong, {} right"]];

function correct(item, model) {
  return item.answers[model] ? item.answers[model].correct : null;
}

// The models beside a student: [name in the data, role, label].
function beside(student) {
  const known = new Set(data.models);
  const all = [[student, "student", student]];
  for (const [role, label] of Object.entries(ROLES)) all.push([`${student}/${role}`, role, label]);
  all.push(["teacher", "teacher", "teacher"]);
  return all.filter(([model]) => known.has(model));
}

const answerView = {
  controls(fields) {
    fields.student.append(...data.students.map((name) => option(name, name)));
    fields.outcome.append(...OUTCOMES.map(([value, text]) => option(value, text)));
    const others = [...Object.entries(ROLES), ["teacher", "teacher"]];
    for (const [role, label] of others) {
      for (const [mine, theirs, text] of PAIRS) {
        fields.outcome.append(option(`${mine} ${theirs} ${role}`, text.replace("{}", label)));
      }
    }
  },
  keeps(item, fields) {
    if (!fields.outcome.value) return true;
    const [mine, theirs, role] = fields.outcome.value.split(" ");
    const student = fields.student.value;
    if (correct(item, student) !== (mine === "right")) return false;
    if (!role) return true;
    return correct(item, role === "teacher" ? role : `${student}/${role}`) === (theirs === "right");
  },
  texts: (item) => [item.problem, item.id, ...Object.values(item.answers).flatMap((a) => [a.reasoning, a.response])],
  verdict(item, fields) {
    const right = correct(item, fields.student.value);
    const glyph = right === null ? "–" : right ? "✓" : "✗";
    const label = right === null ? "no sample" : right ? "student right" : "student wrong";
    return el("span", { class: right ? "pass" : "fail", text: glyph, role: "img", "aria-label": label });
  },
  detail(item, fields) {
    const models = beside(fields.student.value).filter(([model]) => item.answers[model]);
    return [
      el("h3", { text: item.family }),
      el("p", { class: "meta", text: `problem ${item.id}` }),
      question(item),
      el("div", { class: "models" }, ...models.map((entry) => answerColumn(item, entry, fields.unfold.checked))),
    ];
  },
};

function answerColumn(item, [model, role, label], unfold) {
  const answer = item.answers[model];
  const stated = answer.extracted === null ? "no final answer" : `answered ${answer.extracted}`;
  const ending = answer.truncated ? "cut off at the token limit" : stated;
  const verdict = answer.correct ? `✓ ${stated}` : `✗ ${answer.verdict || "wrong"}: ${ending}`;
  const facts = [`${answer.right} of ${answer.samples} samples correct`, `${count(answer.tokens)} tokens`];
  const thinking = answer.closed ? "Reasoning" : "Text, with its thinking never closed";
  return el(
    "div",
    { class: role },
    el("h4", {}, mark(role), document.createTextNode(label)),
    el("p", { class: answer.correct ? "pass" : "fail", text: verdict }),
    el("p", { class: "meta" }, ...facts.map((text) => el("span", { text }))),
    answer.reasoning ? folded(thinking, answer.reasoning, unfold) : el("p", { class: "unknown", text: "No reasoning." }),
    answer.response ? el("pre", { class: "said", text: answer.response }) : null,
  );
}

// Values under the pointer in the training charts.
function follow(chart, series) {
  const output = chart.closest("figure").querySelector("output");
  const box = chart.querySelector(".box");
  const svg = box.querySelector("svg");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of [["class", "cursor"], ["y1", "0"], ["y2", "100%"], ["visibility", "hidden"]]) line.setAttribute(name, value);
  svg.append(line);
  box.addEventListener("pointermove", (event) => {
    const bounds = box.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - bounds.left) / bounds.width));
    for (const end of ["x1", "x2"]) line.setAttribute(end, `${100 * share}%`);
    line.setAttribute("visibility", "visible");
    const tokens = share * series.x_high;
    const near = series.lines.map(({ label, points }) => {
      const point = points.reduce((best, p) => (Math.abs(p[0] - tokens) < Math.abs(best[0] - tokens) ? p : best));
      return `${label} ${point[1].toPrecision(3)}`;
    });
    output.textContent = `at ${Math.round(tokens).toLocaleString("en")} tokens: ${near.join(", ")}`;
  });
  box.addEventListener("pointerleave", () => {
    line.setAttribute("visibility", "hidden");
    output.textContent = "";
  });
}

function themeButton(button) {
  const themes = { system: "light dark", light: "light", dark: "dark" };
  const names = Object.keys(themes);
  const apply = (name) => {
    document.documentElement.style.colorScheme = themes[name];
    button.textContent = `Theme: ${name}`;
    button.dataset.theme = name;
  };
  button.hidden = false;
  apply("system");
  button.addEventListener("click", () => apply(names[(names.indexOf(button.dataset.theme) + 1) % names.length]));
}

const readers = {};

// #trace/ID and #answer/PROBLEM open an item, so that people can send each other links.
function visitAddress() {
  const [kind, ...rest] = location.hash.slice(1).split("/");
  if (!Object.hasOwn(readers, kind)) return;
  const item = readers[kind].items.find((candidate) => encodeURIComponent(candidate.id) === rest.join("/"));
  if (item) readers[kind].visit(item);
}

for (const [kind, section, items, view] of [
  ["trace", "traces", data.traces, traceView],
  ["answer", "answers", data.answers, answerView],
]) {
  const node = document.getElementById(section);
  if (node) readers[kind] = new Reader(node, kind, items, view);
}
document.querySelectorAll(".linechart[data-chart]").forEach((chart) => follow(chart, data.charts[Number(chart.dataset.chart)]));
themeButton(document.getElementById("theme"));
addEventListener("hashchange", visitAddress);
visitAddress();
