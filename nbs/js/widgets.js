/* The pieces of the book that react: temperature, centroids, huffman, threshold. Each builds itself from the JSON in its element;
   without this script the element says where the still figure is. Colours come from the page's theme. */
(() => {
  "use strict";
  const SVG = "http://www.w3.org/2000/svg";
  let WIDTH = 640;                                           // of a drawing; on a phone as wide as the phone, so that letters stay legible
  const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
  const percent = (p, digits = 1) => `${(100 * p).toFixed(digits)} %`;

  function element(tag, attributes = {}, ...children) {
    const e = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
    e.append(...children);
    return e;
  }
  function shape(parent, tag, attributes, text) {
    const e = document.createElementNS(SVG, tag);
    for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
    if (text !== undefined) e.textContent = text;
    parent.append(e);
    return e;
  }
  function picture(root, height, label) { return shape(root, "svg", {viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label, class: "nn-picture"}); }
  function control(root, label, attributes, show) {          // a labelled slider and what it says
    const input = element("input", {type: "range", ...attributes}), output = element("output");
    root.append(element("label", {class: "nn-control"}, element("span", {}, label), input, output));
    const update = () => { output.textContent = show(Number(input.value)); input.setAttribute("aria-valuetext", output.textContent); };
    update();
    input.addEventListener("input", update);
    return input;
  }
  function choice(root, label, options) {
    const select = element("select", {class: "form-select form-select-sm"}, ...options.map(o => element("option", {}, o)));
    root.append(element("label", {class: "nn-control"}, element("span", {}, label), select));
    return select;
  }
  function axis(svg, low, high, y, count, text = v => v.toFixed(3).replace("-", "−")) {
    for (let i = 0; i <= count; i++) {
      const x = 20 + (WIDTH - 40) * i / count;
      shape(svg, "text", {x, y, "text-anchor": "middle", class: "nn-tick"}, text(low + (high - low) * i / count));
    }
  }
  function histogram(svg, counts, height, kind) {            // bars over the whole width; gives them
    const most = Math.max(...counts), width = (WIDTH - 40) / counts.length;
    return counts.map((c, i) => shape(svg, "rect", {x: 20 + i * width, width: Math.max(width - 0.5, 0.5), y: height * (1 - c / most), height: height * c / most, class: kind(i)}));
  }

  // ---- dark knowledge: a teacher's answer at any temperature

  function temperature(root, {logits, label, alt}) {
    const input = control(root, "temperature", {min: -0.7, max: 3, step: 0.01, value: 0}, v => `T = ${Math.exp(v).toFixed(2)}`);
    const svg = picture(root, 210, alt), says = element("p", {class: "nn-says", "aria-live": "polite"});
    root.append(says);
    const bars = logits.map((_, i) => {
      const step = WIDTH / logits.length, middle = (i + 0.5) * step;
      shape(svg, "text", {x: middle, y: 205, "text-anchor": "middle", class: "nn-tick"}, i);
      return [shape(svg, "rect", {x: middle - 0.4 * step, width: 0.8 * step, class: i === label ? "nn-right" : "nn-wrong"}),
        shape(svg, "text", {x: middle, "text-anchor": "middle", class: "nn-tick"})];
    });
    function draw() {
      const T = Math.exp(input.value), most = Math.max(...logits), e = logits.map(z => Math.exp((z - most) / T)), sum = e.reduce((a, b) => a + b, 0);
      const p = e.map(v => v / sum), wrong = p.map((v, i) => i === label ? -1 : v), second = wrong.indexOf(Math.max(...wrong));
      const nats = -p.reduce((total, v) => total + (v > 0 ? v * Math.log(v) : 0), 0);
      p.forEach((v, i) => {
        bars[i][0].setAttribute("y", 185 - 165 * v); bars[i][0].setAttribute("height", 165 * v);
        bars[i][1].setAttribute("y", 180 - 165 * v); bars[i][1].textContent = v < 0.005 ? "" : v.toFixed(2).replace(/^0/, "");
      });
      says.textContent = `Right class ${label}: ${percent(p[label])}; best of the wrong, ${second}: ${percent(p[second])}; entropy ${nats.toFixed(2)} of at most ${Math.log(logits.length).toFixed(2)} nats.`;
    }
    input.addEventListener("input", draw);
    draw();
  }

  // ---- k-means in one dimension: bits, a start, and Lloyd's rounds

  function centroids(root, {values, alt}) {                  // values: ascending
    const sums = [0], squares = [0];
    for (const v of values) { sums.push(sums.at(-1) + v); squares.push(squares.at(-1) + v * v); }
    const n = values.length, low = values[0], high = values[n - 1], x = v => 20 + (WIDTH - 40) * (v - low) / (high - low);
    const find = v => { let a = 0, b = n; while (a < b) { const m = (a + b) >> 1; values[m] < v ? a = m + 1 : b = m; } return a; };
    const cost = (a, b) => b > a ? squares[b] - squares[a] - (sums[b] - sums[a]) ** 2 / (b - a) : 0;

    function optimum(k) {                                    // exact, by dynamic programming, divide and conquer on the boundaries
      let before = Array.from({length: n + 1}, (_, i) => cost(0, i));
      const cuts = [];
      for (let j = 1; j < k; j++) {
        const now = new Array(n + 1).fill(0), cut = new Int32Array(n + 1);
        const fill = (a, b, from, to) => {
          if (a > b) return;
          const m = (a + b) >> 1;
          let best = Infinity;
          for (let i = from; i <= Math.min(m, to); i++) { const c = before[i] + cost(i, m); if (c < best) { best = c; cut[m] = i; } }
          now[m] = best;
          fill(a, m - 1, from, cut[m]); fill(m + 1, b, cut[m], to);
        };
        fill(0, n, 0, n);
        before = now; cuts.push(cut);
      }
      return before[n];
    }
    const starts = {
      linear: k => Array.from({length: k}, (_, j) => low + (high - low) * j / (k - 1)),
      density: k => Array.from({length: k}, (_, j) => values[Math.floor((j + 0.5) / k * n)]),
      random: k => Array.from({length: k}, () => values[Math.floor(Math.random() * n)]).sort((a, b) => a - b),
    };
    function bounds(c) { return [0, ...c.slice(1).map((v, j) => find((v + c[j]) / 2)), n]; }
    const inertia = c => { const b = bounds(c); return c.reduce((t, v, j) => t + squares[b[j + 1]] - squares[b[j]] - 2 * v * (sums[b[j + 1]] - sums[b[j]]) + v * v * (b[j + 1] - b[j]), 0); };
    const round = c => { const b = bounds(c); return c.map((v, j) => b[j + 1] > b[j] ? (sums[b[j + 1]] - sums[b[j]]) / (b[j + 1] - b[j]) : v); };

    const input = control(root, "bits", {min: 1, max: 5, step: 1, value: 2}, v => `${v}: ${2 ** v} values`);
    const start = choice(root, "start", Object.keys(starts)), again = element("button", {type: "button", class: "btn btn-sm btn-outline-secondary"}, "Start again");
    root.append(again);
    const svg = picture(root, 200, alt), says = element("p", {class: "nn-says", "aria-live": "polite"}), counts = new Array(120).fill(0);
    root.append(says);
    for (const v of values) counts[Math.min(119, Math.floor(120 * (v - low) / (high - low)))]++;
    histogram(svg, counts, 150, () => "nn-wrong");
    axis(svg, low, high, 196, 4);
    const ticks = shape(svg, "g", {});
    const best = {};
    let timer = null;
    function show(c, rounds, done) {
      ticks.replaceChildren();
      for (const v of c) shape(ticks, "path", {d: `M${x(v)} 0V158l-5 14h10l-5 -14`, class: "nn-mark"});
      const least = best[c.length] ??= optimum(c.length), now = inertia(c);
      says.textContent = `After ${rounds} rounds: mean squared error ${(now / n).toExponential(2)}, ${(now / least).toFixed(3)} times the least possible${done ? "; nothing moves any more." : "."}`;
    }
    function run() {
      clearTimeout(timer);
      let c = starts[start.value](2 ** input.value), rounds = 0;
      const step = () => {
        const next = round(c), done = next.every((v, j) => Math.abs(v - c[j]) < 1e-9);
        if (!done && rounds < 500) { c = next; rounds++; }
        return done || rounds >= 500;
      };
      if (still()) { while (!step()); show(c, rounds, true); return; }
      const tick = () => { const done = step(); show(c, rounds, done); if (!done) timer = setTimeout(tick, rounds < 12 ? 180 : 15); };
      show(c, 0, false);
      timer = setTimeout(tick, 500);
    }
    for (const e of [input, start]) e.addEventListener("input", run);
    again.addEventListener("click", run);
    run();
  }

  // ---- Huffman's tree of any text

  function huffman(root, {text, alt}) {
    const input = element("input", {type: "text", value: text, maxlength: 60, class: "form-control form-control-sm", spellcheck: "false"});
    root.append(element("label", {class: "nn-control"}, element("span", {}, "your text"), input));
    const holder = element("div", {class: "nn-scroll", tabindex: "0", role: "group", "aria-label": "the tree"}), says = element("p", {class: "nn-says", "aria-live": "polite"});
    root.append(holder, says);
    function tree(letters) {
      const counts = new Map();
      for (const c of letters) counts.set(c, (counts.get(c) ?? 0) + 1);
      const heap = [...counts].map(([letter, count]) => ({letter, count}));
      while (heap.length > 1) {                              // the two smallest, the older first
        heap.sort((a, b) => a.count - b.count);
        const [a, b] = heap.splice(0, 2);
        heap.push({count: a.count + b.count, children: [a, b]});
      }
      return heap[0];
    }
    function place(node, depth, leaves, word) {              // leaves from left to right, parents over the middle of their children
      node.word = word; node.depth = depth;
      if (!node.children) { node.at = leaves.length; leaves.push(node); return; }
      node.children.forEach((child, i) => place(child, depth + 1, leaves, word + i));
      node.at = (node.children[0].at + node.children[1].at) / 2;
    }
    function draw() {
      const letters = [...input.value];
      holder.replaceChildren();
      if (!letters.length) { says.textContent = "Type something."; return; }
      const top = tree(letters), leaves = [];
      place(top, 0, leaves, "");
      const deep = Math.max(...leaves.map(l => l.depth)), step = Math.max(34, Math.min(80, WIDTH / leaves.length)), width = Math.max(WIDTH, leaves.length * step);
      const x = node => width / 2 + (node.at - (leaves.length - 1) / 2) * step, y = node => 20 + 46 * node.depth;
      const svg = shape(holder, "svg", {viewBox: `0 0 ${width} ${70 + 46 * deep}`, width, role: "img", "aria-label": alt, class: "nn-picture"});
      const paint = node => {
        (node.children ?? []).forEach((child, bit) => {
          shape(svg, "line", {x1: x(node), y1: y(node), x2: x(child), y2: y(child), class: "nn-edge"});
          shape(svg, "text", {x: (x(node) + x(child)) / 2 + (bit ? 9 : -9), y: (y(node) + y(child)) / 2, "text-anchor": "middle", class: "nn-bit"}, bit);
          paint(child);
        });
        shape(svg, "circle", {cx: x(node), cy: y(node), r: 13, class: node.children ? "nn-node" : "nn-leaf"});
        shape(svg, "text", {x: x(node), y: y(node) + 4, "text-anchor": "middle", class: "nn-inside"}, node.children ? node.count : node.letter === " " ? "␣" : node.letter);
        if (!node.children) shape(svg, "text", {x: x(node), y: y(node) + 28, "text-anchor": "middle", class: "nn-tick"}, `×${node.count}`);
      };
      paint(top);
      const bits = leaves.reduce((sum, l) => sum + l.count * Math.max(l.depth, 1), 0), n = letters.length;
      const entropy = leaves.reduce((sum, l) => sum + l.count * Math.log2(n / l.count), 0);
      says.textContent = `${n} letters, ${leaves.length} different: ${bits} bits by this tree, ${(bits / n).toFixed(2)} a letter; the entropy is ${(entropy / n).toFixed(2)}, a fixed length needs ${Math.max(1, Math.ceil(Math.log2(leaves.length)))}. ` +
        leaves.slice().sort((a, b) => b.count - a.count).slice(0, 4).map(l => `${l.letter === " " ? "␣" : l.letter} = ${l.word || "0"}`).join(", ") + (leaves.length > 4 ? ", …" : "");
    }
    input.addEventListener("input", draw);
    draw();
  }

  // ---- a threshold over real weights: sparsity, and the error that was measured there

  function threshold(root, {counts, low, high, rows, alt}) { // rows: [quality, threshold, sparsity, error in percent]
    const input = control(root, "threshold", {min: 0, max: rows.length - 1, step: 1, value: Math.floor(rows.length / 3)}, i => `${rows[i][0].toFixed(2)} σ = ±${rows[i][1].toFixed(4)}`);
    const svg = picture(root, 230, alt), says = element("p", {class: "nn-says", "aria-live": "polite"});
    root.append(says);
    const bars = histogram(svg, counts, 120, () => "nn-right"), width = (high - low) / counts.length;
    axis(svg, low, high, 138, 4);
    const errors = rows.map(r => Math.log(Math.max(r[3], 0.1))), least = Math.min(...errors), most = Math.max(...errors);
    const x = r => 20 + (WIDTH - 40) * r[2], y = r => 222 - 50 * (Math.log(Math.max(r[3], 0.1)) - least) / (most - least);
    shape(svg, "polyline", {points: rows.map(r => `${x(r)},${y(r)}`).join(" "), class: "nn-line"});
    shape(svg, "text", {x: 24, y: 160, class: "nn-tick"}, "validation error (log scale) against sparsity");
    const dot = shape(svg, "circle", {r: 5, class: "nn-mark"});
    function draw() {
      const r = rows[input.value];
      bars.forEach((bar, i) => bar.setAttribute("class", Math.abs(low + (i + 0.5) * width) < r[1] ? "nn-gone" : "nn-right"));
      dot.setAttribute("cx", x(r)); dot.setAttribute("cy", y(r));
      says.textContent = `${percent(r[2])} of the weights go; validation error ${r[3].toFixed(1)} %, without retraining.`;
    }
    input.addEventListener("input", draw);
    draw();
  }

  const KINDS = {temperature, centroids, huffman, threshold};
  for (const root of document.querySelectorAll("[data-widget]:not([data-ready])")) {
    const build = KINDS[root.dataset.widget];
    if (!build) continue;
    root.dataset.ready = "yes";
    const data = JSON.parse(root.querySelector("script").textContent);
    root.querySelector(".nncomp-elsewhere")?.remove();
    WIDTH = Math.max(280, Math.min(640, root.clientWidth - 34));
    build(root, {...data, alt: root.getAttribute("aria-label")});
  }
})();
