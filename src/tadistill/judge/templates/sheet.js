"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [low, high] = data.scale;
  const store = "tadistill-sheet-" + data.sheet;
  const byId = (id) => document.getElementById(id);
  const total = data.items.reduce((sum, item) => sum + item.answers.length, 0);
  const state = Object.assign({ rater: "", at: 0, ratings: {} }, load());
  let marked = 0;

  function load() {
    try { return JSON.parse(localStorage.getItem(store)) || {}; } catch { return {}; }
  }
  function save() {
    // a browser may refuse to store (private windows): the page still works, and leaving it then asks first
    try { localStorage.setItem(store, JSON.stringify(state)); stored = true; } catch { stored = false; }
  }
  let stored = true;
  const place = (item, answer) => item.item + "/" + answer.letter;
  const isOpen = (item) => item.answers.some((answer) => !(place(item, answer) in state.ratings));

  function node(tag, text, attributes = {}) {
    const made = Object.assign(document.createElement(tag), attributes);
    if (text !== null) made.textContent = text;
    return made;
  }

  function show() {
    const item = data.items[state.at];
    byId("place").textContent = `Task ${state.at + 1} of ${data.items.length}`;
    byId("instruction").textContent = item.instruction;
    byId("input").textContent = item.input;
    byId("given").hidden = !item.input;
    byId("answers").replaceChildren(...item.answers.map((answer, number) => card(item, answer, number)));
    byId("previous").disabled = state.at === 0;
    byId("next").disabled = state.at === data.items.length - 1;
    mark(Math.max(0, item.answers.findIndex((answer) => !(place(item, answer) in state.ratings))), false);
    count();
  }

  function card(item, answer, number) {
    const field = node("fieldset", null);
    field.dataset.letter = answer.letter;
    field.append(node("legend", `Answer ${answer.letter}`));
    field.append(answer.text ? node("pre", answer.text) : node("pre", "(an empty answer)", { className: "empty" }));
    const scale = node("div", null, { className: "scale" });
    scale.append(node("small", "worst"));
    for (let value = low; value <= high; value++) {
      const label = node("label", null);
      const input = node("input", null, { type: "radio", name: place(item, answer), value: String(value) });
      input.setAttribute("aria-label", `${value} of ${high}`);
      input.checked = state.ratings[place(item, answer)] === value;
      input.addEventListener("change", () => { rate(number, value); mark(number, false); });
      label.append(input, node("span", String(value)));
      scale.append(label);
    }
    scale.append(node("small", "best"));
    field.append(scale);
    field.addEventListener("pointerdown", () => mark(number, false));
    return field;
  }

  function rate(number, value) {
    const item = data.items[state.at];
    const key = place(item, item.answers[number]);
    if (value === null) delete state.ratings[key]; else state.ratings[key] = value;
    for (const input of byId("answers").children[number].querySelectorAll("input")) input.checked = Number(input.value) === value;
    save();
    count();
  }

  function mark(number, scroll) {
    const cards = [...byId("answers").children];
    marked = Math.min(Math.max(number, 0), cards.length - 1);
    cards.forEach((field, i) => field.classList.toggle("marked", i === marked));
    if (scroll) cards[marked].scrollIntoView({ block: "nearest" });
  }

  function count() {
    const rated = Object.keys(state.ratings).length;
    byId("done").textContent = rated === total ? `all ${total} rated` : `${rated} of ${total} rated`;
    Object.assign(byId("progress"), { value: rated, max: total });
    byId("open").disabled = !data.items.some(isOpen);
  }

  function go(to) {
    if (to < 0 || to >= data.items.length || to === state.at) return;
    state.at = to;
    save();
    show();
    scrollTo(0, 0);
    byId("place").focus({ preventScroll: true });
  }

  function nextOpen() {
    const order = data.items.map((_, i) => (state.at + 1 + i) % data.items.length);
    const found = order.find((i) => isOpen(data.items[i]));
    if (found !== undefined) go(found);
  }

  function cell(text) {
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  }

  function download() {
    const lines = ["sheet,rater,item,letter,rating"];
    for (const item of data.items) {
      for (const answer of item.answers) {
        const rating = state.ratings[place(item, answer)];
        if (rating !== undefined) lines.push([data.sheet, cell(state.rater), item.item, answer.letter, rating].join(","));
      }
    }
    const address = URL.createObjectURL(new Blob([lines.join("\n") + "\n"], { type: "text/csv" }));
    const link = node("a", null, { href: address, download: "answers.csv" });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  }

  document.addEventListener("keydown", (event) => {
    const typing = event.target.id === "rater";
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const digit = /^\d$/.test(event.key) ? Number(event.key) : null;
    const moves = { ArrowLeft: () => go(state.at - 1), ArrowRight: () => go(state.at + 1),
      ArrowUp: () => mark(marked - 1, true), ArrowDown: () => mark(marked + 1, true) };
    if (digit !== null && digit >= low && digit <= high) { rate(marked, digit); mark(marked + 1, true); }
    else if (digit === 0) rate(marked, null);
    // inside a row of ratings the arrows are the browser's own
    else if (moves[event.key] && event.target.type !== "radio") moves[event.key]();
    else return;
    event.preventDefault();
  });
  addEventListener("beforeunload", (event) => { if (!stored) event.preventDefault(); });
  byId("rater").value = state.rater;
  byId("rater").addEventListener("input", (event) => { state.rater = event.target.value.trim(); save(); });
  byId("previous").addEventListener("click", () => go(state.at - 1));
  byId("next").addEventListener("click", () => go(state.at + 1));
  byId("open").addEventListener("click", nextOpen);
  byId("download").addEventListener("click", download);
  state.at = Math.min(Math.max(state.at, 0), data.items.length - 1);
  byId("help").open = Object.keys(state.ratings).length === 0;
  show();
})();
