// Refreshes the page by its own HTML, and what needs a click. No library: Flower's versions differ in theirs.
"use strict";
(() => {
  const live = document.getElementById("bt-live");
  if (!live) return;

  // -- times: how long ago, as the clock of this browser has it ------------------------------------

  const UNITS = [["d", 86400], ["h", 3600], ["m", 60], ["s", 1]];

  function ago(then) {
    const seconds = Math.round((Date.now() - then) / 1000);
    if (seconds < 3) return "just now";
    for (const [unit, size] of UNITS) {
      if (seconds >= size) return Math.floor(seconds / size) + "\u202f" + unit + " ago";
    }
    return "";
  }

  function tellTimes() {
    for (const each of document.querySelectorAll("#bt time[data-ago]")) {
      const then = Date.parse(each.getAttribute("datetime"));
      const text = Number.isNaN(then) ? "" : ago(then);
      if (text && each.textContent !== text) each.textContent = text;
    }
  }

  // -- one tree becomes another: what is the same stays, with its focus, selection and scroll ---------

  function keyOf(node) {
    return node.nodeType === 1 ? node.getAttribute("data-key") || node.id || null : null;
  }

  function alike(one, other) {
    return one.nodeType === other.nodeType && one.nodeName === other.nodeName && keyOf(one) === keyOf(other);
  }

  const KEPT = { DETAILS: ["open"], DIALOG: ["open"], INPUT: ["value", "checked"], OPTION: ["selected"] };

  function morph(old, fresh) {
    if (old.nodeType !== 1) {
      if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
      return;
    }
    const kept = KEPT[old.nodeName] || [];
    for (const { name, value } of Array.from(fresh.attributes)) {
      if (!kept.includes(name) && old.getAttribute(name) !== value) old.setAttribute(name, value);
    }
    for (const { name } of Array.from(old.attributes)) {
      if (!kept.includes(name) && !fresh.hasAttribute(name)) old.removeAttribute(name);
    }
    if (old.nodeName !== "TEXTAREA") morphChildren(old, fresh);
  }

  function morphChildren(old, fresh) {
    const keyed = new Map();
    for (const child of old.childNodes) {
      if (keyOf(child)) keyed.set(keyOf(child), child);
    }
    let at = old.firstChild;
    for (const wanted of Array.from(fresh.childNodes)) {
      const key = keyOf(wanted);
      let found = key ? keyed.get(key) : at;
      if (found && !alike(found, wanted)) found = null;
      if (!found) {
        old.insertBefore(wanted, at);
        continue;
      }
      if (found === at) at = at.nextSibling;
      else old.insertBefore(found, at);
      morph(found, wanted);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
  }

  // -- refreshing -----------------------------------------------------------------------------------

  const pulse = document.getElementById("bt-pulse");
  const pulseText = document.getElementById("bt-pulse-text");
  const trouble = document.getElementById("bt-trouble");
  let every = 1000 * Number(live.dataset.every);
  let failures = 0, paused = false, timer = null, busy = false;

  function say(state, text) {
    if (!pulse) return;
    pulse.dataset.state = state;
    pulse.setAttribute("aria-pressed", String(paused));
    pulse.title = paused ? "Refresh again" : "Stop refreshing";
    pulseText.textContent = text;
  }

  function complain(text) {
    if (!trouble) return;
    trouble.hidden = !text;
    trouble.textContent = text || "";
  }

  function later(milliseconds) {
    clearTimeout(timer);
    if (!paused && every > 0) timer = setTimeout(refresh, milliseconds);
  }

  function address() {
    const url = new URL(window.location.href);
    url.hash = "";
    url.searchParams.set("fragment", "1");
    return url;
  }

  async function refresh() {
    if (busy || paused || document.hidden || document.querySelector("dialog[open]")) {
      if (!document.hidden) later(every);
      return;
    }
    busy = true;
    const started = performance.now();
    try {
      const answer = await fetch(address(), { cache: "no-cache", credentials: "same-origin", redirect: "manual" });
      if (answer.type === "opaqueredirect" || answer.status === 401) {
        window.location.reload();  // the login is over
        return;
      }
      const html = await answer.text();
      if (!answer.ok && answer.status !== 404) throw new Error(String(answer.status));
      show(html);
      every = 1000 * Number(answer.headers.get("X-Batchtrack-Every") || 0);
      failures = 0;
      complain("");
      say(every ? "live" : "ended", every ? "Live" : "Ended");
      later(Math.max(every, 3 * (performance.now() - started)));
    } catch (error) {
      failures += 1;
      const wait = Math.min(60, 5 * 2 ** (failures - 1));
      complain((error.message === "503" ? "The tracking database does not answer. " : "Flower does not answer. ")
        + "What you see is old; trying again in " + wait + " s.");
      say("trouble", "Waiting");
      later(1000 * wait);
    } finally {
      busy = false;
    }
  }

  function show(html) {
    const fresh = document.createElement("div");
    fresh.innerHTML = html;  // escaped by the server; scripts in it would not run
    morphChildren(live, fresh);
    tellTimes();
    document.dispatchEvent(new CustomEvent("bt:refreshed"));
  }

  if (pulse && every > 0) {
    pulse.hidden = false;
    say("live", "Live");
    pulse.addEventListener("click", () => {
      paused = !paused;
      if (paused) say("paused", "Paused");
      else { say("live", "Live"); refresh(); }
    });
    document.addEventListener("visibilitychange", () => {
      clearTimeout(timer);
      if (!document.hidden && !paused && every > 0) refresh();
    });
    later(every);
  }

  // -- clicks ---------------------------------------------------------------------------------------

  async function copy(button) {
    const text = button.dataset.copy;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");  // where the page is not on https or localhost
      area.value = text;
      area.className = "bt-offscreen";
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.classList.add("bt-copied");
    setTimeout(() => button.classList.remove("bt-copied"), 1200);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-copy]");
    if (button) {
      event.preventDefault();
      copy(button);
      return;
    }
    const opener = event.target.closest("[data-dialog]");
    const dialog = opener && document.getElementById(opener.dataset.dialog);
    if (dialog && dialog.showModal && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      if (dialog.open) dialog.close();
      dialog.showModal();
      return;
    }
    const closer = event.target.closest("[data-close]");
    if (closer) {
      event.preventDefault();
      closer.closest("dialog").close();
    }
  });

  document.addEventListener("change", (event) => {
    if (event.target.matches("[data-submit]")) event.target.form.requestSubmit();
  });

  for (const open of document.querySelectorAll("dialog[open]")) {
    open.close();
    open.showModal();
  }
  tellTimes();
  setInterval(() => { if (!document.hidden) tellTimes(); }, 5000);
})();
