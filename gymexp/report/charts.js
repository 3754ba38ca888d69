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

  // Charts over optimizer steps zoom together.
  let following = false;
  const follow = (chart) => chart.on("plotly_relayout", (change) => {
    if (following) return;
    const [low, high] = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
    if (low === undefined && !change["xaxis.autorange"]) return;
    const update = low === undefined ? { "xaxis.autorange": true } : { "xaxis.range": [low, high] };
    following = true;
    const others = drawn.filter((other) => other !== chart && other.dataset.axis === chart.dataset.axis);
    Promise.all(others.map((other) => Plotly.relayout(other, update))).finally(() => { following = false; });
  });

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
    for (const chart of document.querySelectorAll(".chart")) {
      setHeight(chart);
    }
    for (const chart of document.querySelectorAll(".chart")) {
      await draw(chart);
      drawn.push(chart);
      if (chart.dataset.axis) follow(chart);
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
