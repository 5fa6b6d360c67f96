// A page that is watched: loaded anew when the run has written something; what was unfolded stays so.
"use strict";

(() => {
  const SECONDS = 2;
  const KEY = "unfolded";
  const all = [...document.querySelectorAll("details")];
  const title = (details) => details.querySelector("summary").textContent;
  const unfolded = new Set(JSON.parse(sessionStorage.getItem(KEY) ?? "[]"));
  for (const details of all) details.open = unfolded.has(title(details));
  setInterval(async () => {
    let found;
    try {
      found = (await fetch("/", { method: "HEAD", cache: "no-store" })).headers.get("ETag");
    } catch {
      // The server is gone; the page stays as it is.
      return;
    }
    if (!found || found === document.documentElement.dataset.version) return;
    sessionStorage.setItem(KEY, JSON.stringify(all.filter((details) => details.open).map(title)));
    location.reload();
  }, 1000 * SECONDS);
})();
