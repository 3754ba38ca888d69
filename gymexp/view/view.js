"use strict";
// What the viewer's pages do beyond links and forms: keys, the tokens' colours and hover, news of a live run, the
// map of tasks, the button that copies a link, and sorting and filtering the tables of an export. Every page works
// without it.
(() => {
  const main = () => document.getElementById("main");
  const typing = (target) => target instanceof HTMLElement && target.closest("input, select, textarea");

  // Keys. Links name theirs; a list moves a mark, and Enter opens the marked row.
  const followLink = (selector) => {
    const link = document.querySelector(selector);
    if (link) location.assign(link.href);
    return Boolean(link);
  };
  const mark = (by) => {
    const rows = [...document.querySelectorAll("tr.row")].filter((row) => !row.hidden);
    if (!rows.length) return;
    const now = rows.findIndex((row) => row.classList.contains("marked"));
    const next = Math.max(0, Math.min(rows.length - 1, now < 0 ? 0 : now + by));
    rows.forEach((row, at) => row.classList.toggle("marked", at === next));
    rows[next].scrollIntoView({ block: "nearest" });
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || typing(event.target)) return;
    const key = event.key;
    if (key === "/") {
      const filter = document.getElementById("filter");
      if (filter) filter.focus();
      else return;
    } else if (key === "Enter") {
      const link = document.querySelector("tr.marked a.go");
      if (!link || event.target.closest("a, button, summary")) return;
      location.assign(link.href);
    } else if ("jk[]t".includes(key)) {
      if (!followLink(`a[data-key="${key}"]`) && (key === "j" || key === "k")) mark(key === "j" ? 1 : -1);
    } else return;
    event.preventDefault();
  });

  // Colours of the tokens.
  const setHeat = (heat) => {
    for (const place of document.querySelectorAll("[class*='heat-']")) {
      place.className = place.className.replace(/\bheat-\w+/, `heat-${heat}`);
    }
    for (const choice of document.querySelectorAll("[data-heat]")) {
      if (choice.dataset.heat === heat) choice.setAttribute("aria-current", "true");
      else choice.removeAttribute("aria-current");
      if (choice.dataset.heat === heat && choice.href) history.replaceState(null, "", choice.href);
    }
  };
  document.addEventListener("click", (event) => {
    const choice = event.target.closest("[data-heat]");
    if (!choice || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    setHeat(choice.dataset.heat);
  });

  // A token's numbers.
  const line = (box, name, value) => {
    if (value === "") return;
    const row = document.createElement("div");
    row.textContent = `${name} ${value}`.trim();
    box.append(row);
  };
  const hover = (token) => {
    const box = document.getElementById("hover");
    if (!box) return;
    box.hidden = !token;
    if (!token) return;
    const [ids, logprob, trainer, ratio, weight, turn] = token.dataset.t.split(";");
    box.textContent = "";
    line(box, "piece", JSON.stringify(token.textContent));
    line(box, ids.includes(" ") ? "ids" : "id", ids);
    if (logprob !== "") line(box, "log-probability", `${logprob} nats (${(100 * Math.exp(logprob)).toFixed(1)} %)`);
    line(box, "trainer", trainer);
    line(box, "ratio", ratio);
    line(box, "weight in the loss", weight);
    line(box, "turn", String(Number(turn) + 1));
    line(box, "", token.classList.contains("y") ? document.getElementById("tokens").dataset.sampled : "masked");
    const at = token.getBoundingClientRect();
    const left = Math.min(at.left, document.documentElement.clientWidth - box.offsetWidth - 8);
    const below = at.bottom + box.offsetHeight + 8 < window.innerHeight;
    box.style.left = `${Math.max(4, left)}px`;
    box.style.top = `${below ? at.bottom + 4 : Math.max(4, at.top - box.offsetHeight - 4)}px`;
  };
  document.addEventListener("mouseover", (event) => hover(event.target.closest(".tokens .tk")));
  document.addEventListener("click", (event) => {
    if (event.target.closest(".tokens .tk")) hover(event.target.closest(".tokens .tk"));
  });

  // A cell of the map of tasks opens its group, once the charts are drawn.
  const openCells = () => {
    for (const chart of document.querySelectorAll("[data-group] .chart")) {
      const address = chart.closest("[data-group]").dataset.group;
      chart.on("plotly_click", ({ points: [cell] }) => {
        if (!cell.customdata) return;
        const [file, group] = cell.customdata.split("/");
        location.assign(address.replace("~file", file).replace("~group", group));
      });
    }
  };
  new MutationObserver(openCells).observe(document.documentElement, { attributeFilter: ["data-drawn"] });

  // Copies the address of the page, which never has the token for long.
  const copied = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
    } catch { // an older browser, or one that lets no file copy
      const field = document.createElement("textarea");
      field.value = text;
      document.body.append(field);
      field.select();
      const isCopied = document.execCommand("copy");
      field.remove();
      return isCopied;
    }
    return true;
  };
  const copy = document.getElementById("copy-link");
  if (copy) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      const address = new URL(location.href);
      address.searchParams.delete("token");
      const isCopied = await copied(address.href);
      copy.textContent = isCopied ? "copied" : "not copied: the browser forbids it";
      setTimeout(() => { copy.textContent = "copy link"; }, 2000);
    });
  }

  // An export has no server that sorts and filters.
  const isExport = !document.body.dataset.events;
  const valueOf = (row, at) => {
    const text = row.cells[at].textContent.trim();
    const number = parseFloat(text.replace("−", "-").replace(/^held-out /, ""));
    return text === "–" || text === "" ? null : Number.isNaN(number) ? text : number;
  };
  const sortBy = (head) => {
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const rows = [...body.rows].map((row) => [valueOf(row, head.cellIndex), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
      return sign * (a < b ? -1 : a > b ? 1 : 0);
    });
    body.append(...rows.map(([, row]) => row));
  };
  if (isExport) {
    for (const head of document.querySelectorAll("table[data-sortable] th")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = head.textContent.replace(/[▲▼]/, "").trim();
      head.replaceChildren(button);
      head.removeAttribute("aria-sort");
      button.addEventListener("click", () => sortBy(head));
    }
    const filter = document.querySelector("[data-filter]");
    if (filter) filter.addEventListener("input", () => {
      const wanted = filter.value.toLowerCase();
      let shown = 0;
      for (const row of document.querySelectorAll("tr.row")) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += !row.hidden;
      }
      document.getElementById("count").textContent = shown;
    });
    return;
  }

  // News of a live run: the page is fetched again, and its content replaced.
  const openParts = () => [...main().querySelectorAll("details")].map((part) => part.open);
  const drawnFrom = (place) => ["#figures", ".state"].map((one) => (place.querySelector(one) || {}).textContent).join();
  const renew = async () => {
    if (typing(document.activeElement) || String(getSelection())) return; // the reader is in the middle of something
    const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
    if (!answer.ok) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const fresh = page.getElementById("main");
    if (!fresh || fresh.innerHTML === main().innerHTML) return;
    if (document.getElementById("figures")) { // charts are drawn once a page
      if (drawnFrom(fresh) !== drawnFrom(main())) location.reload();
      return;
    }
    const open = openParts();
    const marked = [...main().querySelectorAll("tr.row")].findIndex((row) => row.classList.contains("marked"));
    main().replaceWith(document.adoptNode(fresh));
    main().querySelectorAll("details").forEach((part, at) => { if (open[at]) part.open = true; });
    if (marked >= 0) mark(marked);
  };
  // A browser keeps six connections to a host, so that only the tab that is seen has one for news.
  let source = null;
  const listen = (isBack) => {
    if (source) source.close();
    source = null;
    if (document.hidden) return;
    source = new EventSource(document.body.dataset.events);
    source.addEventListener("message", () => { renew().catch(() => {}); });
    if (isBack) renew().catch(() => {});
  };
  document.addEventListener("visibilitychange", () => listen(true));
  window.addEventListener("pagehide", () => { if (source) source.close(); });
  listen(false);
})();
