"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["var(--c0)", "var(--c1)", "var(--c2)", "var(--c3)"];
const LEFT = 52, RIGHT = 12, TOP = 8, BOTTOM = 24;
const players = [];

/** Makes an element with attributes and children (strings become text, never markup). */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes, parent, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
  return node;
}

/** A number for people; rounding dust of exact zeros is shown as 0. */
function short(x, digits = 3) {
  if (x === null || x === undefined) return "–";
  return Math.abs(x) < 1e-7 ? "0" : String(Number(Number(x).toPrecision(digits)));
}

/** Round tick positions inside [low, high], about `count` of them. */
function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(k * step);
  return found;
}

function bounds(series, given) {
  const y = series.flatMap((one) => one.y).filter((v) => v !== null);
  let low = Math.min(...y), high = Math.max(...y);
  if (given) [low, high] = [Math.min(low, given[0]), Math.max(high, given[1])];
  if (!(low < high)) [low, high] = [(y[0] ?? 0) - 1, (y[0] ?? 0) + 1];
  const room = given ? 0 : (high - low) * 0.06;
  return [low - room, high + room];
}

/** A line through the known points; gaps stay open, a lone point becomes a dot. */
function path(xs, ys, px, py) {
  let out = "", down = false;
  ys.forEach((y, i) => {
    if (y === null) { down = false; return; }
    out += `${down ? "L" : "M"}${px(xs[i]).toFixed(1)} ${py(y).toFixed(1)}`;
    if (!down && (ys[i + 1] ?? null) === null) out += "h0.01";
    down = true;
  });
  return out;
}

/**
 * A figure with axes. series: [{name, x, y, colour, dash}]; x runs over `span`; marks: [{x, kind, text}].
 * Returns the figure; `figure.moveTo(x)` sets its play head and `seek(x)` hears clicks.
 */
function plot({ title, unit, xUnit, series, span, limits, seek, marks = [], height = 150 }) {
  const key = make("span", { class: "key" });
  for (const one of series) key.append(make("span", { class: one.dash ?? "", style: `--colour: ${one.colour}` }, one.name));
  const figure = make("figure", {}, make("figcaption", {}, make("b", {}, title), key));
  const svg = draw("svg", { role: "img", height, "aria-label": `${title}: ${series.map((s) => s.name).join(", ")}` }, figure);
  const [low, high] = bounds(series, limits);
  let px = (x) => x, head = null, at = 0;

  function paint() {
    const width = figure.clientWidth || 600;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    px = (x) => LEFT + ((x - span[0]) / (span[1] - span[0] || 1)) * (width - LEFT - RIGHT);
    const py = (y) => TOP + ((high - y) / (high - low)) * (height - TOP - BOTTOM);
    for (const y of unit === "°" ? [-90, -45, 0, 45, 90] : ticks(low, high, 4)) {
      draw("line", { class: y === 0 ? "zero" : "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }, svg);
      draw("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, svg, short(y, 4) + (unit === "°" ? "°" : ""));
    }
    const times = ticks(span[0], span[1], Math.max(3, Math.round(width / 110)));
    times.forEach((x, i) => {
      const label = i === times.length - 1 ? `${short(x, 6)} ${xUnit}` : short(x, 6);
      draw("text", { x: px(x), y: height - 6, "text-anchor": "middle" }, svg, label);
    });
    for (const { x, kind, text } of marks) {
      const mark = draw("line", { class: `mark ${kind}`, x1: px(x), x2: px(x), y1: TOP, y2: height - BOTTOM }, svg);
      draw("title", {}, mark, text);
    }
    for (const one of series) {
      draw("path", { class: `curve ${one.dash ?? ""}`, style: `--colour: ${one.colour}`, d: path(one.x, one.y, px, py) }, svg);
    }
    head = seek ? draw("line", { class: "head", y1: TOP, y2: height - BOTTOM }, svg) : null;
    figure.moveTo(at);
  }

  figure.moveTo = (x) => {
    at = x;
    if (head) for (const end of ["x1", "x2"]) head.setAttribute(end, px(Math.min(x, span[1])));
  };
  if (seek) svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
    seek(span[0] + Math.min(1, Math.max(0, share)) * (span[1] - span[0]));
  });
  new ResizeObserver(paint).observe(figure);
  return figure;
}

const regular = (curve, start, step) => curve.map((_, i) => start + i * step);

/** Direction, level and time difference of a clip, left upwards. */
function clipPlots(clip, seek) {
  const heard = Object.entries(clip.curves).filter(([, curve]) => curve);
  const over = (key) => heard.map(([name, curve], i) => ({
    name, y: curve[key], x: regular(curve[key], curve.start, curve.step), colour: COLOURS[i], dash: i ? "dashed" : "",
  }));
  const direction = over("azimuth");
  for (const [key, name, colour] of [["seen", "localizer", "var(--c2)"], ["truth", "true source", "var(--truth)"]]) {
    const track = clip[key];
    if (track) direction.push({ name, y: track.azimuth, x: regular(track.azimuth, 0.5 / track.fps, 1 / track.fps), colour, dash: key === "truth" ? "truth" : "dashed" });
  }
  const common = { xUnit: "s", span: [0, clip.seconds], seek };
  const figures = [];
  if (direction.length) figures.push(plot({ ...common, title: "Direction heard, degrees (up is left)", unit: "°", series: direction, limits: [-90, 90], height: 200 }));
  if (heard.length) {
    figures.push(plot({ ...common, title: "Level difference L − R, dB (up is left)", series: over("ild"), limits: [-6, 6] }));
    figures.push(plot({ ...common, title: "Time difference, µs (up: left ear leads)", series: over("itd"), limits: [-800, 800] }));
  }
  return figures;
}

/** Heat map and horizontal position of the localizer, drawn over the picture at time t. */
function overlay(stage, clip) {
  const canvas = make("canvas", { "aria-hidden": "true" });
  stage.append(canvas);
  const strip = clip.heat ? make("img", { src: clip.heat.png, alt: "" }) : null;
  const small = make("canvas");
  return (t, shown) => {
    const [width, height] = [(canvas.width = canvas.clientWidth), (canvas.height = canvas.clientHeight)];
    if (!shown || !width) return;
    const pen = canvas.getContext("2d");
    if (strip?.complete) {
      const [rows, columns] = clip.heat.size, k = Math.min(clip.heat.frames - 1, Math.floor(t * clip.heat.fps));
      [small.width, small.height] = [columns, rows];
      const brush = small.getContext("2d", { willReadFrequently: true });
      brush.drawImage(strip, k * columns, 0, columns, rows, 0, 0, columns, rows);
      const tile = brush.getImageData(0, 0, columns, rows);
      for (let i = 0; i < tile.data.length; i += 4) {
        const heat = tile.data[i];
        tile.data.set([255, 200 - heat * 0.55, 40, heat * 0.6], i);
      }
      brush.putImageData(tile, 0, 0);
      pen.drawImage(small, 0, 0, width, height);
    }
    const k = clip.seen ? Math.min(clip.seen.place.length - 1, Math.floor(t * clip.seen.fps)) : -1;
    if (k < 0 || clip.seen.place[k] === null) return;
    const x = ((clip.seen.place[k] + 1) / 2) * width, half = (clip.seen.half[k] / 2) * width;
    pen.fillStyle = "rgba(94, 211, 160, 0.18)";
    pen.fillRect(x - half, 0, 2 * half, height);
    pen.strokeStyle = "#000"; pen.lineWidth = 4;
    pen.strokeRect(x, 0, 0, height);
    pen.strokeStyle = "#5ed3a0"; pen.lineWidth = 2;
    pen.strokeRect(x, 0, 0, height);
  };
}

/** One player whose picture leads; other sounds follow it in time, one of all is heard. */
function showClip(clip) {
  const card = document.getElementById("clip").content.cloneNode(true).querySelector("article");
  const find = (selector) => card.querySelector(selector);
  find("h2").textContent = clip.id;
  find(".caption").textContent = clip.caption;
  const stage = find(".stage");
  const source = clip.video ?? clip.tracks[0].audio;
  const lead = make(clip.video ? "video" : "audio", { src: source, controls: "", preload: "metadata", playsinline: "", "aria-label": `${clip.id}, generated sound` });
  stage.classList.toggle("sound", !clip.video);
  stage.append(lead);
  const others = clip.tracks.map((track, i) => (i ? make("audio", { src: track.audio, preload: "auto" }) : null));
  let chosen = 0;

  const seek = (t) => { lead.currentTime = t; };
  const figures = clipPlots(clip, seek);
  find(".plots").append(...figures);
  const picture = find(".picture"), head = find(".picture .head");
  picture.addEventListener("click", (event) => {
    const box = picture.getBoundingClientRect();
    seek(((event.clientX - box.left) / box.width) * clip.seconds);
  });

  const hasOverlay = clip.video && (clip.heat || clip.seen), toggle = find(".overlay input");
  find(".overlay").hidden = !hasOverlay;
  const paint = hasOverlay ? overlay(stage, clip) : () => {};
  toggle.addEventListener("change", () => tick());

  function tick() {
    const t = lead.currentTime;
    for (const figure of figures) figure.moveTo(t);
    head.style.left = `${Math.min(100, (t / clip.seconds) * 100)}%`;
    paint(t, toggle.checked);
    const other = others[chosen];
    if (other && !lead.paused && Math.abs(other.currentTime - t) > 0.06 && t < other.duration) other.currentTime = t;
    if (!lead.paused) requestAnimationFrame(tick);
  }

  function follow() {
    others.forEach((other, i) => {
      if (!other) return;
      other.volume = lead.volume;
      if (i !== chosen || lead.paused) { other.pause(); return; }
      other.currentTime = lead.currentTime;
      other.play().catch(() => {});
    });
    tick();
  }

  function choose(i) {
    chosen = i;
    lead.muted = i > 0;
    const track = clip.tracks[i].spectrogram ? clip.tracks[i] : clip.tracks[0];
    find(".spectrogram img").src = track.spectrogram;
    find(".spectrogram img").alt = `Spectrograms of the ${track.name} sound: left ear, right ear, difference`;
    find(".spectrogram figcaption").replaceChildren(make("b", {}, `Spectrogram, ${track.name}`), "0 to half the sample rate; blue: left louder, red: right louder");
    follow();
  }

  clip.tracks.forEach((track, i) => {
    const input = make("input", { type: "radio", name: `track-${clip.id}`, value: track.name });
    input.checked = i === 0;
    input.addEventListener("change", () => choose(i));
    find(".tracks").append(make("label", {}, input, track.name));
  });
  lead.addEventListener("play", () => {
    for (const player of players) if (player !== lead) player.pause();
    follow();
  });
  for (const event of ["pause", "seeked", "volumechange", "ended"]) lead.addEventListener(event, follow);
  for (const event of ["loadeddata", "timeupdate"]) lead.addEventListener(event, () => lead.paused && tick());
  players.push(lead);

  const signed = (x, unit) => (x === null || x === undefined ? null : `${x > 0 ? "+" : ""}${short(x)} ${unit}`);
  describe(find(".summary"), {
    "Level difference": signed(clip.summary.ild_clip_db, "dB"), "Time difference": signed(clip.summary.itd_xc_clip_us, "µs"),
    "Interaural coherence": clip.summary.iacc_clip === null ? null : short(clip.summary.iacc_clip),
  });
  describe(find(".facts"), clip.facts);
  document.getElementById("clips").append(card);
  choose(0);
}

/** Fills a definition list; nested objects become `outer inner` rows, unknown values are left out. */
function describe(list, facts, before = "") {
  for (const [key, value] of Object.entries(facts)) {
    if (value === null || value === undefined || value === "") continue;
    if (typeof value === "object") describe(list, value, `${before}${key} `);
    else list.append(make("dt", {}, before + key.replaceAll("_", " ")), make("dd", {}, typeof value === "number" ? short(value, 6) : String(value)));
  }
}

function showScores(scores) {
  const section = document.getElementById("scores"), table = section.querySelector("table");
  section.hidden = false;
  const arrows = { higher: "↑", lower: "↓" };
  const titles = ["metric", "generated", "95 % interval", "n", "undefined", ...scores.rivals.map((name) => name.replaceAll("_", " "))];
  table.append(make("thead", {}, make("tr", {}, ...titles.map((title) => make("th", { scope: "col" }, title)))));
  const body = make("tbody");
  for (const row of scores.rows) {
    const unit = [{ 1: "", us: "µs" }[row.unit] ?? row.unit, arrows[row.better] ?? ""].filter(Boolean).join(" ");
    const [low, high] = row.ci95 ?? [null, null];
    body.append(make("tr", { class: row.headline ? "" : "more" }, make("th", { scope: "row" }, row.name.replace(/_(db|us|ms|deg|rad)$/, "").replaceAll("_", " "), " ", make("small", {}, unit)),
      make("td", { class: "own" }, short(row.value)), make("td", {}, low === null ? "–" : `${short(low)} … ${short(high)}`),
      make("td", {}, short(row.n)), make("td", {}, short(row.undefined)), ...row.rivals.map((value) => make("td", {}, short(value)))));
  }
  table.append(body);
  const more = document.getElementById("all-scores");
  more.hidden = scores.rows.every((row) => row.headline);
  more.addEventListener("click", () => {
    const all = table.classList.toggle("all");
    more.setAttribute("aria-expanded", all);
    more.textContent = all ? "Show headline metrics" : "Show all metrics";
  });
  if (scores.dropped.length) section.append(make("p", { class: "note" }, `Not scored: ${scores.dropped.join("; ")}`));
}

let context = null;
/** Plays 0.7 s of 440 Hz in one ear. */
function tone(side) {
  context ??= new AudioContext();
  context.resume();
  const now = context.currentTime, volume = context.createGain(), pan = context.createStereoPanner(), source = context.createOscillator();
  pan.pan.value = side === "left" ? -1 : 1;
  volume.gain.setValueAtTime(0, now);
  volume.gain.linearRampToValueAtTime(0.2, now + 0.03);
  volume.gain.linearRampToValueAtTime(0, now + 0.7);
  source.frequency.value = 440;
  source.connect(volume).connect(pan).connect(context.destination);
  source.start(now);
  source.stop(now + 0.75);
  const status = document.getElementById("tone-status");
  status.textContent = `${side} ear …`;
  source.addEventListener("ended", () => { status.textContent = ""; });
}

document.getElementById("name").textContent = data.name;
document.getElementById("about").textContent = [
  ...(data.clips.length ? [`${data.clips.length} clip${data.clips.length > 1 ? "s" : ""}`, "left is up in every plot"] : ["training run"]), `spatialv2a_jax ${data.version}`,
].filter(Boolean).join(" · ");
document.getElementById("check").hidden = !data.clips.length;
for (const button of document.querySelectorAll("[data-tone]")) button.addEventListener("click", () => tone(button.dataset.tone));
if (data.scores) showScores(data.scores);
data.clips.forEach(showClip);
