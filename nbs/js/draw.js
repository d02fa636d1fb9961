/* "Draw a digit": a canvas, and a network read from a .nncomp file that answers while you draw. Needs nncomp.js. */
(() => {
  "use strict";
  const MEAN = 0.1307, STD = 0.3081, SIDE = 28;              // of MNIST; the network saw images normalised by them
  const EXAMPLES = [                                         // strokes of ten digits, in a box of 100 by 100
    [[50, 8, 30, 18, 22, 42, 24, 70, 40, 92, 60, 90, 74, 68, 74, 38, 64, 14, 48, 8]],
    [[52, 8, 50, 40, 48, 92]],
    [[26, 28, 36, 12, 56, 8, 72, 22, 68, 44, 48, 66, 26, 88, 44, 84, 60, 90, 80, 84]],
    [[28, 16, 50, 8, 70, 18, 68, 36, 46, 47, 68, 56, 74, 74, 56, 92, 26, 86]],
    [[32, 8, 26, 34, 26, 50, 50, 52, 72, 46], [68, 10, 66, 50, 62, 94]],
    [[72, 10, 36, 10, 32, 44, 54, 40, 72, 54, 72, 76, 52, 92, 26, 86]],
    [[64, 8, 44, 26, 30, 56, 32, 82, 50, 92, 68, 80, 66, 62, 48, 56, 33, 68]],
    [[24, 14, 50, 12, 76, 12, 60, 44, 50, 70, 46, 94]],
    [[62, 14, 42, 10, 32, 26, 44, 42, 62, 56, 68, 76, 52, 92, 34, 82, 36, 64, 52, 46, 66, 30, 62, 14]],
    [[68, 24, 50, 10, 34, 22, 34, 42, 50, 48, 66, 38, 68, 24, 66, 52, 60, 94]],
  ].map(strokes => strokes.map(s => Array.from({length: s.length / 2}, (_, i) => [s[2 * i], s[2 * i + 1]])));

  function element(tag, attributes = {}, ...children) {
    const e = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) e.setAttribute(key, value);
    e.append(...children);
    return e;
  }

  function trace(context, strokes, width, place) {           // lines through the points, each moved by `place`
    Object.assign(context, {lineCap: "round", lineJoin: "round", lineWidth: width});
    for (const stroke of strokes) {
      const points = stroke.map(place);
      context.beginPath();
      context.moveTo(...points[0]);
      if (points.length === 1) context.lineTo(points[0][0] + 0.01, points[0][1]);
      for (let i = 1; i < points.length - 1; i++) {          // a curve through the middles: a hand draws no corners
        const [[x, y], [u, v]] = [points[i], points[i + 1]];
        context.quadraticCurveTo(x, y, (x + u) / 2, (y + v) / 2);
      }
      if (points.length > 1) context.lineTo(...points.at(-1));
      context.stroke();
    }
  }

  function centred(strokes) {                                // as MNIST was made: 20 pixels high or wide, the centre of mass in the middle
    const xs = strokes.flat().map(p => p[0]), ys = strokes.flat().map(p => p[1]);
    const [left, right, top, bottom] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const scale = 17.5 / Math.max(right - left, bottom - top, 20), canvas = element("canvas", {width: SIDE, height: SIDE});
    const context = canvas.getContext("2d", {willReadFrequently: true});
    const paint = (dx, dy) => {
      context.fillStyle = "#000"; context.strokeStyle = "#fff";
      context.fillRect(0, 0, SIDE, SIDE);
      trace(context, strokes, 2.5, ([x, y]) => [14 + (x - (left + right) / 2) * scale + dx, 14 + (y - (top + bottom) / 2) * scale + dy]);
      const {data} = context.getImageData(0, 0, SIDE, SIDE);
      return Float32Array.from({length: SIDE * SIDE}, (_, i) => data[4 * i] / 255);
    };
    const first = paint(0, 0), sum = first.reduce((a, b) => a + b, 0);
    const mean = of => first.reduce((a, b, i) => a + b * of(i), 0) / sum + 0.5;
    return paint(14 - mean(i => i % SIDE), 14 - mean(i => Math.floor(i / SIDE)));
  }

  function softmax(logits) {
    const most = Math.max(...logits), e = Array.from(logits, v => Math.exp(v - most)), sum = e.reduce((a, b) => a + b, 0);
    return e.map(v => v / sum);
  }

  async function start(root) {
    const {file, layers, bytes} = JSON.parse(root.querySelector("script").textContent);
    const pad = element("canvas", {width: 280, height: 280, class: "nn-pad", role: "img", "aria-label": "Draw a digit here with a mouse, a pen or a finger; the buttons below draw one for you"});
    const eye = element("canvas", {width: SIDE, height: SIDE, class: "nn-eye", role: "img", "aria-label": "The 28 by 28 pixels that the network sees"});
    const clear = element("button", {type: "button", class: "btn btn-sm btn-outline-secondary"}, "Clear");
    const example = element("button", {type: "button", class: "btn btn-sm btn-outline-secondary"}, "Draw one for me");
    const bars = Array.from({length: 10}, (_, i) => element("div", {class: "nn-bar"}, element("b", {}, String(i)), element("i", {}), element("span", {})));
    const says = element("p", {class: "nn-says", "aria-live": "polite"}, "Draw a digit."), facts = element("p", {class: "nn-facts"});
    root.append(element("div", {class: "nn-draw"}, element("div", {}, pad, element("div", {class: "nn-buttons"}, clear, example)),
      element("div", {class: "nn-answer"}, says, ...bars, element("div", {class: "nn-sees"}, eye, facts))));

    const ink = pad.getContext("2d"), view = eye.getContext("2d");
    let strokes = [], active = false, shown = 0, tensors = null;
    function answer() {
      ink.clearRect(0, 0, pad.width, pad.height);
      ink.strokeStyle = getComputedStyle(root).getPropertyValue("color");
      trace(ink, strokes, 18, p => p);
      if (!strokes.length) {
        view.clearRect(0, 0, SIDE, SIDE);
        for (const bar of bars) { bar.children[1].style.width = "0"; bar.children[2].textContent = ""; bar.classList.remove("nn-best"); }
        says.textContent = "Draw a digit.";
        return;
      }
      const pixels = centred(strokes), image = view.createImageData(SIDE, SIDE);
      pixels.forEach((v, i) => image.data.set([255 * v, 255 * v, 255 * v, 255], 4 * i));
      view.putImageData(image, 0, 0);
      if (!tensors) return;
      const chances = softmax(nncomp.dense(tensors, layers, pixels.map(v => (v - MEAN) / STD))), best = chances.indexOf(Math.max(...chances));
      chances.forEach((c, i) => {
        bars[i].children[1].style.width = `${(100 * c).toFixed(1)}%`;
        bars[i].children[2].textContent = `${(100 * c).toFixed(1)} %`;
        bars[i].classList.toggle("nn-best", i === best);
      });
      says.textContent = `It reads ${best}, with ${(100 * chances[best]).toFixed(0)} % of its belief.`;
    }
    const point = e => { const box = pad.getBoundingClientRect(); return [(e.clientX - box.left) * pad.width / box.width, (e.clientY - box.top) * pad.height / box.height]; };
    pad.addEventListener("pointerdown", e => { active = true; pad.setPointerCapture(e.pointerId); strokes.push([point(e)]); answer(); e.preventDefault(); });
    pad.addEventListener("pointermove", e => { if (active) { strokes.at(-1).push(point(e)); answer(); } });
    for (const end of ["pointerup", "pointercancel"]) pad.addEventListener(end, () => { active = false; });
    clear.addEventListener("click", () => { strokes = []; answer(); });
    example.addEventListener("click", () => { strokes = EXAMPLES[shown++ % 10].map(s => s.map(([x, y]) => [2.8 * x, 2.8 * y])); answer(); });

    facts.textContent = "Fetching the network …";
    try {
      const response = await fetch(file);
      if (!response.ok) throw new Error(`${file}: ${response.status}`);
      const buffer = await response.arrayBuffer(), begin = performance.now();
      tensors = nncomp.read(buffer);
      const weights = Object.values(tensors).reduce((n, t) => n + t.shape.reduce((a, b) => a * b, 1), 0);
      facts.textContent = `What the network sees. It came in ${buffer.byteLength.toLocaleString("en")} bytes, which hold ${weights.toLocaleString("en")} parameters; ` +
        `this browser decoded them in ${Math.round(performance.now() - begin)} ms.`;
      root.dataset.ready = buffer.byteLength === bytes ? "yes" : "other";
      answer();
    } catch (error) { facts.textContent = `The network could not be read (${error.message}).`; }
  }

  for (const root of document.querySelectorAll('[data-widget="draw"]:not([data-begun])')) { root.dataset.begun = "yes"; start(root); }
})();
