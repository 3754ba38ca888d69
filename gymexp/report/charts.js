"use strict";
// Draws the figures of a page. A figure is Plotly's {data, layout}; its colours are names of CSS variables
// ("--c1", or "--c1@0.2" with opacity), so that charts follow the page from light to dark.
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const coarse = window.matchMedia("(pointer: coarse)");
  const still = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };
  const drawn = [];

  // Plotly sets a few style attributes, which the page's policy refuses; this sets the same styles.
  const setAttribute = Element.prototype.setAttribute;
  Element.prototype.setAttribute = function (name, value) {
    if (name === "style") this.style.cssText = value;
    else setAttribute.call(this, name, value);
  };

  const withColours = (value, style) => {
    if (typeof value === "string" && value.startsWith("--")) {
      const [name, opacity] = value.split("@");
      const hex = style.getPropertyValue(name).trim();
      if (opacity === undefined) return hex;
      const parts = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
      return `rgba(${parts.join(",")},${opacity})`;
    }
    if (Array.isArray(value)) {
      const isNumeric = value.length > 2 && typeof value[0] === "number";
      return isNumeric ? value : value.map((v) => withColours(v, style));
    }
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, v]) => [key, withColours(v, style)]));
  };

  const draw = (chart) => {
    const figure = withColours(figures[chart.dataset.figure], getComputedStyle(document.documentElement));
    const zoomed = chart.layout && chart.layout.xaxis && !chart.layout.xaxis.autorange && chart.layout.xaxis.range;
    if (zoomed) figure.layout.xaxis.range = zoomed.slice();
    if (coarse.matches) figure.layout.dragmode = false; // a finger scrolls the page
    return Plotly.react(chart, figure.data, figure.layout, still);
  };

  // Charts over the same axis zoom together, and show what they have where the pointer is in one of them.
  let following = false;
  const others = (chart) => drawn.filter((other) => other !== chart && other.dataset.axis === chart.dataset.axis);
  const isSeen = (chart) => {
    const place = chart.getBoundingClientRect();
    return place.bottom > 0 && place.top < window.innerHeight;
  };
  const follow = (chart) => {
    chart.on("plotly_relayout", (change) => {
      if (following) return;
      const [low, high] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      if (low === undefined && !change["xaxis.autorange"]) return;
      const update = low === undefined ? { "xaxis.autorange": true } : { "xaxis.range": [low, high] };
      following = true;
      Promise.all(others(chart).map((other) => Plotly.relayout(other, update))).finally(() => { following = false; });
    });
    chart.on("plotly_hover", ({ points }) => {
      const at = { xval: points[0].x };
      for (const other of others(chart).filter(isSeen)) Plotly.Fx.hover(other, at, "xy", true); // without an event
    });
    chart.on("plotly_unhover", () => others(chart).forEach((other) => Plotly.Fx.unhover(other)));
  };

  // A click on a point leads to its step, on a page that says where: data-step has the address of step 0, and
  // data-files the names of those that there are, if not all.
  const pages = document.querySelector("[data-step]");
  const addressOf = (chart, point) => {
    if (point.data.meta === "page") return point.customdata; // of each point its own
    const kind = point.data.meta || (chart.dataset.axis === "step" && "step");
    if (!pages || !kind) return null;
    const step = Number(point.x);
    if (!Number.isInteger(step)) return null;
    const file = `${kind}-${String(step).padStart(6, "0")}`;
    const files = pages.dataset.files;
    return files && !files.split(" ").includes(file) ? null : pages.dataset.step.replace(/step-000000(?!.*step-0)/, file);
  };
  const lead = (chart) => chart.on("plotly_click", ({ points, event }) => {
    const address = points.map((point) => addressOf(chart, point)).find(Boolean);
    if (!address) return;
    if (event && (event.ctrlKey || event.metaKey)) window.open(address, "_blank", "noopener");
    else location.assign(address);
  });

  // CSV: a line a point, with its chart and its series; or a table as it is shown. A cell that a spreadsheet
  // would take for a formula gets an apostrophe; a number stays one.
  const isNumber = (text) => /^[+-]?\d+(\.\d+)?(e[+-]?\d+)?$/i.test(text);
  const cell = (value) => {
    let text = value === null || value === undefined || value === "–" ? "" : String(value);
    if (/^[=+\-@\u0000-\u001f\u007f-\u009f]/.test(text) && !isNumber(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const asCsv = (lines) => lines.map((line) => `${line.map(cell).join(",")}\r\n`).join("");
  const plain = (text) => String(text).replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
  const pointsOf = (trace, x, unit) => {
    if (trace.type === "heatmap") {
      return trace.z.flatMap((row, r) => row.map((z, c) => ({ [x]: trace.x[c], of: plain(trace.y[r]), value: z })));
    }
    if (trace.orientation === "h") {
      return trace.x.map((seconds, n) => ({ begins: trace.base[n], seconds }));
    }
    const error = trace.error_y;
    return trace.y.map((y, n) => ({
      [x]: trace.x ? trace.x[n] : trace.x0 + n * trace.dx, value: y, unit,
      ...(error && { low: y - error.arrayminus[n], high: y + error.array[n] }),
    }));
  };
  const rowsOf = (figure) => {
    const select = figure.querySelector("select");
    const caption = figure.querySelector("figcaption").firstChild.textContent.trim();
    const chart = select ? select.selectedOptions[0].textContent : caption;
    const { data, layout } = figures[figure.querySelector(".chart").dataset.figure];
    const [x, unit] = [layout.xaxis, layout.yaxis].map((axis) => plain(axis.title.text));
    return data.flatMap((trace) => pointsOf(trace, x, unit).map(
      (point) => ({ chart, series: trace.name === undefined ? "" : plain(trace.name), ...point })));
  };
  const chartsCsv = (panel) => {
    const rows = [...panel.querySelectorAll("figure")].flatMap(rowsOf);
    const columns = [...new Set(rows.flatMap(Object.keys))];
    return asCsv([columns, ...rows.map((row) => columns.map((column) => row[column]))]);
  };
  const tableCsv = (table) => asCsv([...table.rows].map((row) => [...row.cells].map((one) => one.textContent.trim())));
  const save = (name, text) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${document.title.replace(/[^\w.-]+/g, "_")}-${name}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  };
  const button = (text, name, make) => {
    const one = document.createElement("button");
    one.type = "button";
    one.className = "csv no-print";
    one.textContent = text;
    one.addEventListener("click", () => save(name, make()));
    return one;
  };
  const offerCsv = () => {
    for (const panel of document.querySelectorAll(".panels > section")) {
      if (panel.querySelector("figure")) panel.prepend(button("CSV", panel.id, () => chartsCsv(panel)));
      panel.querySelectorAll("table").forEach((table, n) => {
        const name = `${panel.id}-table${n ? n + 1 : ""}`;
        table.parentElement.after(button("CSV of the table", name, () => tableCsv(table)));
      });
    }
  };

  const setHeight = (chart) => { chart.style.height = `${figures[chart.dataset.figure].layout.height}px`; };
  for (const select of document.querySelectorAll("figure select")) {
    select.addEventListener("change", () => {
      const chart = select.closest("figure").querySelector(".chart");
      chart.dataset.figure = select.value;
      setHeight(chart);
      Plotly.purge(chart);
      draw(chart);
    });
  }

  const start = async () => {
    offerCsv();
    for (const chart of document.querySelectorAll(".chart")) {
      setHeight(chart);
    }
    for (const chart of document.querySelectorAll(".chart")) {
      await draw(chart);
      drawn.push(chart);
      if (chart.dataset.axis) follow(chart);
      lead(chart);
      await new Promise((resume) => setTimeout(resume));
    }
    document.documentElement.dataset.drawn = String(drawn.length);
  };
  dark.addEventListener("change", () => drawn.forEach(draw));

  // A page that reloads itself stays where the reader was.
  const place = `scroll ${location.pathname}`;
  try {
    const was = sessionStorage.getItem(place);
    if (was) window.scrollTo(0, Number(was));
    window.addEventListener("pagehide", () => sessionStorage.setItem(place, String(window.scrollY)));
  } catch { /* the browser keeps nothing for files */ }
  document.addEventListener("DOMContentLoaded", start);
})();
