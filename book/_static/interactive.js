/* The interactive figure: no kernel, no server. A page asks for it with <div class="sdecor-interactive" data-figure="splitting"></div>, followed by
   a static figure in a cell tagged `interactive-fallback`, which stays for print and wherever this script does not run. */
(() => {
  "use strict";
  const HERE = new URL(".", document.currentScript.src);
  const LIBRARIES = ["vendor/d3.min.js", "vendor/plot.umd.min.js"];
  const SIDE = 16; // pixels of the picture, along one side
  const SD = 1.2; // of a receptive field, in pixels
  const PLACES = [[2, 2], [7, 2], [12, 2], [2, 7], [12, 7], [2, 12], [7, 12], [12, 12]].map((p) => p.map((v) => v + 1)); // centres: column, row
  const MOST = PLACES.length;

  /* ---- the model, in closed form ---- */

  /** Weights of population ridge on M unit-variance features with pairwise correlation rho, when the target is feature 1. */
  function ridgeWeights({ rho, copies, lambda }) {
    const nu = 1 + (copies - 1) * rho;
    const a = (1 - rho) / (1 - rho + lambda);
    const b = (nu / (nu + lambda) - a) / copies;
    return Array.from({ length: copies }, (_, j) => (j === 0 ? a + b : b));
  }

  /** How many entries of a non-negative list count: (sum v)^2 / sum v^2. */
  function participationRatio(v) {
    const sum = v.reduce((s, x) => s + x, 0);
    return sum ** 2 / v.reduce((s, x) => s + x * x, 0);
  }

  const PIXELS = Array.from({ length: SIDE * SIDE }, (_, i) => ({ column: i % SIDE, row: Math.floor(i / SIDE) }));
  const FIELDS = PLACES.map(([x, y]) =>
    PIXELS.map(({ column, row }) => Math.exp(-((column + 0.5 - x) ** 2 + (row + 0.5 - y) ** 2) / (2 * SD ** 2))),
  );

  /** |sum_j w_j u_j| at each pixel. */
  function gradientMap(weights) {
    return PIXELS.map((_, i) => Math.abs(weights.reduce((s, w, j) => s + w * FIELDS[j][i], 0)));
  }

  /* ---- the three panels, drawn at the width that they have, so that letters keep their size ---- */

  const BOTTOM = 40;
  const ONE = "var(--sdecor-target)";
  const COPY = "var(--sdecor-copy)";
  const colour = (j) => (j === 0 ? ONE : COPY);

  /** Settings of a panel that shows the picture; what is below it has `BOTTOM` px. */
  function picture(width) {
    const margins = { marginTop: 4, marginRight: 8, marginBottom: BOTTOM, marginLeft: 8 };
    const axes = { x: { domain: [0, SIDE], axis: null }, y: { domain: [SIDE, 0], axis: null } };
    return { width, height: width - 16 + 4 + BOTTOM, style: { fontSize: "12px" }, ...margins, ...axes };
  }

  function drawWeights(weights, width) {
    const last = weights.length - 1; // the copies between are equal to it
    return Plot.plot({
      ...picture(width),
      ...(width > 290 && { height: 200 }),
      marginTop: 20, marginRight: 0, marginLeft: 28,
      x: { domain: Array.from({ length: MOST }, (_, j) => j + 1), label: "feature", labelAnchor: "center", labelArrow: "none", tickSize: 0 },
      y: { domain: [0, 1], ticks: 2, label: null },
      marks: [
        Plot.barY(weights, { x: (_, j) => j + 1, y: (w) => w, fill: (_, j) => colour(j), insetLeft: 1, insetRight: 1 }),
        Plot.text(weights, { x: (_, j) => j + 1, y: (w) => w, text: (w) => w.toFixed(2), filter: (_, j) => j === 0 || j === last, dy: -7, fontSize: 11 }),
        Plot.ruleY([0]),
      ],
    });
  }

  function drawFields(copies, width) {
    const round = Array.from({ length: 49 }, (_, k) => (k * Math.PI) / 24);
    const outlines = PLACES.flatMap(([x, y], j) => round.map((t) => ({ j, x: x + 2 * SD * Math.cos(t), y: y + 2 * SD * Math.sin(t) })));
    const strength = PIXELS.map((_, i) => FIELDS.slice(0, copies).reduce((s, u) => s + u[i], 0));
    return Plot.plot({
      ...picture(width),
      marks: [
        Plot.rect(PIXELS, pixels({ fill: "currentColor", fillOpacity: (_, i) => 0.3 * strength[i] })),
        Plot.line(outlines.filter((p) => p.j >= copies), { x: "x", y: "y", z: "j", strokeOpacity: 0.45, strokeDasharray: "2,3", strokeWidth: 1 }),
        Plot.line(outlines.filter((p) => p.j < copies), { x: "x", y: "y", z: "j", stroke: (p) => colour(p.j), strokeWidth: 2.5 }),
        Plot.text(PLACES.slice(0, copies), { x: (p) => p[0], y: (p) => p[1], text: (_, j) => `${j + 1}`, fontSize: 14, fontWeight: "bold" }),
        Plot.frame(),
        Plot.text(["1 target"], { x: 0, y: SIDE, dy: 14, textAnchor: "start", fill: ONE, fontWeight: "bold" }),
        Plot.text(["2–8 copies"], { x: SIDE, y: SIDE, dy: 14, textAnchor: "end", fill: COPY, fontWeight: "bold" }),
      ],
    });
  }

  function drawMap(map, width) {
    const steps = Array.from({ length: 64 }, (_, k) => k / 64); // of the scale, by root of the value: weak pixels are to be seen
    const under = (8 * SIDE) / (width - 16); // 8 px, in pixels of the picture
    return Plot.plot({
      ...picture(width),
      color: { type: "sqrt", scheme: "magma", domain: [0, 1], clamp: true },
      marks: [
        Plot.rect(PIXELS, pixels({ className: "cells", fill: (_, i) => map[i] })),
        Plot.frame(),
        Plot.rect(steps, { x1: (k) => SIDE * k, x2: (k) => SIDE * (k + 1 / 64), y1: SIDE + under, y2: SIDE + 2 * under, fill: (k) => (k + 1 / 128) ** 2, shapeRendering: "crispEdges" }),
        Plot.text([0, 0.1, 0.5, 1], { x: (v) => SIDE * Math.sqrt(v), y: SIDE + 2 * under, dy: 10, text: (v) => `${v}`, fontSize: 11 }),
      ],
    });
  }

  function pixels(options) {
    return { x1: (p) => p.column, x2: (p) => p.column + 1, y1: (p) => p.row, y2: (p) => p.row + 1, shapeRendering: "crispEdges", ...options };
  }

  /* ---- the figure ---- */

  const SLIDERS = [
    { key: "rho", label: "Correlation <i>ρ</i>", min: 0, max: 1, step: 0.01, start: 0.9, show: (v) => v.toFixed(2), say: (v) => v.toFixed(2) },
    { key: "copies", label: "Copies <i>M</i>", min: 1, max: MOST, step: 1, start: 4, show: (v) => `${v}`, say: (v) => (v === 1 ? "1 feature" : `${v} features`) },
    { // on a logarithmic scale, 20 steps for a factor of ten
      key: "lambda", label: "Ridge strength <i>λ</i>", min: 0, max: 60, step: 1, start: 40, value: (v) => 10 ** (v / 20 - 3),
      show: (v) => `${Number(v.toPrecision(3))}`, say: (v) => `${Number(v.toPrecision(3))}`,
    },
  ];
  const PANELS = [
    ["weights", "Weights"],
    ["fields", "Receptive fields"],
    ["map", "Gradient map"],
  ];
  const CAPTION =
    "Move <i>ρ</i> from 0 to 1: the weight, and with it the map, spreads over the copies. " +
    "Then make <i>λ</i> small: the weight goes back to feature 1, unless the copies are equal.";

  function splitting(place, number) {
    const id = (part) => `sdecor-splitting-${number}-${part}`;
    place.innerHTML = `
      <figure>
        <div class="controls" role="group" aria-label="Settings of the figure">
          ${SLIDERS.map((s) => `
            <div class="control">
              <label for="${id(s.key)}">${s.label}</label>
              <output for="${id(s.key)}" aria-live="off"></output>
              <input type="range" id="${id(s.key)}" min="${s.min}" max="${s.max}" step="${s.step}" value="${s.start}" autocomplete="off">
            </div>`).join("")}
          <button type="button">Reset</button>
        </div>
        <div class="panels">
          ${PANELS.map(([name, title]) => `<div class="panel ${name}"><p>${title}</p><svg></svg></div>`).join("")}
        </div>
        <p class="numbers">Participation ratio: weights <b class="of-weights"></b> of <span class="copies"></span>, map <b class="of-map"></b> of ${SIDE * SIDE} pixels.</p>
        <p class="sdecor-unseen" aria-live="polite"></p>
        <figcaption>${CAPTION}</figcaption>
      </figure>`;
    const find = (selector) => place.querySelector(selector);
    const inputs = SLIDERS.map((s) => find(`#${id(s.key)}`));

    function draw() {
      if (!place.clientWidth) return; // on paper, or folded away
      const state = {};
      SLIDERS.forEach((s, i) => {
        const v = s.value ? s.value(inputs[i].valueAsNumber) : inputs[i].valueAsNumber;
        state[s.key] = v;
        find(`output[for="${inputs[i].id}"]`).value = s.show(v);
        inputs[i].setAttribute("aria-valuetext", s.say(v));
      });
      const weights = ridgeWeights(state);
      const map = gradientMap(weights);
      const copies = SLIDERS[1].say(state.copies);
      const shown = weights.map((w) => w.toFixed(2));
      const put = (name, paint, words) => {
        const panel = find(`.panel.${name}`);
        const svg = paint(panel.clientWidth);
        svg.querySelectorAll("[aria-label]").forEach((g) => { // Plot's names of its parts; the picture has one of its own
          g.dataset.part = g.getAttribute("aria-label");
          g.removeAttribute("aria-label");
        });
        svg.setAttribute("role", "img");
        svg.setAttribute("aria-label", words);
        panel.querySelector("svg").replaceWith(svg);
      };
      put("weights", (width) => drawWeights(weights, width), `Weights of ${copies}: ${shown.join(", ")}.`);
      put("fields", (width) => drawFields(state.copies, width), `Receptive fields of ${copies}: blobs at places of their own in a picture of ${SIDE} by ${SIDE} pixels.`);
      put("map", (width) => drawMap(map, width), `Gradient map: at place 1 it reaches ${shown[0]}${state.copies > 1 ? `, at the places of the copies ${shown[1]}` : ""}; elsewhere it is dark.`);
      find(".of-weights").textContent = participationRatio(weights).toFixed(2);
      find(".of-map").textContent = participationRatio(map).toFixed(1);
      find(".copies").textContent = copies;
    }

    let frame = 0, pause = 0, width = place.clientWidth;
    function change() {
      cancelAnimationFrame(frame);
      frame = requestAnimationFrame(draw);
      clearTimeout(pause); // a screen reader hears the numbers when the slider rests
      pause = setTimeout(() => (find("[aria-live=polite]").textContent = find(".numbers").textContent), 600);
    }
    inputs.forEach((input) => input.addEventListener("input", change));
    find("button").addEventListener("click", () => {
      inputs.forEach((input, i) => (input.value = SLIDERS[i].start));
      change();
    });
    new ResizeObserver(([{ contentRect }]) => {
      if (contentRect.width !== width) requestAnimationFrame(draw);
      width = contentRect.width;
    }).observe(place);
    draw();
  }

  /** Show the live figure in place of the static one, which is kept for print; links to the static one lead to the live one. */
  function replaceFallback(place) {
    const fallback = [...document.querySelectorAll(".tag_interactive-fallback")].find(
      (f) => place.compareDocumentPosition(f) & Node.DOCUMENT_POSITION_FOLLOWING,
    );
    if (!fallback) return;
    fallback.classList.add("sdecor-print-only");
    const target = fallback.querySelector("figure[id]");
    if (target) {
      place.querySelector("figure").id = target.id;
      target.removeAttribute("id");
      if (decodeURIComponent(location.hash.slice(1)) === place.querySelector("figure").id) place.scrollIntoView();
    }
  }

  function load(path) {
    return new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = new URL(path, HERE);
      script.async = false; // in order: Plot needs d3
      script.onload = done;
      script.onerror = () => failed(new Error(`cannot load ${script.src}`));
      document.head.append(script);
    });
  }

  async function start() {
    const places = document.querySelectorAll('.sdecor-interactive[data-figure="splitting"]');
    if (!places.length) return;
    await Promise.all(LIBRARIES.map(load));
    places.forEach((place, i) => {
      splitting(place, i + 1);
      replaceFallback(place);
    });
  }

  start().catch((error) => console.warn(`The static figure stays: ${error.message}`));
})();
