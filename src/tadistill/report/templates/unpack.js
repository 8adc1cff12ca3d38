"use strict";
// The sections of a large study are packed (gzip in base64). Scripts of the page that need them wait until they are unpacked.
{
  const unpacked = async (text) => {
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  };
  const put = (node, text) => {
    if (node.tagName === "SCRIPT") node.textContent = text;
    else node.outerHTML = text;
  };
  const nodes = [...document.querySelectorAll("[data-packed]")];
  Promise.all(nodes.map((node) => unpacked(node.dataset.packed))).then((texts) => {
    nodes.forEach((node, i) => put(node, texts[i]));
    for (const waiting of document.querySelectorAll("script[data-waits]")) {
      const script = document.createElement("script");
      script.textContent = waiting.textContent;
      waiting.replaceWith(script);
    }
  });
}
