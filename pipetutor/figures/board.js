/* The board: a pipeline schedule that a reader places by hand, plays, and carries on as text or in a link.

One module without any other: in a notebook anywidget loads it, in a web page it stands inline, and the tests run its
first half in Node. That half, down to "Drawing", knows no page: the text of a schedule, the rules, the play, the
causes of gaps, links. It says the same as pipetutor/schedule/rules.py and simulate.py, and a test holds it to them on
thousands of schedules; to run that very code in a page, as Pyodide could, would take 10 MB more of every page.

A game is what does not change (board.py makes it): ranks, micro_batches, placement (the rank of each stage), costs
(forward, backward_input, backward_weight of each stage; latency; wire of each boundary between stages), in slots; cap
or null; par or null; split: whether backward passes may come in halves; name, task, key (in links), looks.
What changes are rows: for each rank the passes that are placed, in their order, each {kind, stage, batch}. The kinds
are F forward, B backward, and the halves of a backward pass, I for the input and W for the weights. */

export const KINDS = { F: "forward pass", B: "backward pass", I: "input half of a backward pass",
  W: "weight half of a backward pass" };
const GRADIENT = ["B", "I"]; // either makes the gradient that the stage before waits for
const PASS = /^(\d{0,6})([FBIW])(\d{1,6})$/;
const LINK = /^#board=([^:]*):?(.*)$/;
const CLOSE = 1e-9; // of times: sums of fractions differ by less

/** Why a move or a text is refused, in a sentence. */
export class Refusal extends Error {}

const idOf = ({ kind, stage, batch }) => `${stage}${kind}${batch}`;
const numbered = (game) => game.placement.some((rank, stage) => rank !== stage);
const stagesOf = (game, rank) => game.placement.flatMap((holder, stage) => (holder === rank ? [stage] : []));

/** The name of a pass, as the text has it: with its stage, where rank r does not hold stage r alone. */
export const nameOf = (game, pass) => `${numbered(game) ? pass.stage : ""}${pass.kind}${pass.batch}`;

const kindsOf = (game) => (game.split ? ["F", "B", "I", "W"] : ["F", "B"]);
const examplesOf = (game) => kindsOf(game).map((kind) => nameOf(game, { kind, stage: 0, batch: 0 }));

const listed = (words) => [words.slice(0, -1).join(", "), ...words.slice(-1)].filter(Boolean).join(" and ");
const number = (value) => String(+value.toFixed(2));
const slots = (value, unit = "slot") =>
  `${number(value)} ${unit}${unit === "slot" && Math.abs(value - 1) > CLOSE ? "s" : ""}`;

// ---- Text -----------------------------------------------------------------------------------------------------------

/** Read one word, such as F0 or, on stage 5, 5F0, of a rank's row. */
export function passOf(game, word, rank) {
  const found = PASS.exec(word.toUpperCase());
  if (!found) {
    throw new Refusal(`"${word.slice(0, 40)}" is no pass: passes of this board are such as ${listed(examplesOf(game))}`);
  }
  return { kind: found[2], stage: found[1] ? Number(found[1]) : rank, batch: Number(found[3]) };
}

/** Read a text: a row a rank, ended by a line break or "/"; between passes white space or commas; dots mean nothing. */
export function parse(game, text) {
  const lines = text.split(/[\n/]/).filter((line) => line.trim());
  if (lines.length !== game.ranks) {
    throw new Refusal(`${lines.length} row${lines.length === 1 ? "" : "s"}, but the board has ${game.ranks} ranks: ` +
      'write a row for each, and "." for a rank that does nothing yet');
  }
  return lines.map((line, rank) => {
    const words = line.replace(/^\s*(?:rank\s*)?\d+\s*:/, "").replace(/\((\w+);(\w+)\)OVERLAP_F_B/g, "$1 $2");
    const row = words.split(/[\s,;|]+/).filter((word) => /[^.]/.test(word)).map((word) => passOf(game, word, rank));
    const there = new Set(row.map(idOf));
    return row.map((pass) => { // a B beside a W is the input half, as the pictures of the course draw it
      const halved = there.has(idOf({ ...pass, kind: "W" })) && !there.has(idOf({ ...pass, kind: "I" }));
      return pass.kind === "B" && halved ? { ...pass, kind: "I" } : pass;
    });
  });
}

/** Write rows that can be played: a column for each slot, were every pass one slot long; a dot where a rank waits. */
export function write(game, rows) {
  const times = play({ ...game, costs: { latency: 0, wire: [] } }, rows, () => 1);
  const cells = times.rows.map((row) => {
    const line = Array(Math.round(times.slots)).fill(".");
    for (const { pass, start } of row) line[Math.round(start)] = nameOf(game, pass);
    return line;
  });
  const width = Math.max(1, ...cells.flat().map((cell) => cell.length));
  return cells.map((line) => line.map((cell) => cell.padEnd(width)).join(" ").trimEnd() || ".").join("\n");
}

/** The end of a link that carries the rows, such as #board=3x4:F0,F1/F0/. */
export function linkOf(game, rows) {
  const lines = rows.map((row) => row.map((pass) => nameOf(game, pass)).join(",") || ".");
  return `#board=${game.key}:${lines.join("/")}`;
}

/** The text that the end of a link carries; null where it is none, or that of another board. */
export function textOf(game, hash) {
  const [, key, text] = LINK.exec(hash) ?? [];
  if (key !== game.key) return null;
  try {
    return decodeURIComponent(text).replaceAll("/", "\n");
  } catch { // a damaged link: the text's own refusal says what is no pass
    return text;
  }
}

// ---- Rules ----------------------------------------------------------------------------------------------------------

/** What must have ended before a pass: kinds, of which one will do, and their stage; the neighbour's last. */
function needs(game, { kind, stage }) {
  if (kind === "F") return stage ? [{ kinds: ["F"], stage: stage - 1 }] : [];
  if (kind === "W") return [{ kinds: ["I"], stage }];
  const own = [{ kinds: ["F"], stage }];
  return stage < game.placement.length - 1 ? [...own, { kinds: GRADIENT, stage: stage + 1 }] : own;
}

const candidates = (need, batch) => need.kinds.map((kind) => ({ kind, stage: need.stage, batch }));

/** What a pass gets from another: in words that follow "needs" or "waits for". */
function giftOf(game, pass, needed) {
  const from = ` from rank ${game.placement[needed.stage]}`;
  const there = game.placement[needed.stage] === game.placement[pass.stage] ? "" : from;
  if (needed.stage !== pass.stage) {
    return `the ${needed.kind === "F" ? "activation" : "gradient"} of ${nameOf(game, needed)}${there}`;
  }
  return needed.kind === "F" ? `its forward pass ${nameOf(game, needed)}` : `its input half ${nameOf(game, needed)}`;
}

/** Why a pass cannot stand on a board at all, or not on this rank. */
function misplaced(game, { kind, stage, batch }, rank) {
  const name = nameOf(game, { kind, stage, batch });
  const last = game.placement.length - 1;
  if (stage > last) return `there is no stage ${stage}: the board has stages 0 to ${last}`;
  if (batch >= game.micro_batches) return `${name} is of no micro-batch: there are 0 to ${game.micro_batches - 1}`;
  if (game.placement[stage] !== rank) {
    return `rank ${game.placement[stage]} holds stage ${stage} and its weights, so rank ${rank} cannot run ${name}`;
  }
  if (!game.split && "IW".includes(kind)) return `${name} is half a backward pass, and this board has whole ones: B`;
  return null;
}

/** Say in one sentence what is wrong with rows, complete or not; null where every pass on them can run. */
export function problem(game, rows) {
  const at = new Map();
  for (const [rank, row] of rows.entries()) {
    for (const [index, pass] of row.entries()) {
      const name = nameOf(game, pass);
      const wrong = misplaced(game, pass, rank);
      if (wrong) return wrong;
      if (at.has(idOf(pass))) return `${name} is there already, on rank ${rank}`;
      const whole = { ...pass, kind: "B" };
      const halves = ["I", "W"].map((kind) => ({ ...pass, kind }));
      const others = pass.kind === "B" ? halves : pass.kind === "F" ? [] : [whole];
      const other = others.find((one) => at.has(idOf(one)));
      if (other) {
        return `${name} and ${nameOf(game, other)} are the same gradients twice: keep the whole backward pass, ` +
          "or its two halves";
      }
      at.set(idOf(pass), { rank, index });
    }
  }
  for (const [rank, row] of rows.entries()) {
    let held = 0;
    for (const [index, pass] of row.entries()) {
      for (const need of needs(game, pass)) {
        const known = candidates(need, pass.batch).find((one) => at.has(idOf(one)));
        const needed = known ?? candidates(need, pass.batch)[0];
        const subject = `${nameOf(game, pass)} on rank ${rank} needs ${giftOf(game, pass, needed)}`;
        if (!known) return `${subject}, which is not placed yet`;
        const place = at.get(idOf(known));
        if (place.rank === rank && place.index > index) return `${subject}, which would come after it`;
      }
      held += heldBy(pass);
      if (game.cap !== null && held > game.cap) {
        return `with ${nameOf(game, pass)} rank ${rank} would hold ${held} micro-batches in flight, and ${game.cap} ` +
          `${game.cap === 1 ? "is" : "are"} allowed: let a backward pass free one before`;
      }
    }
  }
  const { stuck } = play(game, rows);
  if (!stuck.length) return null;
  const circle = [];
  let here = stuck[0];
  while (!circle.includes(here)) {
    circle.push(here);
    here = stuck.find((one) => one.rank === game.placement[circle.at(-1).needed.stage]);
  }
  const words = circle.slice(circle.indexOf(here)).map(({ rank, pass, needed }) =>
    `rank ${rank} would stand at ${nameOf(game, pass)} and wait for ${nameOf(game, needed)} on rank ` +
    `${game.placement[needed.stage]}`);
  return `a circle of waits, in which nobody can go on: ${words.join("; ")}`;
}

/** A pass on the rows that needs another one, if there is any. */
export function dependant(game, rows, pass) {
  const needed = (one) => needs(game, one).flatMap((need) => candidates(need, one.batch));
  return rows.flat().find((one) => needed(one).some((other) => idOf(other) === idOf(pass)));
}

/** Whether a pass begins (1) or ends (-1) a micro-batch's time in flight on its rank. */
const heldBy = ({ kind }) => (kind === "F" ? 1 : kind === "I" ? 0 : -1);

/** How many passes of some stages are still to be placed, with whole backward passes where no half is there. */
export function missing(game, rows, stages = game.placement.keys()) {
  const there = new Set(rows.flat().map(idOf));
  let count = 0;
  for (const stage of stages) {
    for (let batch = 0; batch < game.micro_batches; batch += 1) {
      const [forward, whole, ...halves] = ["F", "B", "I", "W"].map((kind) => there.has(idOf({ kind, stage, batch })));
      count += !forward;
      count += whole ? 0 : halves.includes(true) ? halves.filter((half) => !half).length : 1;
    }
  }
  return count;
}

// ---- Play -----------------------------------------------------------------------------------------------------------

function costOf({ forward, backward_input: input, backward_weight: weight }, { kind, stage }) {
  return { F: forward[stage], B: input[stage] + weight[stage], I: input[stage], W: weight[stage] }[kind];
}

/**
 * Play rows: every pass begins as soon as it can. A rank has a wire to each other rank, and a message leaves as soon
 * as it is made and the wire is free.
 *
 * Returns for each rank the passes that could run, each with begin (when its rank was free), made (when what it waits
 * for was made), start, end, and need, the pass of another stage that it waits for; the slots; the share of them that
 * ranks wait, bubble; the most micro-batches in flight, peaks; and the ranks that got stuck, with what they wait for.
 */
export function play(game, rows, cost = costOf) {
  const { placement, costs } = game;
  const clock = rows.map(() => 0);
  const played = rows.map(() => []);
  const done = new Map();
  const wires = new Map();
  const met = (need, batch) => candidates(need, batch).some((one) => done.has(idOf(one)));
  const lacking = (pass) => needs(game, pass).find((need) => !met(need, pass.batch));
  for (let moved = true; moved; ) {
    moved = false;
    for (const [rank, row] of rows.entries()) {
      while (played[rank].length < row.length && !lacking(row[played[rank].length])) {
        const pass = row[played[rank].length];
        const before = needs(game, pass).at(-1);
        const found = before && candidates(before, pass.batch).map((one) => done.get(idOf(one))).find(Boolean);
        const need = found && before.stage !== pass.stage ? found : null;
        const begin = clock[rank];
        const start = need ? Math.max(begin, need.arrive) : begin;
        const made = need ? Math.min(Math.max(need.end, begin), start) : begin;
        const end = start + cost(costs, pass);
        const to = pass.stage + (pass.kind === "F" ? 1 : -1);
        let arrive = end; // where it is needed
        if (pass.kind !== "W" && placement[to] !== undefined && placement[to] !== rank) {
          const wire = `${rank} to ${placement[to]}`;
          const left = Math.max(wires.get(wire) ?? 0, end) + (costs.wire[Math.min(pass.stage, to)] ?? 0);
          wires.set(wire, left);
          arrive = left + costs.latency;
        }
        const one = { pass, rank, index: played[rank].length, begin, made, start, end, arrive, need };
        done.set(idOf(pass), one);
        played[rank].push(one);
        clock[rank] = end;
        moved = true;
      }
    }
  }
  const stuck = rows.flatMap((row, rank) => {
    const pass = row[played[rank].length];
    if (!pass) return [];
    const wanted = candidates(lacking(pass), pass.batch);
    const there = new Set(rows.flat().map(idOf));
    return [{ rank, pass, needed: wanted.find((one) => there.has(idOf(one))) ?? wanted[0] }];
  });
  const end = Math.max(0, ...clock);
  const waits = played.flatMap((row, rank) => [...row.map((one) => one.made - one.begin), end - clock[rank]]);
  const waiting = waits.reduce((sum, wait) => sum + wait, 0);
  const peaks = rows.map((row) => {
    let held = 0;
    return Math.max(0, ...row.map((pass) => (held += heldBy(pass))));
  });
  return { rows: played, clock, slots: end, bubble: end ? waiting / (rows.length * end) : 0, peaks, stuck };
}

/** Say what a pass waited for, and what had to be done before that. */
export function why(game, times, rank, index) {
  const one = times.rows[rank][index];
  const words = [`Rank ${rank} waits ${slots(one.start - one.begin)} for ${giftOf(game, one.pass, one.need.pass)}.`];
  // Walk backwards from the end of the gap: over to the rank that was waited for, else along the rank that worked.
  //
  //     rank 0   F0 F1 .  .  B0        P = 2, GPipe: the gap of rank 0 is as long as
  //     rank 1   .  F0[F1 B0]          what rank 1 does in it.
  const chain = [];
  for (let here = one.need; here && here.end > one.begin + CLOSE; ) {
    chain.unshift(here);
    here = here.start > here.begin + CLOSE ? here.need : times.rows[here.rank][here.index - 1];
  }
  const done = [];
  for (const here of chain) {
    if (done.at(-1)?.rank === here.rank) done.at(-1).names.push(nameOf(game, here.pass));
    else done.push({ rank: here.rank, names: [nameOf(game, here.pass)] });
  }
  if (done.length) {
    const shown = done.slice(-4).map((each) => `rank ${each.rank} runs ${listed(each.names)}`);
    words.push(`Until then ${done.length > 4 ? "among others " : ""}${shown.join(", then ")}.`);
  }
  const flight = one.start - Math.max(one.need.end, one.begin);
  if (flight > CLOSE) words.push(`For ${slots(flight)} of it the message is on its way.`);
  return words.join(" ");
}

/** Say how far the rows are, and once they are complete, how good. */
export function verdict(game, rows, times = play(game, rows)) {
  const left = missing(game, rows);
  if (left) return `${left} pass${left === 1 ? "" : "es"} to place.`;
  const took = slots(times.slots);
  if (game.par === null) return `Complete in ${took}.`;
  const more = times.slots - game.par;
  if (more > CLOSE) return `Complete in ${took}; par is ${number(game.par)}.`;
  return more < -CLOSE ? `${took}: better than par, ${number(game.par)}.` : `${took}: par met.`;
}

/** Rows with a pass more, one less, or one in another place of its rank's order. */
const exchanged = (rows, rank, row) => rows.map((old, at) => (at === rank ? row : old));
export const inserted = (rows, rank, at, pass) => exchanged(rows, rank, rows[rank].toSpliced(at, 0, pass));
export const removed = (rows, rank, at) => exchanged(rows, rank, rows[rank].toSpliced(at, 1));
export const moved = (rows, rank, from, to) => inserted(removed(rows, rank, from), rank, to, rows[rank][from]);

/** Read rows from a text and refuse them unless every pass on them can run. */
export function load(game, text) {
  const rows = parse(game, text);
  const wrong = problem(game, rows);
  if (wrong) throw new Refusal(wrong);
  return rows;
}

// ---- Drawing --------------------------------------------------------------------------------------------------------

const LOOK = { F: "forward", B: "backward", I: "backward, input", W: "backward, weight" };
const SHADE = 0.45; // how much darker the last of a rank's stages is than its first, as in plots_timeline
const ROW = 42, BAR = 30, HEAD = 22, FOOT = 14, STRIP = 34, LABEL = 64;
const WIDEST = 90; // of a slot: beyond it more slots fill the width
const PER_SECOND = 2; // slots that the cursor passes
const CSS = `
.pt-board { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #ffffff; --field: #f3f5f8; --here: #d3e4fb;
  --accent: #0550ae; --bad: #a40e26; --good: #116329; color-scheme: light; box-sizing: border-box;
  margin: 0.5rem 0; padding: 0.75rem clamp(0.55rem, 2vw, 1rem);
  background: var(--page); color: var(--ink); border: 1px solid var(--line);
  border-radius: 8px; font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans",
  sans-serif; }
@media screen and (prefers-color-scheme: dark) { .pt-board { --ink: #e6e9ed; --soft: #a5afba; --line: #3a424c;
  --page: #12161c; --field: #1a2028; --here: #1f3a61; --accent: #80bbff; --bad: #ff9a93; --good: #6fdd8b; color-scheme: dark; } }
@media screen { [data-jp-theme-light="true"] .pt-board { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --page: #ffffff;
  --field: #f3f5f8; --here: #d3e4fb; --accent: #0550ae; --bad: #a40e26; --good: #116329; color-scheme: light; }
[data-jp-theme-light="false"] .pt-board { --ink: #e6e9ed; --soft: #a5afba; --line: #3a424c; --page: #12161c;
  --field: #1a2028; --here: #1f3a61; --accent: #80bbff; --bad: #ff9a93; --good: #6fdd8b; color-scheme: dark; } }
.pt-board *, .pt-board *::before { box-sizing: border-box; }
.pt-board p { margin: 0.25rem 0; max-width: 66rem; }
.pt-board .pt-title { font-weight: 650; }
.pt-board .pt-facts { display: flex; flex-wrap: wrap; gap: 0.1rem 1.5rem; margin: 0.4rem 0; }
.pt-board .pt-facts span { color: var(--soft); }
.pt-board .pt-facts b { color: var(--ink); font-weight: 650; font-variant-numeric: tabular-nums; }
.pt-board .pt-scroll { overflow-x: auto; }
.pt-board svg { display: block; user-select: none; -webkit-user-select: none; }
.pt-board svg text { font-size: 13px; fill: var(--ink); pointer-events: none; }
.pt-board svg .pt-soft { fill: var(--soft); font-size: 11px; }
.pt-board .pt-ground { fill: var(--field); }
.pt-board [role="row"][aria-selected="true"] .pt-ground { fill: var(--here); stroke: var(--accent); stroke-width: 1.5; }
.pt-board .pt-name { fill: none; }
.pt-board [role="row"]:has(> .pt-rank) { cursor: pointer; }
.pt-board .pt-rank .pt-name { fill: var(--field); stroke: var(--soft); }
.pt-board [role="row"]:hover > .pt-rank .pt-name { stroke: var(--accent); stroke-width: 2; }
.pt-board [role="row"][aria-selected="true"] > .pt-rank .pt-name { fill: var(--accent); stroke: var(--accent); }
.pt-board [role="row"][aria-selected="true"] > .pt-rank text { fill: var(--page); font-weight: 650; }
.pt-board .pt-cell { outline: none; cursor: pointer; }
.pt-board .pt-cell .pt-ring { fill: none; stroke: none; stroke-width: 2.5; pointer-events: none; }
.pt-board .pt-cell:focus .pt-ring { stroke: var(--accent); }
.pt-board .pt-cell.pt-now .pt-ring { stroke: var(--ink); }
.pt-board .pt-gap { fill: var(--soft); opacity: 0.3; }
.pt-board .pt-gap:hover, .pt-board .pt-cell:focus .pt-gap { opacity: 0.65; }
.pt-board .pt-hit { fill: transparent; }
.pt-board .pt-pass { touch-action: pan-y; } /* a finger drags it */
.pt-board .pt-next { fill: none; stroke: var(--soft); stroke-dasharray: 3 3; }
.pt-board .pt-caret, .pt-board .pt-cursor { stroke: var(--accent); stroke-width: 2.5; pointer-events: none; }
.pt-board .pt-par { stroke: var(--good); stroke-width: 2; stroke-dasharray: 5 4; }
.pt-board .pt-grid { stroke: var(--line); }
.pt-board .pt-held { fill: var(--accent); opacity: 0.35; }
.pt-board .pt-cap { stroke: var(--bad); stroke-dasharray: 4 3; }
.pt-board button { font: inherit; color: var(--ink); background: var(--field); border: 1px solid var(--line);
  border-radius: 6px; padding: 0.25rem 0.6rem; min-height: 2rem; cursor: pointer; }
.pt-board button:hover { border-color: var(--accent); }
.pt-board button[aria-disabled="true"] { color: var(--soft); opacity: 0.6; cursor: default; }
.pt-board :is(button, textarea, input, summary):focus-visible { outline: 2.5px solid var(--accent); outline-offset: 1px; }
.pt-board .pt-palette { margin: 0.5rem 0; font-size: 13px; }
.pt-board .pt-palette > span { font-weight: 650; }
.pt-board .pt-palette > div { display: flex; flex-wrap: wrap; gap: 0.3rem 1.5rem; margin: 0.3rem 0; }
.pt-board .pt-line { display: flex; flex-wrap: wrap; gap: 0.25rem; align-items: center; }
.pt-board .pt-line span { color: var(--soft); padding-right: 0.25rem; }
.pt-board .pt-chip { min-width: 2.4rem; padding: 0.1rem 0.3rem; font-size: 13px; border-color: transparent; }
.pt-board .pt-chip.pt-later { background: none; border: 1px dashed var(--soft); }
.pt-board .pt-chip.pt-done { color: var(--soft); background: none; border-color: var(--line); text-decoration: line-through; }
.pt-board .pt-say { min-height: 1.45em; border-left: 3px solid var(--line); padding-left: 0.6rem; }
.pt-board .pt-say.pt-refused { border-color: var(--bad); color: var(--bad); }
.pt-board .pt-say.pt-solved { border-color: var(--good); color: var(--good); font-weight: 650; }
.pt-board .pt-info { min-height: 2.9em; color: var(--soft); }
.pt-board .pt-tools { display: flex; flex-wrap: wrap; gap: 0.35rem; align-items: center; margin: 0.5rem 0; }
.pt-board .pt-tools input { flex: 1 1 8rem; min-width: 6rem; accent-color: var(--accent); }
.pt-board textarea { width: 100%; font: 13px/1.5 ui-monospace, "SFMono-Regular", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; color: var(--ink); background: var(--field); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.4rem 0.6rem; white-space: pre; overflow-x: auto; resize: vertical; }
.pt-board summary { cursor: pointer; color: var(--accent); }
.pt-board kbd { font: 12px ui-monospace, Menlo, Consolas, monospace; border: 1px solid var(--line); border-radius: 4px;
  padding: 0 0.25rem; }
.pt-board .pt-legend { display: flex; flex-wrap: wrap; gap: 0.2rem 1rem; font-size: 13px; color: var(--soft); }
.pt-board .pt-legend span { display: inline-flex; align-items: center; gap: 0.35rem; }
@media print { .pt-board :is(.pt-palette, .pt-tools, .pt-info, .pt-keys) { display: none; } .pt-board { break-inside: avoid; }
.pt-board svg { max-width: 100%; height: auto; } }
`;

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  return fill(made, attributes, children);
}

function shape(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(made, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** How much darker a stage is drawn than the first of its rank's stages. */
const depthOf = (stages, stage) => (SHADE * (stage - stages[0])) / (stages.at(-1) - stages[0] || 1);

/** A colour made darker, and the ink that can be read on it. */
function shaded(colour, depth) {
  const parts = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16) * (1 - depth));
  const light = parts.map((part) => part / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  return { paint: `rgb(${parts.map(Math.round).join(" ")})`, ink: luminance > 0.18 ? "#111111" : "#ffffff" };
}

// A texture for each of matplotlib's hatches that plots_timeline uses, on a tile of 6 by 6.
const HATCHES = { ".": "M1.5 1.5h1v1h-1z M4.5 4.5h1v1h-1z", "/": "M-1 7L7 -1", "\\": "M-1 -1L7 7",
  x: "M0 0L6 6M6 0L0 6",
  "+": "M3 0V6M0 3H6", "-": "M0 3H6" };
let boards = 0; // on this page: ids of textures are the page's

/** When and how many micro-batches a rank holds: [time, number], from the passes that it ran, in their order. */
function heldOver(cells) {
  const steps = [[0, 0]];
  for (const { kind, begin, end } of cells) {
    if (kind && heldBy({ kind })) steps.push([kind === "F" ? begin : end, steps.at(-1)[1] + heldBy({ kind })]);
  }
  return steps;
}

/** A board in a page: builds its parts once, and draws the rows anew after each move. */
class View {
  constructor(root, game, { text = null, link = true, changed = () => {} } = {}) {
    Object.assign(this, { root, game, changed, link, fixed: Boolean(game.spans), id: `pt-${(boards += 1)}` });
    this.rows = Array.from({ length: game.ranks }, () => []);
    this.past = [];
    this.future = [];
    this.at = { rank: game.placement[0] ?? 0, type: "end", index: 0 }; // where the reader is: a cell of a rank's row
    this.typed = "";
    this.time = null; // of the cursor; null while there is none
    this.build();
    this.start(text ?? game.start);
  }

  // -- What it consists of --

  build() {
    const { game, root } = this;
    const button = (words, act, label) => element("button", { type: "button", onclick: act, "aria-label": label },
      words);
    this.facts = element("div", { class: "pt-facts" });
    this.grid = shape("svg", { role: "grid", "aria-label": this.fixed ? "What each rank did when"
      : "What each rank runs when",
      "aria-readonly": this.fixed });
    this.memory = shape("svg", { role: "img" });
    const inform = (event) => this.inform(event);
    this.scroll = element("div", { class: "pt-scroll", onkeydown: (event) => this.key(event), onpointerover: inform,
      onfocusin: inform, onpointerdown: (event) => this.press(event) }, this.grid, this.memory);
    this.palette = element("div", { class: "pt-palette", role: "toolbar", onkeydown: (event) =>
      this.paletteKey(event) });
    this.say = element("p", { class: "pt-say", role: "status" });
    this.info = element("p", { class: "pt-info" });
    this.player = button("▶ Play", () => this.playOrPause());
    this.slider = element("input", { type: "range", min: 0, value: 0, "aria-label": "Cursor",
      oninput: () => this.seek(Number(this.slider.value)) });
    this.undoer = button("Undo", () => this.undo());
    this.redoer = button("Redo", () => this.redo());
    this.field = element("textarea", { "aria-label": "The schedule as text, a row for each rank", spellcheck: "false",
      rows: Math.max(game.ranks, 2), wrap: "off" });
    const moves = [this.undoer, this.redoer, button("Reset", () => this.reset())];
    const time = [this.player, button("Step", () => this.step()), this.slider];
    const copies = [button("Place this text", () => this.place(this.field.value)),
      button("Copy text", () => this.copy(this.field.value, "The text"))];
    if (this.link) {
      const address = () => location.href.split("#")[0] + linkOf(game, this.rows);
      copies.push(button("Copy link", () => this.copy(address(), "A link to this board as it is now")));
    }
    const keys = element("details", { class: "pt-keys" }, element("summary", {}, "Keys"));
    keys.append(element("p", {}, ...["Arrow keys", ": move over the grid and the palette. ",
      examplesOf(game).join(" "), ": place that pass where you are. ", "Delete", ": take the pass away. ", "Alt + ← →",
      ": move it in its rank's order. ", "Ctrl + Z, Ctrl + Y", ": undo, redo."].map((words, place) =>
      (place % 2 ? words : element("kbd", {}, words)))));
    this.legend = element("div", { class: "pt-legend" });
    const tools = (...buttons) => element("div", { class: "pt-tools" }, ...buttons);
    const parts = this.fixed ? [this.info, this.legend, tools(...time)]
      : [this.palette, this.say, this.info, tools(...moves, ...time), this.field, tools(...copies), keys];
    const title = game.name ? [element("p", { class: "pt-title" }, game.name)] : [];
    if (game.task) title.push(element("p", {}, game.task));
    this.body = element("section", { class: "pt-board", "aria-label": game.name ? `Board: ${game.name}` : "Board" },
      element("style", {}, CSS), ...title, this.facts, this.scroll, ...parts);
    root.replaceChildren(this.body);
    this.body.addEventListener("keydown", (event) => this.anyKey(event));
    this.sizes = new ResizeObserver(() => this.draw());
    this.sizes.observe(this.scroll);
  }

  close() {
    this.sizes.disconnect();
    cancelAnimationFrame(this.frame);
    this.root.replaceChildren();
  }

  // -- Moves --

  start(text) {
    if (!this.fixed && text) {
      try {
        this.rows = load(this.game, text);
      } catch (refusal) {
        this.tell(this.sentence(refusal), "pt-refused");
      }
    }
    this.first = this.rows;
    this.draw();
    this.info.textContent = "Point at a gap, or go there with the arrow keys: here you read what the rank waits for.";
    if (this.fixed || this.say.textContent) return;
    this.tell(missing(this.game, this.rows) ? `Choose a rank (click its name) and one of its passes, or type a pass: ${examplesOf(this.game)[0]}.`
      : verdict(this.game, this.rows));
  }

  sentence(refusal) {
    if (!(refusal instanceof Refusal)) throw refusal;
    return refusal.message[0].toUpperCase() + refusal.message.slice(1) + ".";
  }

  get text() {
    return write(this.game, this.rows);
  }

  /** Take other rows, if they can be played, and go to a cell; say what was done, or why it is not. */
  take(rows, done, { at = this.at, refused = (wrong) => wrong } = {}) {
    const wrong = problem(this.game, rows);
    if (wrong) {
      this.tell(this.sentence(new Refusal(refused(wrong))), "pt-refused");
      return;
    }
    this.past.push(this.rows);
    this.future = [];
    this.at = at;
    this.show(rows, done);
  }

  show(rows, done) {
    this.rows = rows;
    this.draw();
    if (this.time === null) this.info.textContent = this.cells[this.at.rank][this.spot()].said;
    const times = play(this.game, rows);
    const whole = !missing(this.game, rows);
    const solved = whole && this.game.par !== null && times.slots <= this.game.par + CLOSE;
    this.tell(whole ? `${done} ${verdict(this.game, rows, times)}` : done, solved ? "pt-solved" : "");
    this.changed(this.text);
  }

  tell(words, look = "") {
    this.say.className = `pt-say ${look}`;
    this.say.textContent = words;
  }

  insert(pass) {
    const { rank } = this.at;
    const index = this.index();
    const before = this.rows[rank][index];
    const name = nameOf(this.game, pass);
    const ahead = before ? `, ahead of ${nameOf(this.game, before)}` : "";
    const at = { ...this.at, index: index + 1 };
    this.take(inserted(this.rows, rank, index, pass), `${name} placed on rank ${rank}${ahead}.`, { at });
  }

  remove(rank, index) {
    const pass = this.rows[rank][index];
    if (!pass) return;
    const name = nameOf(this.game, pass);
    const at = { ...this.at, index: this.index() - (index < this.index()) };
    const other = dependant(this.game, this.rows, pass);
    const held = other && `${nameOf(this.game, other)} on rank ${this.game.placement[other.stage]} needs it: take that away first`;
    const refused = (wrong) => `${name} stays on rank ${rank}: ${held ?? wrong}`;
    this.take(removed(this.rows, rank, index), `${name} taken from rank ${rank}.`, { at, refused });
  }

  shift(rank, from, to) {
    const pass = this.rows[rank][from];
    if (!pass || to === from || to < 0 || to >= this.rows[rank].length) return;
    const name = nameOf(this.game, pass);
    const before = to < from ? this.rows[rank][to] : this.rows[rank][to + 1];
    const place = before ? `ahead of ${nameOf(this.game, before)}` : "to the end";
    const at = { rank, type: "pass", index: to };
    const refused = (wrong) => `${name} stays where it is: ${wrong}`;
    this.take(moved(this.rows, rank, from, to), `${name} moved ${place} on rank ${rank}.`, { at, refused });
  }

  place(text) {
    try {
      const rows = parse(this.game, text);
      this.take(rows, "The text is placed.");
    } catch (refusal) {
      this.tell(this.sentence(refusal), "pt-refused");
    }
  }

  undo() {
    if (!this.past.length) return this.tell("There is nothing to undo.");
    this.future.push(this.rows);
    return this.show(this.past.pop(), "Undone.");
  }

  redo() {
    if (!this.future.length) return this.tell("There is nothing to redo.");
    this.past.push(this.rows);
    return this.show(this.future.pop(), "Done again.");
  }

  reset() {
    if (this.rows !== this.first) this.take(this.first, "As at the beginning; undo brings your passes back.");
  }

  /** Follow the page's link, if it carries a text for this board; say whether it does. */
  follow() {
    const text = this.fixed ? null : textOf(this.game, location.hash);
    if (text === null) return false;
    this.place(text);
    this.body.scrollIntoView({ block: "center" });
    return true;
  }

  async copy(text, what) {
    try {
      await navigator.clipboard.writeText(text);
      this.tell(`${what} is copied.`);
    } catch { // no permission: then by hand
      this.field.value = text;
      this.field.focus();
      this.field.select();
      this.tell(`${what} is selected: Ctrl + C copies it.`);
    }
  }

  // -- Keys and pointer --

  anyKey(event) {
    if (event.target === this.field || !(event.ctrlKey || event.metaKey)) return;
    const redo = event.key === "y" || (event.shiftKey && event.key.toLowerCase() === "z");
    if (redo || event.key === "z") {
      event.preventDefault();
      if (redo) this.redo();
      else this.undo();
    }
  }

  key(event) {
    const { rank } = this.at;
    const cell = this.spot();
    const here = this.cells[rank][cell];
    if (event.ctrlKey || event.metaKey) return;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const acts = {
      Home: () => this.go(rank, 0),
      End: () => this.go(rank, this.cells[rank].length - 1),
      Delete: () => here.type === "pass" && this.remove(rank, here.index),
      Backspace: () => (this.typed ? this.type("") : this.remove(rank, this.index() - 1)),
      Escape: () => this.type(""),
      Enter: () => this.typed && this.enter(),
    };
    if (steps[event.key]) {
      const [down, right] = steps[event.key];
      const moving = event.altKey && here.type === "pass" && !this.fixed;
      if (moving && right) this.shift(rank, here.index, here.index + right);
      else if (right) this.go(rank, cell + right);
      else this.go(rank + down, null, here.begin);
    } else if (acts[event.key] && (!this.fixed || ["Home", "End"].includes(event.key))) {
      acts[event.key]();
    } else if (!this.fixed && !event.altKey && /^[0-9fbiw]$/i.test(event.key)) {
      this.type(this.typed + event.key.toUpperCase());
    } else {
      return;
    }
    event.preventDefault();
  }

  /** Take a letter or a digit, and place the pass as soon as no further digit can belong to it. */
  type(typed) {
    const next = /^(\d*[FBIW]\d+)(\D)$/.exec(typed);
    if (next) { // a letter after a whole word begins the next one
      this.typed = next[1];
      this.enter();
      return this.type(next[2]);
    }
    if (!/^\d*[FBIW]?\d*$/.test(typed)) return this.type(typed.at(-1)); // another letter instead
    this.typed = typed;
    const digits = /[FBIW](\d+)$/.exec(typed)?.[1];
    if (digits === "0" || Number(digits) * 10 >= this.game.micro_batches) return this.enter();
    return this.tell(typed && `${typed}…${digits ? " Enter places it." : ""}`);
  }

  enter() {
    const word = this.typed;
    this.typed = "";
    try {
      this.insert(passOf(this.game, word, this.at.rank));
    } catch (refusal) {
      this.tell(this.sentence(refusal), "pt-refused");
    }
  }

  paletteKey(event) {
    const chips = [...this.palette.querySelectorAll("button")];
    const here = chips.indexOf(event.target.closest("button"));
    const lines = [...this.palette.querySelectorAll(".pt-line")].map((line) => [...line.querySelectorAll("button")]);
    const line = lines.findIndex((each) => each.includes(chips[here]));
    const column = lines[line]?.indexOf(chips[here]);
    const to = { ArrowLeft: chips[here - 1], ArrowRight: chips[here + 1], ArrowUp: lines[line - 1]?.[column],
      ArrowDown: lines[line + 1]?.[column], Home: chips[0], End: chips.at(-1) }[event.key];
    if (!to) return;
    event.preventDefault();
    to.focus();
  }

  /** Where in its rank's order a pass would be placed now: ahead of the cell where the reader is. */
  index() {
    const { index } = this.cells[this.at.rank][this.spot()];
    return index;
  }

  /** The number of the cell where the reader is; that of the rank's last one, if the cell is there no more. */
  spot() {
    const { rank, type, index } = this.at;
    const row = this.cells[rank];
    const kinds = type === "end" ? [] : [type, "pass"];
    const found = kinds.map((kind) => row.findIndex((cell) => cell.type === kind && cell.index === index));
    return found.find((number) => number >= 0) ?? row.length - 1;
  }

  /** Move to a cell of a rank, given its number or a time that it covers. */
  go(rank, cell, time) {
    if (!this.cells[rank]) return;
    const row = this.cells[rank];
    const number = cell ?? row.findIndex((each) => each.end > time + CLOSE);
    const { type, index } = row[Math.min(Math.max(number < 0 ? row.length - 1 : number, 0), row.length - 1)];
    this.at = { rank, type, index };
    this.typed = "";
    this.draw(true);
  }

  cellOf(event) {
    const found = event.target.closest?.("[data-cell]");
    if (!found) return null;
    const [rank, cell] = found.dataset.cell.split(",").map(Number);
    return { rank, cell, found };
  }

  /** Say below the grid what the pointer or the focus is on. */
  inform(event) {
    const at = this.cellOf(event);
    if (at) this.info.textContent = this.cells[at.rank][at.cell].said;
  }

  press(event) {
    const at = this.cellOf(event);
    const row = event.target.closest("[data-rank]");
    if (event.button || !(at || row)) return;
    event.preventDefault();
    if (at) this.go(at.rank, at.cell);
    else this.go(Number(row.dataset.rank), Infinity);
    const cell = at && this.cells[at.rank][at.cell];
    if (cell?.type === "pass" && !this.fixed) this.drag(event, at.rank, cell);
  }

  /** Follow the pointer with a mark between the passes of the rank, and move the pass there in the end. */
  drag(event, rank, cell) {
    const begun = event.clientX;
    const others = this.cells[rank].filter((each) => each.type === "pass" && each.index !== cell.index);
    const mark = shape("line", { class: "pt-caret", y1: HEAD + rank * ROW + 1, y2: HEAD + (rank + 1) * ROW - 1,
      visibility: "hidden" });
    this.grid.append(mark);
    let to = cell.index;
    const done = new AbortController();
    const follow = (now) => {
      const left = this.grid.getBoundingClientRect().left;
      const time = (now.clientX - left - LABEL) / this.scale;
      if (Math.abs(now.clientX - begun) > 5) mark.setAttribute("visibility", "visible");
      to = others.filter((each) => (each.begin + each.end) / 2 < time).length;
      const beside = others[to]?.begin ?? others.at(-1)?.end ?? 0;
      for (const name of ["x1", "x2"]) mark.setAttribute(name, LABEL + beside * this.scale);
    };
    const end = (drop) => {
      done.abort();
      mark.remove();
      if (drop && mark.getAttribute("visibility") === "visible") this.shift(rank, cell.index, to);
    };
    addEventListener("pointermove", follow, { signal: done.signal });
    addEventListener("pointerup", () => end(true), { signal: done.signal });
    addEventListener("pointercancel", () => end(false), { signal: done.signal });
    addEventListener("keydown", (pressed) => pressed.key === "Escape" && end(false), { signal: done.signal });
  }

  // -- The cursor --

  playOrPause() {
    if (this.playing) return this.pause();
    this.playing = true;
    this.player.textContent = "❚❚ Pause";
    if (this.time === null || this.time >= this.end - CLOSE) this.time = 0;
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    const speed = this.fixed ? this.end / 10 : PER_SECOND;
    let last = performance.now();
    const tick = (now) => {
      if (!this.playing) return;
      if (!still) {
        this.seek(Math.min(this.time + ((now - last) / 1000) * speed, this.end), true);
        last = now;
      } else if (now - last > 1000 / PER_SECOND) {
        this.step(true);
        last = now;
      }
      if (this.time >= this.end - CLOSE) this.pause();
      else this.frame = requestAnimationFrame(tick);
    };
    this.frame = requestAnimationFrame(tick);
    return this.seek(this.time, true);
  }

  pause() {
    this.playing = false;
    this.player.textContent = "▶ Play";
  }

  /** Go on to where the next pass begins or ends. */
  step(playing = false) {
    const times = this.cells.flat().flatMap((cell) => (cell.type === "end" ? [] : [cell.begin, cell.end]));
    const next = Math.min(this.end, ...times.filter((time) => time > (this.time ?? -1) + CLOSE));
    this.seek(this.time !== null && this.time >= this.end - CLOSE ? 0 : next, playing);
  }

  seek(time, playing = false) {
    if (!playing) this.pause();
    this.time = time;
    this.drawCursor();
  }

  drawCursor() {
    for (const svg of [this.grid, this.memory]) {
      svg.querySelector(".pt-cursor")?.remove();
      if (this.time === null) continue;
      const x = LABEL + Math.min(this.time, this.end) * this.scale;
      svg.append(shape("line", { class: "pt-cursor", x1: x, x2: x, y1: svg === this.grid ? 16 : 0,
        y2: svg.getAttribute("height") }));
    }
    this.slider.value = this.time ?? 0;
    const now = [];
    for (const [rank, row] of this.cells.entries()) {
      const active = this.time === null ? null : row.find((cell) => cell.type !== "end"
        && cell.begin <= this.time + CLOSE && cell.end > this.time + CLOSE);
      for (const cell of row) cell.drawn?.classList.toggle("pt-now", cell === active && cell.type === "pass");
      now.push(`rank ${rank} ${active?.type === "pass" ? active.label || active.name : "waits"}`);
    }
    if (this.time === null) return;
    const words = `${this.when(this.time)}: ${now.join(", ")}`;
    this.slider.setAttribute("aria-valuetext", words);
    this.info.textContent = words;
  }

  when(time) {
    return this.fixed ? slots(time, this.game.unit) : `Slot ${Math.floor(time + CLOSE) + 1}`;
  }

  // -- The picture --

  /** What stands in each rank's row, from left to right: passes, gaps with their causes, and the place for the next. */
  scene() {
    return this.fixed ? this.measured() : this.placed();
  }

  placed() {
    const { game, rows } = this;
    const times = play(game, rows);
    const whole = !missing(game, rows);
    const last = times.clock.indexOf(Math.max(...times.clock));
    const span = (begin, end) => (Math.abs(end - begin - 1) < CLOSE && Number.isInteger(+begin.toFixed(6))
      ? `slot ${number(begin + 1)}` : Number.isInteger(+begin.toFixed(6)) && Number.isInteger(+end.toFixed(6))
        ? `slots ${number(begin + 1)} to ${number(end)}` : `time ${number(begin)} to ${number(end)}`);
    const cells = times.rows.map((row, rank) => {
      const found = [];
      for (const one of row) {
        const { pass, begin, start, end, index } = one;
        if (start > begin + CLOSE) {
          found.push({ type: "gap", begin, end: start, index, said: why(game, times, rank, index) });
        }
        const own = stagesOf(game, rank);
        const where = own.length > 1 || numbered(game) ? ` on stage ${pass.stage}` : "";
        found.push({ type: "pass", begin: start, end, index, kind: pass.kind, look: LOOK[pass.kind],
          label: nameOf(game, pass),
          short: String(pass.batch), depth: depthOf(own, pass.stage),
          said: `${nameOf(game, pass)}, ${span(start, end)}: ${KINDS[pass.kind]} of micro-batch ${pass.batch}${where}` });
      }
      const free = times.clock[rank];
      const next = missing(game, rows, stagesOf(game, rank)) > 0;
      const said = next ? `Here goes the next pass of rank ${rank}`
        : !whole ? `All passes of rank ${rank} are placed; another rank's are not`
        : free < times.slots - CLOSE
          ? `Rank ${rank} has run all its passes, and waits ${slots(times.slots - free)} for rank ${last}, which ends last.`
          : `Rank ${rank} ends here, and no rank later`;
      found.push({ type: "end", index: row.length, begin: free, end: Math.max(free, times.slots), gap: whole, next, said });
      return found;
    });
    return { cells, times, whole, end: times.slots };
  }

  measured() {
    const { game } = this;
    const least = game.seconds * 1e-4;
    const lows = new Map();
    for (const { rank, stage } of game.spans) lows.set(rank, [...(lows.get(rank) ?? []), stage]);
    const cells = Array.from({ length: game.ranks }, () => []);
    for (const { rank, stage, batch, kind, name, look, label, begin, end, waiting } of game.spans) {
      const of = batch < 0 ? "" : ` of micro-batch ${batch}, stage ${stage}`;
      const [low, high] = [Math.min(...lows.get(rank)), Math.max(...lows.get(rank))];
      if (end - begin - waiting > least) {
        cells[rank].push({ type: "pass", begin: begin + waiting, end, kind, look, label, short: batch < 0 ? ""
          : String(batch), name,
          depth: depthOf([low, high], stage),
          said: `${name}${of}: ${slots(end - begin - waiting, game.unit)}, from ${number(begin + waiting)} to ${number(end)}` });
      }
    }
    for (const { rank, begin, end, words } of game.gaps) {
      if (end - begin > least) cells[rank].push({ type: "gap", begin, end, said: words });
    }
    for (const row of cells) {
      row.sort((one, other) => one.begin - other.begin || one.end - other.end);
      row.forEach((cell, index) => Object.assign(cell, { index }));
    }
    return { cells, whole: true, end: game.seconds };
  }

  /** Draw everything that depends on the rows, on the width of the page, or on where the reader is. */
  draw(focus = false) {
    const { game } = this;
    const had = focus || this.grid.contains(this.body.getRootNode().activeElement);
    const { cells, times, whole, end } = this.scene();
    this.cells = cells;
    this.end = end;
    const width = Math.max(this.scroll.clientWidth || 640, this.fixed ? 640 : 300);
    const labels = cells.flat().filter((each) => each.type === "pass");
    const longest = Math.max(2, ...labels.map((each) => each.label.length));
    const lengths = labels.map((each) => each.end - each.begin).filter((length) => length > CLOSE);
    const shortest = Math.min(1, ...lengths);
    const room = width - LABEL - 4;
    const least = (4 + longest * 8.3) / shortest;
    const shown = this.fixed ? end
      : Math.max(end + 1, (game.par ?? 0) + 1, 6, Math.floor(room / Math.max(least, WIDEST)));
    this.scale = this.fixed ? room / shown : Math.max(room / shown, least);
    const wide = LABEL + shown * this.scale + 4;
    const x = (time) => LABEL + time * this.scale;
    const high = HEAD + game.ranks * ROW + 2;
    this.size(this.grid, wide, high + (game.par ? FOOT : 0));
    this.grid.replaceChildren(this.textures(), this.axis(x, shown, high),
      ...cells.map((row, at) => this.drawRow(at, row, x, wide)));
    if (game.par !== null && game.par !== undefined) {
      this.grid.append(shape("line", { class: "pt-par", x1: x(game.par), x2: x(game.par), y1: HEAD - 3, y2: high }),
        shape("text", { class: "pt-soft", x: x(game.par), y: high + 11, "text-anchor": "middle",
          "aria-hidden": "true" }, "par"));
    }
    this.drawMemory(x, wide, end);
    this.slider.max = end;
    this.slider.step = this.fixed ? end / 200 : 1;
    if (this.time !== null && this.time > end) this.time = end;
    this.drawFacts(times, whole);
    if (!this.fixed) {
      this.drawPalette();
      this.field.value = this.text;
      this.undoer.setAttribute("aria-disabled", !this.past.length);
      this.redoer.setAttribute("aria-disabled", !this.future.length);
    } else if (!this.legend.children.length) {
      this.drawLegend(new Set(labels.map((each) => each.look)));
    }
    this.drawCursor();
    if (had) this.cells[this.at.rank][this.spot()]?.drawn.focus({ preventScroll: true });
  }

  size(svg, width, height) {
    fill(svg, { width, height, viewBox: `0 0 ${width} ${height}` }, []);
  }

  textures() {
    const made = Object.entries(this.game.looks).filter(([, look]) => look[1]).map(([name, [, hatch]]) =>
      shape("pattern", { id: this.texture(name), width: 6, height: 6, patternUnits: "userSpaceOnUse" },
        shape("path", { d: HATCHES[hatch[0]], stroke: hatch[0] === "." ? "none" : "#ffffff", fill: hatch[0] === "."
          ? "#7a7000" : "none" })));
    return shape("defs", {}, ...made);
  }

  texture(look) {
    return `${this.id}-${look.replace(/\W+/g, "-")}`;
  }

  axis(x, shown, high) {
    const { game } = this;
    const made = shape("g", { "aria-hidden": "true" });
    const round = 10 ** Math.floor(Math.log10(shown / 3 || 1));
    const step = !this.fixed ? 1 : shown / round > 12 ? 5 * round : round;
    for (let time = 0; time <= shown + CLOSE; time += step) {
      made.append(shape("line", { class: "pt-grid", x1: x(time), x2: x(time), y1: HEAD - 3, y2: high }));
      const label = this.fixed ? number(time) : String(time + 1);
      const skip = !this.fixed && this.scale < 18 && (time + 1) % 5;
      if ((this.fixed || time < shown - 0.5) && !skip) {
        made.append(shape("text", { class: "pt-soft", x: x(time + (this.fixed ? 0 : 0.5)), y: 14,
          "text-anchor": "middle" }, label));
      }
    }
    made.append(shape("text", { class: "pt-soft", x: 0, y: 14 }, this.fixed ? game.unit : "slot"));
    return made;
  }

  drawRow(rank, cells, x, wide) {
    const top = HEAD + rank * ROW;
    const row = shape("g", { role: "row", "data-rank": rank, "aria-label": `rank ${rank}`,
      "aria-selected": this.fixed ? null : rank === this.at.rank });
    row.append(shape("rect", { class: "pt-ground", x: LABEL, y: top + 3, width: wide - LABEL - 2, height: ROW - 6,
      rx: 4 }),
      shape("g", { role: "rowheader", class: this.fixed ? null : "pt-rank" },
        shape("rect", { x: 1, y: top + (ROW - BAR) / 2 + 1, width: LABEL - 9, height: BAR - 2, rx: 6, class: "pt-name" }),
        shape("text", { x: 1 + (LABEL - 9) / 2, y: top + ROW / 2 + 4.5, "text-anchor": "middle" }, `rank ${rank}`)));
    cells.forEach((cell, place) => {
      const here = rank === this.at.rank && place === this.spot();
      const drawn = shape("g", { class: `pt-cell ${cell.type === "pass" && !this.fixed ? "pt-pass" : ""}`,
        role: "gridcell", tabindex: here ? 0 : -1, "data-cell": `${rank},${place}`,
        "aria-label": cell.said });
      const left = x(cell.begin);
      const width = Math.max((cell.end - cell.begin) * this.scale, 1);
      const y = top + (ROW - BAR) / 2;
      const edge = { x: left + 1, y, width: Math.max(width - 2, 0.8), height: BAR, rx: 4 };
      if (cell.type === "pass") this.drawPass(drawn, cell, edge);
      else if (cell.type === "gap" || (cell.gap && cell.end > cell.begin + CLOSE)) {
        drawn.append(shape("rect", { ...edge, class: "pt-hit" }),
          shape("rect", { ...edge, y: top + ROW / 2 - 4, height: 8, class: "pt-gap" }));
      } else if (!cell.gap) {
        Object.assign(edge, { width: this.scale - 2 });
        drawn.append(shape("rect", { ...edge, class: "pt-hit" }));
        if (here && cell.next) drawn.append(shape("rect", { ...edge, class: "pt-next" }));
      } else {
        Object.assign(edge, { width: 4 });
      }
      drawn.append(shape("rect", { ...edge, class: "pt-ring" }));
      if (here && cell.type !== "end" && !this.fixed) {
        drawn.append(shape("line", { class: "pt-caret", x1: left, x2: left, y1: top + 2, y2: top + ROW - 2 }));
      }
      cell.drawn = drawn;
      row.append(drawn);
    });
    return row;
  }

  drawPass(drawn, cell, edge) {
    const [colour, hatch, share] = this.game.looks[cell.look];
    const { paint, ink } = shaded(colour, cell.depth);
    const height = BAR * share;
    const box = { ...edge, y: edge.y + (BAR - height) / 2, height, rx: Math.min(4, edge.width / 4) };
    drawn.append(shape("rect", { ...box, fill: paint }));
    if (hatch) drawn.append(shape("rect", { ...box, fill: `url(#${this.texture(cell.look)})` }));
    const fits = [cell.label, cell.short].find((words) => words && words.length * 7.6 + 3 < edge.width);
    if (fits && share === 1) {
      const middle = { x: edge.x + edge.width / 2, y: edge.y + BAR / 2 + 4.5, "text-anchor": "middle" };
      drawn.append(shape("text", { ...middle, style: `fill: ${ink}; font-weight: 600` }, fits));
    }
  }

  drawMemory(x, wide, end) {
    const { game, cells } = this;
    const steps = cells.map(heldOver);
    const peaks = steps.map((each) => Math.max(...each.map(([, held]) => held)));
    const most = Math.max(2, game.cap ?? 0, ...peaks);
    this.size(this.memory, wide, 20 + game.ranks * STRIP);
    const said = peaks.map((peak, rank) => `rank ${rank} ${peak}`).join(", ");
    const cap = game.cap ?? null;
    fill(this.memory, { "aria-label": `Micro-batches in flight, at most: ${said}${cap === null ? "" : `; allowed: ${cap}`}` }, []);
    const drawn = [shape("text", { class: "pt-soft", x: 0, y: 14 },
      `Micro-batches in flight; in bold, the most${cap === null ? "" : `, of ${cap} allowed`}`)];
    for (const [rank, each] of steps.entries()) {
      const floor = 20 + (rank + 1) * STRIP - 6;
      const unit = (STRIP - 10) / most;
      const line = each.map(([time, held], at) =>
        `${at ? "L" : "M"}${x(time)} ${floor - (each[at - 1]?.[1] ?? 0) * unit}L${x(time)} ${floor - held * unit}`);
      drawn.push(shape("path", { class: "pt-held",
        d: `${line.join("")}L${x(end)} ${floor - each.at(-1)[1] * unit}L${x(end)} ${floor}L${x(0)} ${floor}Z` }),
        shape("line", { class: "pt-grid", x1: LABEL, x2: wide - 2, y1: floor, y2: floor }),
        shape("text", { x: 0, y: floor - 4 }, `rank ${rank}`),
        shape("text", { x: LABEL - 6, y: floor - 4, "text-anchor": "end", "font-weight": 650 }, String(peaks[rank])));
      if (cap !== null) drawn.push(shape("line", { class: "pt-cap", x1: LABEL, x2: wide - 2, y1: floor - cap * unit,
        y2: floor - cap * unit }));
    }
    this.memory.replaceChildren(...drawn);
  }

  drawFacts(times, whole) {
    const { game } = this;
    const fact = (name, value) => element("span", {}, `${name}: `, element("b", {}, value));
    const facts = [];
    const share = (bubble) => `${number(bubble * 100)} %`;
    if (this.fixed) {
      facts.push(fact("step", slots(game.seconds, game.unit)), fact("bubble", share(game.bubble)));
    } else {
      const left = missing(game, this.rows);
      facts.push(fact("to place", left ? String(left) : "none"), fact("slots", number(times.slots)),
        fact("bubble", whole ? share(times.bubble) : "–"),
        fact("most in flight", String(Math.max(...times.peaks))));
      if (game.par !== null) facts.push(fact("par", slots(game.par)));
      if (game.cap !== null) facts.push(fact("in flight allowed", String(game.cap)));
    }
    this.facts.replaceChildren(...facts);
  }

  drawLegend(used) {
    for (const [name, [colour, hatch]] of Object.entries(this.game.looks)) {
      if (!used.has(name)) continue;
      const box = { x: 0.5, y: 0.5, width: 21, height: 13, rx: 3 };
      const sample = shape("svg", { width: 22, height: 14, "aria-hidden": "true" },
        shape("rect", { ...box, fill: colour }));
      if (hatch) sample.append(shape("rect", { ...box, fill: `url(#${this.texture(name)})` }));
      this.legend.append(element("span", {}, sample, name));
    }
  }

  drawPalette() {
    const { game, rows } = this;
    const { rank } = this.at;
    const index = this.index();
    const there = new Set(rows.flat().map(idOf));
    const focused = this.palette.contains(document.activeElement) ? document.activeElement?.dataset.pass : null;
    const stages = stagesOf(game, rank);
    this.palette.setAttribute("aria-label", `Passes of rank ${rank}`);
    const blocks = stages.map((stage) => element("div", {}, ...kindsOf(game).map((kind) => {
      const words = { F: "forward", B: "backward", I: "input half", W: "weight half" }[kind];
      const line = element("div", { role: "group", class: "pt-line", "aria-label": `${words}, stage ${stage}` },
        element("span", { "aria-hidden": "true" }, words));
      for (let batch = 0; batch < game.micro_batches; batch += 1) {
        const pass = { kind, stage, batch };
        const done = there.has(idOf(pass));
        const later = !done && problem(game, inserted(rows, rank, index, pass)) !== null;
        const name = nameOf(game, pass);
        const { paint, ink } = shaded(game.looks[LOOK[kind]][0], depthOf(stages, stage));
        line.append(element("button", { type: "button",
          class: `pt-chip ${done ? "pt-done" : later ? "pt-later" : ""}`, tabindex: -1,
          "data-pass": idOf(pass), "aria-label": `${name}${done ? ", placed" : later ? ", not yet" : ""}`,
          style: done || later ? null : `background: ${paint}; color: ${ink}`, onclick: () => this.insert(pass) },
        name));
      }
      return line;
    })));
    this.palette.replaceChildren(element("span", { "aria-hidden": "true" }, `Passes of rank ${rank}`), ...blocks);
    const chips = [...this.palette.querySelectorAll("button")];
    const ready = chips.find((chip) => chip.className === "pt-chip ");
    const here = chips.find((chip) => chip.dataset.pass === focused) ?? ready ?? chips[0];
    here.tabIndex = 0;
    if (focused) here.focus();
  }
}

/** Put a board into an element of a page. */
export function mount(root, game, options) {
  return new View(root, game, options);
}

/**
 * Put a board into each element of the page that has a game for one, instead of the figure that stands there, and
 * follow the page's link to those that it is for; the first board says so where it is for none.
 */
export function mountAll() {
  const views = [...document.querySelectorAll("[data-pipetutor-board]:not([data-mounted])")].map((root) => {
    root.dataset.mounted = "";
    return mount(root, JSON.parse(root.querySelector("script").textContent));
  });
  const first = views.find((view) => !view.fixed);
  const follow = () => {
    const followed = views.filter((view) => view.follow());
    if (followed.length || !first || !LINK.test(location.hash)) return;
    first.tell("The link is for a board that is not on this page.", "pt-refused");
    first.body.scrollIntoView({ block: "center" });
  };
  addEventListener("hashchange", follow);
  follow();
}

/** What anywidget calls in a notebook. */
export default {
  render({ model, el }) {
    const changed = (text) => {
      model.set("text", text);
      model.save_changes();
    };
    const view = mount(el, model.get("game"), { text: model.get("text"), link: false, changed });
    const listen = () => { // Python has given another text
      if (model.get("text") !== view.text) view.place(model.get("text"));
      if (model.get("text") !== view.text) changed(view.text); // which was refused
    };
    model.on("change:text", listen);
    return () => {
      model.off("change:text", listen);
      view.close();
    };
  },
};
