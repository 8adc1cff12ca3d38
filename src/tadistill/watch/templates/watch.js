"use strict";
// asks for the parts of the page again and again, and replaces those that have changed
{
  const digests = {}, live = document.getElementById("live"), wanted = new Set(new URLSearchParams(location.search).getAll("node"));
  let hovered = 0, busy = false, timer;
  const query = () => [...wanted].map((node) => `node=${encodeURIComponent(node)}`).join("&");

  const put = (name, html, digest) => {
    const part = document.getElementById(name);
    // a curve under the pointer stays for a few seconds, so that its values can be read
    if (name === "curves" && part.matches(":hover") && digests[name] !== undefined && Date.now() - hovered < 5000) return;
    digests[name] = digest;
    const open = [...part.querySelectorAll("details[open]")].map((found) => found.id), focus = document.activeElement?.dataset?.node;
    const across = part.querySelector(".scroll")?.scrollLeft;
    part.innerHTML = html;
    open.forEach((id) => { const found = document.getElementById(id); if (found) found.open = true; });
    if (across) part.querySelector(".scroll").scrollLeft = across;
    if (focus && name === "graph") part.querySelector(`[data-node="${CSS.escape(focus)}"]`)?.focus({ preventScroll: true });
  };

  const refresh = async () => {
    if (busy) return;
    busy = true;
    clearTimeout(timer);
    let pause = 2;
    try {
      const reply = await fetch(`state?${query()}&${Object.values(digests).map((digest) => `have=${digest}`).join("&")}`, { cache: "no-store", signal: AbortSignal.timeout(15000) });
      if (!reply.ok) throw new Error(await reply.text());
      const found = await reply.json();
      document.title = found.title;
      for (const [name, html] of Object.entries(found.parts)) put(name, html, found.digests[name]);
      live.classList.remove("lost");
      live.textContent = `updated ${new Date().toLocaleTimeString("en-GB")}`;
      pause = found.pause;
    } catch (error) {
      live.classList.add("lost");
      live.textContent = error instanceof TypeError || error.name === "TimeoutError" ? "The server does not answer. This is the state of its last answer." : error.message;
      pause = 5;
    }
    busy = false;
    if (!document.hidden) timer = setTimeout(refresh, 1000 * pause);
  };

  addEventListener("pointermove", () => { hovered = Date.now(); }, { passive: true });
  addEventListener("click", (event) => {
    const node = event.target.closest?.("[data-node]")?.dataset.node, clear = event.target.closest?.("[data-clear]");
    if (!node && !clear) return;
    if (clear) wanted.clear();
    else if (!wanted.delete(node)) wanted.add(node);
    history.replaceState(null, "", query() ? `?${query()}` : location.pathname);
    hovered = 0;
    refresh();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  refresh();
}
