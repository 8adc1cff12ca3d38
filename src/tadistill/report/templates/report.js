"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plots = () => document.querySelectorAll(".js-plotly-plot");

// one legend for all figures of a section
const apply = (section, groups, shown) => {
  section.querySelectorAll(".js-plotly-plot").forEach((plot) => {
    const traces = plot.data.flatMap((trace, i) => (groups.has(trace.legendgroup) ? [i] : []));
    if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
  });
};
document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
  const shown = chip.getAttribute("aria-pressed") !== "true";
  chip.setAttribute("aria-pressed", String(shown));
  apply(chip.closest("section"), new Set([chip.dataset.group]), shown);
}));
document.querySelectorAll(".every").forEach((button) => button.addEventListener("click", () => {
  const chips = [...button.parentElement.querySelectorAll(".chip")];
  chips.forEach((chip) => chip.setAttribute("aria-pressed", button.dataset.shown));
  apply(button.closest("section"), new Set(chips.map((chip) => chip.dataset.group)), button.dataset.shown === "true");
}));

// plots are drawn while the page is still being read, before their columns have their final width
plots().forEach((plot) => Plotly.Plots.resize(plot));

// a finger that drags over a plot means to scroll the page
if (matchMedia("(pointer: coarse)").matches) plots().forEach((plot) => Plotly.relayout(plot, { dragmode: false }));

// plots keep the width they were drawn with, and paper is narrower than most windows
addEventListener("beforeprint", () => {
  document.querySelectorAll("section:not(#provenance) details").forEach((details) => { details.open = true; });
  plots().forEach((plot) =>
  Plotly.relayout(plot, { width: plot.closest(".panels:not(.stack)") ? 330 : 680 }));
});
addEventListener("afterprint", () => plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));

// sample browser: text goes in as text, never as markup
const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const byId = (id) => document.getElementById(id);
const setSelect = byId("sample-set");
if (setSelect) {
  const search = byId("sample-search"), indexSelect = byId("sample-index");
  const picks = [...document.querySelectorAll(".pick")];
  const wanted = () => search.value.trim().toLowerCase();
  const texts = (sample) => [sample.prompt, ...sample.references, ...Object.values(sample.answers).map((answer) => answer.text)];
  const matching = (name) => data.samples[name].filter((sample) => texts(sample).some((text) => text.toLowerCase().includes(wanted())));

  // marks what was searched for; lower-casing may change a text's length, and then it is shown unmarked
  const write = (node, text) => {
    const low = text.toLowerCase(), word = wanted();
    if (!word || low.length !== text.length) { node.textContent = text; return node; }
    const parts = [];
    let at = 0;
    for (let hit = low.indexOf(word); hit >= 0; hit = low.indexOf(word, at)) {
      parts.push(text.slice(at, hit), element("mark", "", text.slice(hit, hit + word.length)));
      at = hit + word.length;
    }
    node.replaceChildren(...parts, text.slice(at));
    return node;
  };
  const heading = (arm) => {
    const node = element("h4"), glyph = element("span", "glyph", data.glyphs[arm]);
    glyph.style.color = data.colours[arm];
    glyph.setAttribute("aria-hidden", "true");
    node.append(glyph, arm);
    return node;
  };
  const show = () => {
    const found = matching(setSelect.value), sample = found[indexSelect.selectedIndex];
    const hidden = new Set(picks.filter((pick) => pick.getAttribute("aria-pressed") !== "true").map((pick) => pick.dataset.arm));
    write(byId("sample-prompt"), sample ? sample.prompt : "");
    byId("sample-references").replaceChildren(...(sample ? sample.references : []).map((text) => write(element("pre"), text)));
    const answers = Object.entries(sample ? sample.answers : {}).filter(([arm]) => !hidden.has(arm));
    byId("sample-answers").replaceChildren(...answers.map(([arm, answer]) => {
      const card = element("article", "answer");
      card.style.borderTopColor = data.colours[arm];
      card.append(heading(arm), element("p", "scores", answer.scores), write(element("p"), answer.text));
      return card;
    }));
    byId("sample-previous").disabled = indexSelect.selectedIndex <= 0;
    byId("sample-next").disabled = indexSelect.selectedIndex >= indexSelect.options.length - 1;
    byId("sample-found").textContent = wanted() ? `${found.length} of ${data.samples[setSelect.value].length} prompts match` : "";
  };
  const fill = () => {
    indexSelect.replaceChildren(...matching(setSelect.value).map((sample) => element("option", "", sample.index)));
    show();
  };
  // counts the matches of every set, and leaves a set that has none for one that has some
  const find = () => {
    const counts = Object.keys(data.samples).map((name) => [name, matching(name).length]);
    const before = setSelect.value || counts[0][0];
    setSelect.replaceChildren(...counts.map(([name, count]) => {
      const option = element("option", "", wanted() ? `${name} (${count})` : name);
      option.value = name;
      return option;
    }));
    const better = counts.find(([, count]) => count > 0);
    setSelect.value = counts.some(([name, count]) => name === before && count > 0) || !better ? before : better[0];
    fill();
  };
  const move = (by) => { indexSelect.selectedIndex += by; show(); };
  search.addEventListener("input", find);
  setSelect.addEventListener("change", fill);
  indexSelect.addEventListener("change", show);
  byId("sample-previous").addEventListener("click", () => move(-1));
  byId("sample-next").addEventListener("click", () => move(1));
  picks.forEach((pick) => pick.addEventListener("click", () => {
    pick.setAttribute("aria-pressed", String(pick.getAttribute("aria-pressed") !== "true"));
    show();
  }));
  find();
}
