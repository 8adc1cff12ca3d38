"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

// --- arms that are hidden everywhere; the address remembers them: #section&hide=a,b --------------------------------------
const hidden = new Set();
const address = () => {
  const [section, ...rest] = location.hash.slice(1).split("&");
  const found = rest.find((part) => part.startsWith("hide="));
  return { section, hide: found ? found.slice(5).split(",").filter(Boolean).map(decodeURIComponent) : [] };
};
const write = (section) => {
  const names = [...hidden].map(encodeURIComponent).join(",");
  history.replaceState(null, "", `#${section}${names ? `&hide=${names}` : ""}`);
};
const apply = () => {
  document.querySelectorAll("[data-arm]").forEach((node) => node.classList.toggle("off", hidden.has(node.dataset.arm)));
  document.querySelectorAll("[data-toggle]").forEach((button) => button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.toggle))));
};
const toggle = (buttons, shown) => {
  buttons.forEach(({ dataset }) => (shown ?? hidden.has(dataset.toggle) ? hidden.delete(dataset.toggle) : hidden.add(dataset.toggle)));
  apply();
  write(address().section);
};
document.querySelectorAll("[data-toggle]").forEach((button) => button.addEventListener("click", () => toggle([button])));
document.querySelectorAll(".every").forEach((button) => button.addEventListener("click", () => {
  toggle(button.parentElement.querySelectorAll("[data-toggle]"), button.dataset.shown === "true");
}));
const go = (section) => {
  const target = section && byId(section);
  if (!target) return;
  for (let node = target; node; node = node.parentElement) if (node.tagName === "DETAILS" && !node.classList.contains("pop")) node.open = true;
  target.scrollIntoView();
};
const follow = () => {
  const { section, hide } = address();
  hidden.clear();
  hide.forEach((name) => hidden.add(name));
  apply();
  go(section);
};
document.querySelectorAll('a[href^="#"]').forEach((link) => link.addEventListener("click", (event) => {
  event.preventDefault();
  write(link.hash.slice(1));
  go(link.hash.slice(1));
}));
addEventListener("hashchange", follow);
const pop = byId("arm-chips");
addEventListener("click", (event) => { if (pop && !pop.contains(event.target)) pop.open = false; });
addEventListener("keydown", (event) => { if (pop && event.key === "Escape") pop.open = false; });
follow();

// --- tables: click a heading to sort; long ones have a filter -----------------------------------------------------------
const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const figure = (cell) => {
  const found = cell.textContent.trim().replaceAll("−", "-").match(/^[<+]?\s*(-?\d[\d.]*(?:e-?\d+)?)/);
  return found ? Number(found[1]) : NaN;
};
const compare = (a, b) => {
  const [x, y] = [figure(a), figure(b)];
  if (!Number.isNaN(x) && !Number.isNaN(y)) return x - y;
  return Number.isNaN(x) === Number.isNaN(y) ? a.textContent.localeCompare(b.textContent) : Number.isNaN(x) ? 1 : -1;
};
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2) return;
  heads.forEach((head, column) => {
    if (head.classList.contains("plot")) return;
    const button = element("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => compare(a.cells[column], b.cells[column]));
      body.append(...(down ? rows.reverse() : rows));
    });
  });
  if (body.rows.length < 12) return;
  const label = element("label", "filter", "Filter "), input = element("input");
  input.type = "search";
  label.append(input);
  (table.closest(".scroll") ?? table).before(label);
  input.addEventListener("input", () => {
    const wanted = input.value.trim().toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
  });
});

// printing opens all folded parts, except those of the section `how` (recipe and stages)
addEventListener("beforeprint", () => document.querySelectorAll("section:not(#how) details").forEach((details) => { details.open = true; }));

// --- sample browser: text goes in as text, never as markup --------------------------------------------------------------
const setSelect = byId("sample-set");
if (setSelect) {
  const search = byId("sample-search"), indexSelect = byId("sample-index");
  const picks = [...document.querySelectorAll(".pick")];
  const wanted = () => search.value.trim().toLowerCase();
  const said = (turn) => [turn.thinking || "", turn.text];
  const texts = (sample) => [sample.prompt, ...sample.references, ...sample.turns.flatMap(said), ...Object.values(sample.answers).flatMap(said)];
  const matching = (name) => data.samples[name].filter((sample) => texts(sample).some((text) => text.toLowerCase().includes(wanted())));

  // marks the searched words; if lower-casing changes the length of a text, the text is shown without marks
  const fill = (node, text) => {
    const low = text.toLowerCase(), word = wanted(), parts = [];
    let at = 0;
    for (let hit = word && low.length === text.length ? low.indexOf(word) : -1; hit >= 0; hit = low.indexOf(word, at)) {
      parts.push(text.slice(at, hit), element("mark", "", text.slice(hit, hit + word.length)));
      at = hit + word.length;
    }
    node.replaceChildren(...parts, text.slice(at));
    return node;
  };
  // shows the thinking of a model in a paragraph of its own, before its answer
  const parts = (turn, tag) => {
    const thought = turn.thinking ? [element("p", "thinking")] : [], text = turn.text || thought.length === 0;
    for (const node of thought) node.append(element("b", "", "thinking"), " ", fill(element("span"), turn.thinking));
    return [...thought, text ? fill(element(tag), turn.text) : element("p", "soft", "The text ends inside the thinking.")];
  };
  const conversation = (turns) => turns.map((turn) => {
    const block = element("div", "turn");
    block.append(element("b", "role", turn.role), ...parts(turn, "pre"));
    return block;
  });
  const asked = (sample) => {
    const whole = fill(element("pre"), sample.prompt);
    if (!sample.turns.length) return [whole];
    const turns = element("div", "turns"), written = element("details");
    turns.append(...conversation(sample.turns));
    written.append(element("summary", "", "As the chat template writes it, without special tokens"), whole);
    return [turns, written];
  };
  const show = () => {
    const found = matching(setSelect.value), sample = found[indexSelect.selectedIndex];
    const away = new Set(picks.filter((pick) => pick.getAttribute("aria-pressed") !== "true").map((pick) => pick.dataset.pick));
    byId("sample-prompt").replaceChildren(...(sample ? asked(sample) : []));
    byId("sample-references").replaceChildren(...(sample ? sample.references : []).map((text) => fill(element("pre"), text)));
    const answers = Object.entries(sample ? sample.answers : {}).filter(([arm]) => !away.has(arm));
    byId("sample-answers").replaceChildren(...answers.map(([arm, answer]) => {
      const card = element("article", "answer"), heading = element("h3"), glyph = element("span", "glyph", `${data.glyphs[arm]}\ufe0e`);
      card.style.borderTopColor = glyph.style.color = data.colours[arm];
      card.dataset.arm = arm;
      card.classList.toggle("off", hidden.has(arm));
      glyph.setAttribute("aria-hidden", "true");
      heading.append(glyph, arm);
      card.append(heading, element("p", "scores", answer.scores), ...parts(answer, "p"));
      return card;
    }));
    byId("sample-previous").disabled = indexSelect.selectedIndex <= 0;
    byId("sample-next").disabled = indexSelect.selectedIndex >= indexSelect.options.length - 1;
    byId("sample-found").textContent = wanted() ? `${found.length} of ${data.samples[setSelect.value].length} prompts match` : "";
  };
  const list = () => {
    indexSelect.replaceChildren(...matching(setSelect.value).map((sample) => new Option(sample.index)));
    show();
  };
  // shows the number of matches in every set; if the chosen set has none, chooses the first set that has some
  const find = () => {
    const counts = new Map(Object.keys(data.samples).map((name) => [name, matching(name).length])), [first] = counts.keys();
    const before = setSelect.value || first, better = [...counts.keys()].find((name) => counts.get(name));
    setSelect.replaceChildren(...[...counts].map(([name, count]) => new Option(wanted() ? `${name} (${count})` : name, name)));
    setSelect.value = counts.get(before) || !better ? before : better;
    list();
  };
  search.addEventListener("input", find);
  setSelect.addEventListener("change", list);
  indexSelect.addEventListener("change", show);
  for (const [id, by] of [["sample-previous", -1], ["sample-next", 1]]) byId(id).addEventListener("click", () => { indexSelect.selectedIndex += by; show(); });
  picks.forEach((pick) => pick.addEventListener("click", () => {
    pick.setAttribute("aria-pressed", String(pick.getAttribute("aria-pressed") !== "true"));
    show();
  }));
  find();
}
