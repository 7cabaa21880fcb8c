
const PHASES = {
  step: ["training steps", "var(--c2)"], init: ["starting", "var(--c0)"], restore: ["restoring", "var(--c0)"],
  compile: ["compiling", "var(--c3)"], data: ["waiting for data", "var(--c1)"], eval: ["evaluating", "var(--c4)"],
  save: ["saving", "var(--c5)"], lost: ["lost: done again", "var(--bad)"], down: ["down: no process", "var(--soft)"],
};

/** Where the time of a run went: one bar, and the same as a list. */
function goodputBar(phases) {
  const total = phases.reduce((sum, { seconds }) => sum + seconds, 0);
  const bar = make("div", { class: "bar", role: "img", "aria-label": "Share of time per phase" }), list = make("dl");
  for (const { phase, seconds } of [...phases].sort((a, b) => b.seconds - a.seconds)) {
    const [name, colour] = PHASES[phase] ?? [phase, "var(--soft)"], share = (100 * seconds) / total;
    bar.append(make("span", { style: `flex-grow: ${seconds}; background: ${colour}`, title: `${name}: ${short(share)} %`, "data-phase": phase }));
    list.append(make("dt", { style: `--colour: ${colour}` }, name), make("dd", {}, `${short(share)} % · ${lasting(seconds)}`));
  }
  return make("figure", { class: "goodput" }, make("figcaption", {}, make("b", {}, "Where the time went"), lasting(total)), bar, list);
}

function lasting(seconds) {
  const [unit, name] = [[86400, "days"], [3600, "h"], [60, "min"]].find(([unit]) => seconds >= 2 * unit) ?? [1, "s"];
  return `${short(seconds / unit)} ${name}`;
}

function runPlot({ title, unit, series, zero }, marks) {
  const lines = Object.entries(series).map(([name, { x, y }], i) => ({ name, x, y, colour: COLOURS[i] }));
  const steps = lines.flatMap((line) => line.x), top = Math.max(...lines.flatMap((line) => line.y));
  const span = [Math.min(...steps), Math.max(...steps)];
  const seen = marks.filter(({ x }) => x >= span[0] && x <= span[1]);
  const limits = zero && top > 0 ? [0, top] : undefined;
  return plot({ title: unit ? `${title}, ${unit}` : title, unit: "", xUnit: "steps", series: lines, span, limits, marks: seen, height: 200 });
}

function showRun(run) {
  const section = document.getElementById("run"), find = (name) => document.getElementById(`run-${name}`);
  section.hidden = false;
  describe(find("summary"), run.summary);
  if (run.goodput.length) find("goodput").append(goodputBar(run.goodput));
  const marks = run.checkpoints.map((x) => ({ x, kind: "checkpoint", text: `checkpoint of step ${x}` }));
  for (const { step, reason } of run.skipped) marks.push({ x: step, kind: "skipped", text: `update ${step} left out: ${reason}` });
  for (const figure of run.figures) find("figures").append(runPlot(figure, marks));
  if (marks.length) find("marks").hidden = false;
  for (const figure of run.more) find("more-figures").append(runPlot(figure, []));
  find("more").hidden = !run.more.length;
  for (const { step, reason } of run.skipped) find("skipped-list").append(make("li", {}, `step ${step}: ${reason}`));
  find("skipped").hidden = !run.skipped.length;
  for (const { name, step, audio, spectrogram } of run.sounds) {
    const figure = make("figure", { class: "sound" }, make("figcaption", {}, make("b", {}, name), `step ${step}`));
    if (spectrogram) figure.append(make("img", { src: spectrogram, alt: `Spectrograms of ${name}: left ear, right ear, difference` }));
    const player = make("audio", { src: audio, controls: "", preload: "metadata", "aria-label": name });
    player.addEventListener("play", () => { for (const other of players) if (other !== player) other.pause(); });
    players.push(player);
    figure.append(player);
    find("sounds").append(figure);
  }
  find("sound").hidden = !run.sounds.length;
  document.getElementById("check").hidden &&= !run.sounds.length;
  find("config").hidden = !run.config;
  find("config").querySelector("pre").textContent = JSON.stringify(run.config, null, 2);
}

if (data.run) showRun(data.run);
