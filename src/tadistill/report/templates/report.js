"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const plots = () => document.querySelectorAll(".js-plotly-plot");

// one legend for all panels of the learning curves
document.querySelectorAll(".chip").forEach((chip) => chip.addEventListener("click", () => {
  const shown = chip.getAttribute("aria-pressed") !== "true";
  chip.setAttribute("aria-pressed", String(shown));
  document.querySelectorAll("#curves .js-plotly-plot").forEach((plot) => {
    const traces = plot.data.flatMap((trace, i) => (trace.legendgroup === chip.dataset.group ? [i] : []));
    if (traces.length) Plotly.restyle(plot, { visible: shown }, traces);
  });
}));

// a finger that drags over a plot means to scroll the page
if (matchMedia("(pointer: coarse)").matches) plots().forEach((plot) => Plotly.relayout(plot, { dragmode: false }));

// plots keep the width they were drawn with, and paper is narrower than most windows
addEventListener("beforeprint", () => plots().forEach((plot) =>
  Plotly.relayout(plot, { width: plot.closest(".panels") ? 330 : 680 })));
addEventListener("afterprint", () => plots().forEach((plot) => Plotly.relayout(plot, { width: null, autosize: true })));

// sample browser: text goes in as text, never as markup
const element = (tag, className, text) => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};
const setSelect = document.getElementById("sample-set");
if (setSelect) {
  const indexSelect = document.getElementById("sample-index");
  const byId = (id) => document.getElementById(id);
  const show = () => {
    const sample = data.samples[setSelect.value][indexSelect.selectedIndex];
    byId("sample-prompt").textContent = sample.prompt;
    byId("sample-references").replaceChildren(...sample.references.map((text) => element("pre", "", text)));
    byId("sample-answers").replaceChildren(...Object.entries(sample.answers).map(([arm, answer]) => {
      const card = element("article", "answer");
      card.style.borderTopColor = data.colours[arm];
      card.append(element("h4", "", arm), element("p", "scores", answer.scores), element("p", "", answer.text));
      return card;
    }));
    byId("sample-previous").disabled = indexSelect.selectedIndex === 0;
    byId("sample-next").disabled = indexSelect.selectedIndex === indexSelect.options.length - 1;
  };
  const fill = () => {
    indexSelect.replaceChildren(...data.samples[setSelect.value].map((sample) => element("option", "", sample.index)));
    show();
  };
  const move = (by) => { indexSelect.selectedIndex += by; show(); };
  setSelect.addEventListener("change", fill);
  indexSelect.addEventListener("change", show);
  byId("sample-previous").addEventListener("click", () => move(-1));
  byId("sample-next").addEventListener("click", () => move(1));
  fill();
}
