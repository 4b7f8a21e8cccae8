"use strict";
// Shapes: A tokens of the answer, L layers, H heads, P patches (0 without a picture), G = sqrt(P) patches a side.
const data = JSON.parse(document.getElementById("data").textContent);
const [A, L, H, P] = data.sizes, G = data.grid;
const ALL = -1; // as a layer or head: the average
const state = { word: 0, layer: ALL, head: ALL, patch: 0, pointed: null };
const pictures = new Map(); // averages that were needed once
let shares, scales, levels, similarity; // (A, L, H), (A, L, H), (A, L, H, P), (P, P)

const $ = (id) => document.getElementById(id);
const say = (key, values = {}) => data.texts[key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const percent = (x) => {
  if (x > 0 && x < 5e-6) return "<0.001";
  return (100 * x).toFixed(x === 0 || x >= 0.0995 ? 1 : x < 0.00095 ? 3 : 2);
};
const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
const rowOf = (patch) => Math.floor(patch / G), columnOf = (patch) => patch % G;

async function unpack() {
  const text = atob($("numbers").textContent.trim());
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const n = A * L * H;
  shares = new Float32Array(buffer, 0, n);
  scales = new Float32Array(buffer, 4 * n, n);
  levels = new Uint8Array(buffer, 8 * n, n * P);
  similarity = new Uint8Array(buffer, 8 * n + n * P, P * P);
}

// The layers and heads that are averaged, as places in (L, H).
function chosenCells() {
  const layers = state.layer === ALL ? [...Array(L).keys()] : [state.layer];
  const heads = state.head === ALL ? [...Array(H).keys()] : [state.head];
  return layers.flatMap((layer) => heads.map((head) => layer * H + head));
}

// Attention to every patch (P), fractions of 1; null stands for the average over the answer's words.
function attention(word) {
  const key = [word, state.layer, state.head].join();
  if (!pictures.has(key)) {
    const sum = new Float32Array(P), cells = chosenCells();
    const words = word === null ? [...Array(A).keys()] : [word];
    for (const one of words) for (const cell of cells) {
      const place = one * L * H + cell, scale = scales[place] / 255 / cells.length / words.length;
      if (scale) for (let p = 0, at = place * P; p < P; p++) sum[p] += scale * levels[at + p];
    }
    pictures.set(key, sum);
  }
  return pictures.get(key);
}

function shownAttention() {
  const own = attention(state.word);
  if (!$("compare").checked) return own;
  const usual = attention(null);
  return own.map((x, p) => Math.max(0, x - usual[p]));
}

function share(word) {
  const cells = chosenCells();
  return cells.reduce((sum, cell) => sum + shares[word * L * H + cell], 0) / cells.length;
}

// Dark violet over red to light yellow: in OKLCH the lightness grows evenly, so that twice as bright is twice as much.
const COLOURS = Array.from({ length: 256 }, (_, i) => {
  const t = i / 255, lightness = 0.13 + 0.84 * t, hue = (290 + 175 * t) * Math.PI / 180;
  const chroma = 0.03 + 0.17 * Math.sin(Math.PI * (0.08 + 0.82 * t));
  const a = chroma * Math.cos(hue), b = chroma * Math.sin(hue);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ].map((x) => Math.round(255 * (x <= 0.0031308 ? 12.92 * Math.max(x, 0) : Math.min(1.055 * x ** (1 / 2.4) - 0.055, 1))));
});
const css = (t) => `rgb(${COLOURS[Math.round(255 * clamp(t, 0, 1))].join(" ")})`;

// Values (G, G) between 0 and 1 over the picture: smooth by cubic interpolation between the patches' centres.
function paint(canvas, values, opacity, isSmooth) {
  const size = isSmooth ? Math.min(G * 16, 384) : G;
  canvas.width = canvas.height = size;
  canvas.classList.toggle("pixels", !isSmooth);
  const image = new ImageData(size, size), taps = [];
  for (let x = 0; x < size; x++) {
    const at = (x + 0.5) / size * G - 0.5, first = Math.floor(at), t = at - first;
    const weights = isSmooth ? [(1 - t) ** 3 / 6, 2 / 3 - t * t + t ** 3 / 2, (1 + 3 * t + 3 * t * t - 3 * t ** 3) / 6, t ** 3 / 6] : [0, 1 - t, t, 0];
    taps.push(weights.map((weight, i) => [clamp(first + i - 1, 0, G - 1), weight]));
  }
  const mixed = new Float32Array(size * size);
  let most = 1e-9;
  for (let y = 0; y < size; y++) {
    const line = new Float32Array(G);
    for (const [row, weight] of taps[y]) for (let g = 0; g < G; g++) line[g] += weight * values[row * G + g];
    for (let x = 0; x < size; x++) {
      let value = 0;
      for (const [column, weight] of taps[x]) value += weight * line[column];
      mixed[y * size + x] = value;
      most = Math.max(most, value);
    }
  }
  const top = isSmooth ? most / Math.max(...values, 1e-9) : 1; // smoothing lowers peaks: the brightest stays brightest
  mixed.forEach((value, i) => {
    const t = clamp(value / (top || 1), 0, 1);
    image.data.set(COLOURS[Math.round(255 * t)], 4 * i);
    image.data[4 * i + 3] = 255 * opacity * (0.45 + 0.55 * t);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

function drawWhere() {
  if (!P) return;
  const values = shownAttention(), most = Math.max(...values);
  paint($("heat"), values.map((x) => (most ? x / most : 0)), $("opacity").value / 100, $("smooth").checked);
  $("most").textContent = `${percent(most)} %`;
  // The picture's own colours would mix with those of the heat; without any, yellow shapes on white would be gone.
  document.querySelector("#where img").style.filter = `grayscale(${0.6 * $("opacity").value}%)`;
  $("where-hint").textContent = say("where_hint", { word: nameOf(state.word) });
  for (const [name, count] of [["layer", L], ["head", H]]) {
    const text = state[name] === ALL ? say("all") : say("of", { number: state[name] + 1, count });
    $(name).value = state[name] + 1;
    $(`${name}-said`).textContent = text;
    $(name).setAttribute("aria-valuetext", text);
  }
  $("opacity-said").textContent = `${$("opacity").value} %`;
  const part = share(state.word), seen = data.promptLength + state.word, even = P / seen;
  $("share").textContent = `${percent(part)} %`;
  document.querySelector(".meter i").style.width = `${100 * part}%`;
  document.querySelector(".meter u").style.left = `${100 * even}%`;
  $("share-hint").textContent = say("share_hint", { patches: P, seen, even: percent(even) });
  sayPointed();
  drawTable();
}

function sayPointed() {
  const at = state.pointed;
  const values = { row: rowOf(at) + 1, column: columnOf(at) + 1, value: at === null ? "" : percent(shownAttention()[at]) };
  $("pointed").textContent = at === null ? "" : say("at_patch", values);
}

function drawTable() {
  const canvas = $("table"), size = clamp(Math.floor(400 / H), 10, 48) * 2, context = canvas.getContext("2d");
  canvas.width = H * size;
  canvas.height = L * size;
  $("table-frame").style.maxWidth = `calc(${H * size / 2}px + 1.6rem)`;
  $("heads").textContent = `${say("head")} 1 – ${H}`;
  $("layers").textContent = `${say("layer")} 1 – ${L}`;
  const own = shares.subarray(state.word * L * H, (state.word + 1) * L * H), most = own.reduce((a, b) => Math.max(a, b), 1e-9);
  own.forEach((value, cell) => {
    context.fillStyle = css(value / most);
    context.fillRect(cell % H * size, Math.floor(cell / H) * size, size - 1, size - 1);
  });
  if (state.layer !== ALL || state.head !== ALL) {
    const [y, rows] = state.layer === ALL ? [0, L] : [state.layer, 1], [x, columns] = state.head === ALL ? [0, H] : [state.head, 1];
    for (const [colour, width] of [["#000", 8], ["#fff", 4]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.strokeRect(x * size + 3, y * size + 3, columns * size - 7, rows * size - 7);
    }
  }
  const isCell = state.layer !== ALL && state.head !== ALL;
  const values = { layer: state.layer + 1, head: state.head + 1, value: percent(own[state.layer * H + state.head] || 0) };
  $("cell").textContent = isCell ? say("table_cell", values) : "";
  $("most-shared").textContent = `${percent(most)} %`;
}

const nameOf = (word) => data.tokens.find((token) => token.word !== null && word >= token.word && word < token.word + token.count).text;
const tokenOf = (word) => data.tokens.findIndex((token) => token.word !== null && word >= token.word && word < token.word + token.count);

function drawWords() {
  const current = tokenOf(state.word), token = data.tokens[current];
  for (const button of $("words").children) choose(button, Number(button.dataset.token) === current);
  $("parts").hidden = token.count === 1;
  if (token.count > 1) {
    $("parts").replaceChildren(say("bytes", { count: token.count }), " ", ...token.ids.map((_, i) => {
      const button = make("button", "part", String(i + 1));
      button.setAttribute("aria-pressed", String(token.word + i === state.word));
      button.title = data.words[token.word + i].name;
      button.addEventListener("click", () => {
        selectWord(token.word + i);
        $("parts").children[i].focus();
      });
      return button;
    }));
  }
  const word = data.words[state.word];
  const isAmong = word.candidates.some((candidate) => candidate.id === word.id);
  $("bars").replaceChildren(...[...word.candidates, ...(isAmong ? [] : [word])].map((candidate) => {
    const isChosen = candidate.id === word.id, bar = make("div", isChosen ? "bar chosen" : "bar", "");
    const track = document.createElement("div"), fill = document.createElement("i");
    fill.style.width = `${100 * candidate.probability}%`;
    track.append(fill);
    const name = make("span", "", candidate.name);
    name.title = `${candidate.name} · ${candidate.id}${isChosen ? " · " + say("chosen") : ""}`;
    bar.setAttribute("role", "listitem");
    bar.append(name, track, make("b", "", `${percent(candidate.probability)} %`));
    return bar;
  }));
  $("rank").textContent = say("rank", { word: word.name, value: percent(word.probability), rank: word.rank });
}

function selectWord(word) {
  state.word = word;
  drawWords();
  drawWhere();
  selectToken(tokenOf(word));
}

function selectToken(index) {
  const token = data.tokens[index], element = $("tokens").children[index];
  for (const other of $("tokens").children) choose(other, other === element);
  const around = $("tokens").getBoundingClientRect(), box = element.getBoundingClientRect();
  if (box.top < around.top || box.bottom > around.bottom) $("tokens").scrollTop += box.top - around.top - around.height / 2;
  const last = token.start + token.count - 1;
  const place = token.count > 1 ? `${token.start + 1}–${last + 1}` : token.start + 1;
  if (token.kind === "image") {
    $("token").textContent = say("token_image", { count: token.count, grid: G, first: token.start + 1, last: last + 1 });
    return;
  }
  const parts = [say("token", { name: token.name, place, ids: token.ids.join(" ") })];
  if (token.kind === "control") parts.push(say("token_control"));
  if (token.isAnswer) parts.push(say("token_answer"));
  $("token").textContent = parts.join(" · ");
}

function drawPatches() {
  if (!P) return;
  const canvas = $("patches"), [low, high] = data.similarityRange;
  const own = Array.from(similarity.subarray(state.patch * P, (state.patch + 1) * P), (x) => low + x / 255 * (high - low));
  const least = Math.min(...own), scaled = own.map((x) => (x - least) / Math.max(1 - least, 1e-6));
  const small = document.createElement("canvas");
  paint(small, scaled, 0.75, false);
  document.querySelector("#tower img").style.filter = "grayscale(60%)";
  canvas.width = canvas.height = 768;
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, 768, 768);
  drawGrid(canvas, state.patch);
  const alike = own.map((value, patch) => ({ value, patch })).filter((one) => one.patch !== state.patch);
  alike.sort((a, b) => b.value - a.value);
  const others = alike.slice(0, 3).map(({ value, patch }) => say("patch_name", { row: rowOf(patch) + 1, column: columnOf(patch) + 1, value: value.toFixed(2) }));
  const values = { number: state.patch + 1, row: rowOf(state.patch) + 1, column: columnOf(state.patch) + 1, place: data.firstPatch + state.patch + 1 };
  $("patch").textContent = say("patch", values);
  const stop = document.documentElement.lang === "en" ? ", " : "、";
  $("alike").textContent = say("patch_like", { others: others.join(stop), low: least.toFixed(2), high: (alike[0]?.value ?? 1).toFixed(2) });
  $("least-alike").textContent = least.toFixed(2);
}

function drawGrid(canvas, patch) {
  const context = canvas.getContext("2d"), step = canvas.width / G;
  context.strokeStyle = "rgb(255 255 255 / .35)";
  context.lineWidth = 1;
  context.beginPath();
  for (let i = 1; i < G; i++) {
    context.moveTo(i * step, 0);
    context.lineTo(i * step, canvas.height);
    context.moveTo(0, i * step);
    context.lineTo(canvas.width, i * step);
  }
  context.stroke();
  for (const [colour, width] of [["#000", 7], ["#fff", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(columnOf(patch) * step, rowOf(patch) * step, step, step);
  }
}

function make(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}

function choose(element, isChosen) {
  element.setAttribute("aria-selected", String(isChosen));
  element.tabIndex = isChosen ? 0 : -1;
}

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// A list of which one is chosen: Tab reaches that one, arrows the others.
function moveByArrows(list, select) {
  list.addEventListener("keydown", (event) => {
    const [x, y] = MOVES[event.key] ?? [0, 0], items = [...list.children];
    const next = items[items.indexOf(document.activeElement) + x + y];
    if (!next || !(x + y)) return;
    event.preventDefault();
    select(next);
    next.focus();
  });
}

// A canvas of cells: `pick(column, row)` for clicks, `move(dx, dy)` for arrow keys, `point` for the mouse over it.
function makeGrid(canvas, columns, rows, pick, move, point) {
  const cell = (event) => {
    const box = canvas.getBoundingClientRect();
    return [clamp(Math.floor((event.clientX - box.left) / box.width * columns), 0, columns - 1),
      clamp(Math.floor((event.clientY - box.top) / box.height * rows), 0, rows - 1)];
  };
  canvas.addEventListener("click", (event) => pick(...cell(event)));
  if (point) canvas.addEventListener("pointermove", (event) => point(...cell(event)));
  canvas.addEventListener("keydown", (event) => {
    if (!MOVES[event.key]) return;
    event.preventDefault();
    move(...MOVES[event.key]);
  });
}

function step(patch, dx, dy) {
  if (patch === null) return 0;
  return clamp(rowOf(patch) + dy, 0, G - 1) * G + clamp(columnOf(patch) + dx, 0, G - 1);
}

function build() {
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = data.texts[element.dataset.text];
  for (const canvas of document.querySelectorAll("[data-scale]")) {
    const context = canvas.getContext("2d");
    for (let x = 0; x < 128; x++) {
      context.fillStyle = css(x / 127);
      context.fillRect(x, 0, 1, 1);
    }
  }
  $("question").textContent = data.question;
  $("cut").hidden = A === data.numAnswer;
  $("cut").textContent = say("answer_cut", { looked: A, all: data.numAnswer });
  $("tokens-hint").textContent = `${say("tokens_hint", { count: data.numTokens })} ${say("arrows")}`;
  data.tokens.forEach((token, index) => {
    const element = make("span", `token ${token.kind} ${token.isAnswer ? "answer" : ""}`, token.name);
    element.setAttribute("role", "option");
    element.addEventListener("click", () => (token.word === null ? selectToken(index) : selectWord(token.word)));
    $("tokens").append(element);
    if (token.word === null) return;
    const button = make("button", `word ${token.kind} ${token.beginsWord ? "" : "glued"}`, token.text);
    button.setAttribute("role", "option");
    button.dataset.token = index;
    button.addEventListener("click", () => selectWord(token.word));
    $("words").append(button);
  });
  moveByArrows($("words"), (item) => item.click());
  moveByArrows($("tokens"), (item) => selectToken([...$("tokens").children].indexOf(item)));
  if (!P) {
    for (const id of ["shares", "grid", "tower"]) $(id).hidden = true;
    $("where").replaceChildren(make("p", "", say("no_picture")));
    return;
  }
  buildPicture();
}

function buildPicture() {
  for (const image of document.querySelectorAll("[data-picture] img")) image.src = data.picture;
  $("layer").max = L;
  $("head").max = H;
  for (const name of ["layer", "head"]) {
    $(name).addEventListener("input", () => {
      state[name] = Number($(name).value) - 1;
      drawWhere();
    });
  }
  for (const id of ["opacity", "compare", "smooth"]) $(id).addEventListener("input", drawWhere);
  $("compare").disabled = A === 1;
  $("reset").addEventListener("click", () => {
    state.layer = state.head = ALL;
    drawWhere();
  });
  const point = (column, row) => {
    state.pointed = row * G + column;
    sayPointed();
  };
  makeGrid($("heat"), G, G, point, (dx, dy) => {
    state.pointed = step(state.pointed, dx, dy);
    sayPointed();
  }, point);
  const selectCell = (head, layer) => {
    [state.head, state.layer] = [clamp(head, 0, H - 1), clamp(layer, 0, L - 1)];
    drawWhere();
  };
  makeGrid($("table"), H, L, selectCell, (dx, dy) => selectCell(Math.max(state.head, 0) + dx, Math.max(state.layer, 0) + dy));
  const selectPatch = (patch) => {
    state.patch = patch;
    drawPatches();
  };
  makeGrid($("patches"), G, G, (column, row) => selectPatch(row * G + column), (dx, dy) => selectPatch(step(state.patch, dx, dy)));
  $("heat").setAttribute("aria-label", `${say("where")}. ${say("arrows")}`);
  $("table").setAttribute("aria-label", `${say("table")}. ${say("arrows")}`);
  $("patches").setAttribute("aria-label", `${say("patches")}. ${say("arrows")}`);
}

async function main() {
  $("status").textContent = say("loading");
  if (!("DecompressionStream" in window)) {
    $("status").textContent = say("too_old");
    return;
  }
  await unpack();
  build();
  document.querySelector("main").hidden = false;
  $("status").hidden = true;
  selectWord(0);
  if (P) state.patch = attention(0).reduce((best, x, p, all) => (x > all[best] ? p : best), 0);
  drawPatches();
  // A page that frames this one learns how high it is, and may choose its colours.
  document.documentElement.classList.toggle("framed", parent !== window);
  const tell = () => parent !== window && parent.postMessage({ lookHeight: document.body.scrollHeight + 8 }, "*");
  new ResizeObserver(tell).observe(document.body);
  document.documentElement.dataset.ready = "yes";
}

window.addEventListener("message", (event) => {
  const { theme, background } = event.data ?? {};
  if (["light", "dark"].includes(theme)) document.documentElement.dataset.theme = theme;
  if (/^rgb\([\d, ]+\)$/.test(background)) document.body.style.background = background;
});
main();
