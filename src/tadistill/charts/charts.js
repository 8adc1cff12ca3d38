"use strict";
// hover values, and buttons that save a figure as SVG or PNG and its values as CSV
{
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const show = (text, x, y) => {
    tip.hidden = !text;
    if (!text) return;
    tip.textContent = text;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - width - 4))}px`;
    tip.style.top = `${y + 18 + height > innerHeight ? Math.max(4, y - height - 12) : y + 18}px`;
  };
  const values = (chart) => (chart.values ??= JSON.parse(chart.querySelector(".values").textContent));
  const hidden = (chart, name) => !!chart.querySelector(`[data-arm="${CSS.escape(name)}"].off`);
  const text = (value) => (Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(4)));

  // the values of all lines at the x under the pointer, the highest first
  const lines = (chart, event) => {
    const plot = chart.querySelector(".plot"), box = plot.getBoundingClientRect(), { low, high, log, lines, x } = values(chart);
    const share = (event.clientX - box.left) / box.width;
    if (!lines.length || share < -0.02 || share > 1.02) return "";
    const at = log ? low * (high / low) ** share : low + share * (high - low);
    const shown = lines.filter(([name, seed]) => seed === null && !hidden(chart, name)).slice(0, 60);
    const nearest = shown.map(([name, , xs, ys]) => {
      let i = 0;
      while (i + 1 < xs.length && Math.abs(xs[i + 1] - at) <= Math.abs(xs[i] - at)) i += 1;
      return [name, ys[i], xs[i]];
    }).sort((a, b) => b[1] - a[1]);
    if (!nearest.length) return "";
    const cursor = chart.querySelector(".cursor"), middle = nearest[0][2];
    const place = log ? Math.log(middle / low) / Math.log(high / low) : (middle - low) / (high - low);
    cursor.setAttribute("x1", `${100 * place}%`);
    cursor.setAttribute("x2", `${100 * place}%`);
    cursor.style.visibility = "visible";
    return [`${x} ${text(middle)}`, ...nearest.slice(0, 14).map(([name, y]) => `${name}: ${text(y)}`)].join("\n");
  };
  const move = (event) => {
    const marked = event.target.closest?.("[data-tip]"), chart = event.target.closest?.(".chart");
    document.querySelectorAll(".cursor").forEach((cursor) => { cursor.style.visibility = ""; });
    show(marked ? marked.dataset.tip : chart ? lines(chart, event) : "", event.clientX, event.clientY);
  };
  for (const kind of ["pointermove", "pointerdown"]) addEventListener(kind, move);
  addEventListener("scroll", () => show(""), { passive: true });
  addEventListener("focusin", ({ target }) => {
    const { left, bottom } = target.getBoundingClientRect();
    if (target.dataset?.tip) show(target.dataset.tip, left, bottom - 14);
  });
  addEventListener("focusout", () => show(""));

  // --- saving ---------------------------------------------------------------------------------------------------------
  const keep = (download, blob) => Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download }).click();
  // returns the figure as one SVG document with its margins, and with the colours and style rules of the page
  const standalone = (chart) => {
    const plot = chart.querySelector(".plot"), around = chart.getBoundingClientRect(), box = plot.getBoundingClientRect();
    const css = [...document.styleSheets].flatMap((sheet) => [...sheet.cssRules]).filter((rule) => /^\.(chart|off|strip)/.test(rule.selectorText ?? ""));
    const names = ["--ink", "--soft", "--line", "--page", "--guide", "--grid", "--band", "--better", "--worse", "--unclear", ...[...Array(12).keys()].map((i) => `--c${i}`)];
    const look = getComputedStyle(document.documentElement);
    const variables = names.map((name) => `${name}:${look.getPropertyValue(name)}`).join(";");
    const copy = plot.cloneNode(true), fitting = ".labels, .wide, .slim", here = [...plot.querySelectorAll(fitting)];
    copy.querySelectorAll(fitting).forEach((node, i) => getComputedStyle(here[i]).display === "none" ? node.remove() : (node.style.display = "inline"));
    copy.querySelectorAll(".off, .cursor").forEach((node) => node.remove());
    copy.setAttribute("x", box.left - around.left + 8);
    copy.setAttribute("y", 8);
    copy.setAttribute("width", box.width);
    copy.setAttribute("class", "chart");
    copy.style.overflow = "visible";
    const [width, height] = [around.width + 16, box.height + 16];
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    for (const [key, value] of [["width", width], ["height", height], ["viewBox", `0 0 ${width} ${height}`]]) svg.setAttribute(key, value);
    svg.innerHTML = `<style></style><rect width="100%" height="100%" fill="${look.getPropertyValue("--page")}"/>`;
    svg.firstChild.textContent = `svg{${variables}}${css.map((rule) => rule.cssText).join("")}`;
    svg.append(copy);
    return { markup: new XMLSerializer().serializeToString(svg), width, height };
  };
  const saveSvg = (chart) => keep(`${chart.id}.svg`, new Blob([standalone(chart).markup], { type: "image/svg+xml" }));
  const savePng = (chart) => {
    const { markup, width, height } = standalone(chart), picture = new Image();
    picture.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [2 * width, 2 * height];
      canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
      canvas.toBlob((blob) => keep(`${chart.id}.png`, blob));
    };
    picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(markup)}`;
  };
  // adds an apostrophe to a cell that a spreadsheet would run as a formula
  const cell = (value) => {
    const plain = value === null || value === undefined ? "" : String(value).replaceAll("\n", "; "), safe = /^[=+\-@\t\r]/.test(plain) && Number.isNaN(Number(plain)) ? `'${plain}` : plain;
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const saveCsv = (chart) => {
    const { lines, points, bars, x, y } = values(chart);
    const rows = bars.length ? [["series", "from x", "to x", "from y", "to y", "text"], ...bars] : [["series", "seed", x || "x", y || "y", "low", "high", "text"]];
    for (const [name, seed, xs, ys] of lines) xs.forEach((at, i) => rows.push([name, seed, at, ys[i], "", "", ""]));
    if (!bars.length) for (const [name, at, value, low, high, note] of points) rows.push([name, "", at, value, low, high, note]);
    keep(`${chart.id}.csv`, new Blob([`${rows.map((row) => row.map(cell).join(",")).join("\n")}\n`], { type: "text/csv" }));
  };
  const saves = { svg: saveSvg, png: savePng, csv: saveCsv };
  addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-save]");
    if (button) saves[button.dataset.save](button.closest(".chart"));
  });
}
