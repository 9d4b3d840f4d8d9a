// The live pictures: a cache map and a timeline of a recorded run, drawn on canvas, moved by one slider; and bars that
// follow the choice of a few controls.
//
// pack.py sends what each frame changes in the one before; `Recording` builds the frames anew. A part (`CacheMap`,
// `Requests`, `Timeline`) draws one frame on one canvas. `Player` holds the slider, the keys and the parts.
// explorer.py sends the bars of every combination; `Explorer` shows one of them.
// In a notebook anywidget calls the default export; an exported page calls `mount`.

const LETTERS = "system-ui, sans-serif";
const CODE = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace";
const px = (size) => `${size}px ${LETTERS}`;
const bold = (size) => `bold ${px(size)}`;
const UNTOUCHED = Object.freeze({ owners: [], filled: 0, hash: null });
const FINISHED = new Set(["finished", "aborted"]);
const SPEEDS = [1, 2, 5, 10, 30]; // steps a second

// -- The frames -------------------------------------------------------------------------------------------------------

class Recording {
  /** What `pack` made. */
  constructor({ num_blocks, block_size, budget, colours, frames }) {
    this.numBlocks = num_blocks;
    this.blockSize = block_size;
    this.budget = budget;
    this.colours = colours.map(([background, ink]) => ({ background, ink }));
    this.texts = new Map(); // the tokens of each request
    this.frames = [];
    this.append({ at: 0, frames });
  }

  /** Add the frames that come after frame `at - 1`, in place of any that are there already. */
  append({ at, frames }) {
    this.frames.length = at;
    for (const changes of frames) this.frames.push(this.next(this.frames.at(-1), changes));
    this.lanes = assignLanes(this.frames);
    this.runs = findRuns(this.frames);
  }

  next(before, changes) {
    const blocks = before ? before.blocks.slice() : Array(this.numBlocks).fill(UNTOUCHED);
    for (const { block, ...state } of rows(changes.blocks)) blocks[block] = state;
    const requests = new Map(before?.requests);
    for (const { texts, ...request } of rows(changes.requests)) {
      const old = requests.get(request.id);
      const known = this.texts.get(request.id) ?? [];
      this.texts.set(request.id, [...known.slice(0, old?.tokens ?? 0), ...texts]);
      requests.set(request.id, { ...request, table: request.table ?? old.table });
    }
    let free = before?.free ?? [];
    if (changes.free) {
      const [front, back] = changes.free;
      const moved = new Set([...front, ...back]);
      free = [...front, ...free.filter((id) => !blocks[id].owners.length && !moved.has(id)), ...back];
    }
    const { title, sentence, tokens, changed } = changes;
    return { title, sentence, tokens, changed: new Set(changed), blocks, requests, free };
  }

  colour(name) {
    return this.colours[(name.charCodeAt(0) - 65) % this.colours.length];
  }

  /** The texts of the tokens in a block, as of frame `index`; of a kept block, from when it was last held. */
  tokensOf(id, index) {
    const { hash, filled } = this.frames[index].blocks[id];
    for (let i = index; i >= 0; i--) {
      const block = this.frames[i].blocks[id];
      if (block.owners.length && (i === index || block.hash === hash)) {
        const request = this.frames[i].requests.get(block.owners[0]);
        const first = request.table.indexOf(id) * this.blockSize;
        return this.texts.get(request.id).slice(first, first + filled);
      }
    }
    return [];
  }

  /** Frame `index` as plain data, for a test to compare. */
  snapshot(index) {
    const { title, sentence, tokens, changed, blocks, requests, free } = this.frames[index];
    const texts = ({ id, tokens }) => this.texts.get(id).slice(0, tokens);
    return {
      title, sentence, tokens, free, blocks,
      changed: [...changed],
      requests: [...requests.values()].map((request) => ({ ...request, texts: texts(request) })),
    };
  }
}

/** The rows of a table that came as one list for each column. */
function rows(columns) {
  const names = Object.keys(columns);
  return columns[names[0]].map((_, i) => Object.fromEntries(names.map((name) => [name, columns[name][i]])));
}

/** A row of the timeline for each request. Of many requests, those that are never there together share rows. */
function assignLanes(frames) {
  const lanes = new Map();
  const share = frames.at(-1).requests.size > 24;
  let busy = []; // the request in each lane
  for (const { requests } of frames) {
    if (share) busy = busy.map((id) => (id !== null && FINISHED.has(requests.get(id)?.status) ? null : id));
    for (const id of requests.keys()) {
      if (lanes.has(id)) continue;
      const empty = busy.indexOf(null);
      lanes.set(id, empty < 0 ? busy.length : empty);
      busy[lanes.get(id)] = id;
    }
  }
  return { of: lanes, count: busy.length };
}

/** What each request did, in stretches of steps with the same: {id, name, kind, first, last, tokens, hit, end}. */
function findRuns(frames) {
  const runs = [];
  const open = new Map(); // each request's latest stretch
  for (let i = 1; i < frames.length; i++) {
    for (const request of frames[i].requests.values()) {
      const before = frames[i - 1].requests.get(request.id);
      if (FINISHED.has(before?.status)) continue;
      const kind = request.did || (["waiting", "preempted"].includes(request.status) ? "wait" : "idle");
      const end = FINISHED.has(request.status) ? request.status : null;
      const latest = open.get(request.id);
      if (latest?.kind === kind && ["decode", "wait", "idle"].includes(kind)) {
        Object.assign(latest, { last: i, end });
      } else {
        const { id, name, new: tokens, hit } = request;
        const run = { id, name, kind, first: i, last: i, tokens, hit, end };
        open.set(id, run);
        runs.push(run);
      }
    }
  }
  return runs;
}

// -- Drawing ----------------------------------------------------------------------------------------------------------

/** A canvas of `width` by `height` CSS pixels, sharp on any screen, ready to be drawn on. */
function prepare(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) {
    [canvas.width, canvas.height] = [w, h];
    [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.textBaseline = "middle";
  return context;
}

/** Write `text`; what is wider than `width` is cut off, what is wider than `squeeze` is set narrower. */
function write(context, text, x, y, { colour, font, align = "left", width, squeeze }) {
  context.fillStyle = colour;
  context.font = font;
  context.textAlign = align;
  context.fillText(width === undefined ? text : shortened(context, text, width), x, y, squeeze);
}

function shortened(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  while (text && context.measureText(`${text}…`).width > width) text = text.slice(0, -1);
  return `${text}…`;
}

/** Thin slanted lines: the sign, besides a colour, of what is kept, or was found in the cache. */
function hatch(context, x, y, width, height, colour) {
  if (!patterns.has(colour)) patterns.set(colour, slanted(context, colour));
  context.fillStyle = patterns.get(colour);
  context.fillRect(x, y, width, height);
}

const patterns = new Map();

function slanted(context, colour, gap = 4) {
  const ratio = window.devicePixelRatio || 1;
  const tile = document.createElement("canvas");
  tile.width = tile.height = gap * ratio;
  const pen = tile.getContext("2d");
  pen.scale(ratio, ratio);
  pen.strokeStyle = colour;
  for (const x of [-gap, 0, gap]) pen.stroke(new Path2D(`M${x - 1} ${gap + 1} l${gap + 2} ${-gap - 2}`));
  const pattern = context.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / ratio));
  return pattern;
}

/** A request's letter on its colour. */
function badge(context, name, { background, ink }, x, y, width, height) {
  context.fillStyle = background;
  context.beginPath();
  context.roundRect(x, y, width, height, 3);
  context.fill();
  const font = bold(Math.min(12, height - 3));
  write(context, name, x + width / 2, y + height / 2 + 0.5, { colour: ink, font, align: "center" });
}

/** A part of a picture: a canvas, and what lies on it where. */
class Part {
  constructor(player) {
    this.player = player;
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("aria-hidden", "true"); // the sentence and the detail say it in words
    this.element = this.canvas;
  }

  get recording() {
    return this.player.recording;
  }

  /** Where a mouse event was, in CSS pixels from the canvas's corner. */
  position(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }
}

// -- The cache map ----------------------------------------------------------------------------------------------------

const LARGE = [84, 80]; // a block with its slots, its id below
const SQUARES = [44, 36, 30, 26, 22, 20, 18, 16, 13, 11, 9, 7, 6, 5, 4, 3, 2];
const WITH_PLACE = 30; // from this size on a kept block says its place in the queue
const MAP_HEIGHT = 460;
const ID_WIDTH = 34; // left of small blocks: the id of the row's first

class CacheMap extends Part {
  constructor(player) {
    super(player);
    this.canvas.addEventListener("mousemove", (event) => {
      player.pointAt({ block: this.blockAt(...this.position(event)) });
    });
    this.canvas.addEventListener("mouseleave", () => player.pointAt({}));
  }

  layout(width) {
    const { numBlocks } = this.recording;
    const columns = (size, room, step) => {
      const most = Math.max(1, Math.floor(room / size));
      return Math.min(most < step ? most : most - (most % step), numBlocks); // rows of 4, 8, 16 … are easy to count
    };
    const fits = (count, height) => Math.ceil(numBlocks / count) * height <= MAP_HEIGHT;
    this.columns = columns(LARGE[0], width - 3, 4);
    this.large = fits(this.columns, LARGE[1]);
    this.left = this.large ? 3 : ID_WIDTH;
    const room = width - this.left;
    if (this.large) {
      this.cell = [Math.min(140, Math.floor(room / this.columns)), LARGE[1]];
    } else {
      const size = SQUARES.find((s) => fits(columns(s, room, 8), s)) ?? SQUARES.at(-1);
      this.columns = columns(size, room, 8);
      this.cell = [size, size];
    }
    this.width = width;
    this.height = Math.ceil(numBlocks / this.columns) * this.cell[1] + 4;
  }

  corner(id) {
    const [w, h] = this.cell;
    return [this.left + (id % this.columns) * w + 1, Math.floor(id / this.columns) * h + 2];
  }

  blockAt(x, y) {
    const [column, row] = [Math.floor((x - this.left) / this.cell[0]), Math.floor((y - 2) / this.cell[1])];
    const id = row * this.columns + column;
    return column >= 0 && column < this.columns && row >= 0 && id < this.recording.numBlocks ? id : undefined;
  }

  draw(index, theme) {
    const frame = this.recording.frames[index];
    const before = this.recording.frames[index - 1]?.blocks;
    const path = frame.requests.get(this.player.lit)?.table ?? [];
    const onPath = new Set(path);
    const place = new Map(frame.free.map((id, i) => [id, i + 1]));
    // Small blocks that look as in the last drawing stay as they are, unless something is lit or pointed at.
    const { block: pointed } = this.player.pointed;
    const isPlain = this.cell[0] < WITH_PLACE && !path.length && pointed === undefined;
    const look = JSON.stringify([theme, this.width, this.height, this.cell, window.devicePixelRatio]);
    const drawn = isPlain && this.drawn?.look === look ? this.drawn.frame : null;
    this.drawn = isPlain ? { look, frame } : null;
    const context = drawn ? this.canvas.getContext("2d") : prepare(this.canvas, this.width, this.height);
    frame.blocks.forEach((block, id) => {
      if (drawn?.blocks[id] === block && !frame.changed.has(id) && !drawn.changed.has(id)) return;
      const [x, y] = this.corner(id);
      const scene = { context, theme, frame, x, y, place: place.get(id), changed: frame.changed.has(id) };
      context.globalAlpha = path.length && !onPath.has(id) ? 0.25 : 1;
      if (this.large) this.drawLarge(scene, block, id, before?.[id]);
      else this.drawSquare(scene, block);
    });
    context.globalAlpha = 1;
    if (drawn) return;
    if (!this.large) this.drawIds(context, theme);
    this.drawPath(context, theme, path);
    if (pointed !== undefined) this.outline(context, pointed, theme.accent, 2);
  }

  owners(frame, block) {
    return block.owners.map((id) => {
      const { name } = frame.requests.get(id);
      return { name, ...this.recording.colour(name) };
    });
  }

  /** A block with a head, which says whose it is, and a slot for each token. */
  drawLarge({ context, theme, frame, x, y, place, changed }, block, id, before) {
    const [w, h, head] = [this.cell[0] - 8, this.cell[1] - 20, 18];
    const owners = this.owners(frame, block);
    const kept = !owners.length && block.hash !== null;
    context.fillStyle = theme.empty;
    if (owners.length || kept) context.fillRect(x, y, w, h);
    if (owners.length) {
      const room = owners.length > 1 ? w - 26 : w;
      const shown = owners.slice(0, 3);
      shown.forEach((owner, i) => {
        context.fillStyle = owner.background;
        context.fillRect(x + (i * room) / shown.length, y, room / shown.length, head);
        const middle = x + ((i + 0.5) * room) / shown.length;
        write(context, owner.name, middle, y + 9.5, { colour: owner.ink, font: bold(13), align: "center" });
      });
      if (owners.length > 1) {
        write(context, `×${owners.length}`, x + w - 13, y + 9.5, {
          colour: theme.ink, font: bold(13), align: "center",
        });
      }
    } else {
      write(context, kept ? "kept" : "free", x + 6, y + 9.5, { colour: theme.quiet, font: px(12) });
      write(context, `#${place}`, x + w - 5, y + 9.5, { colour: theme.quiet, font: px(12), align: "right" });
    }
    const hasSame = before?.owners[0] === block.owners[0] || (block.hash !== null && before?.hash === block.hash);
    const filledBefore = !changed ? block.filled : hasSame ? (before?.filled ?? 0) : 0;
    this.drawSlots({ context, theme, x, y: y + head, w, h: h - head }, owners, block.filled, filledBefore);
    context.strokeStyle = changed ? theme.ink : theme.line;
    context.lineWidth = changed ? 2.5 : 1;
    context.setLineDash(owners.length || kept ? [] : [4, 3]);
    context.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
    context.setLineDash([]);
    if (changed) {
      context.fillStyle = theme.ink;
      context.fill(new Path2D(`M${x + w} ${y + h} h-11 l11 -11 z`));
    }
    const style = changed ? { colour: theme.ink, font: bold(11) } : { colour: theme.quiet, font: px(11) };
    write(context, String(id), x + w / 2, y + h + 8, { ...style, align: "center" });
  }

  /** Slots that hold a token have its owners' colours; a dot marks those that this step filled. */
  drawSlots({ context, theme, x, y, w, h }, owners, filled, filledBefore) {
    const size = this.recording.blockSize;
    const numRows = Math.ceil(size / 8);
    const numColumns = Math.ceil(size / numRows);
    const [sw, sh] = [(w - 4) / numColumns, (h - 4) / numRows];
    const gap = sw > 4 && sh > 4 ? 1 : 0;
    const band = (sh - 2 * gap) / Math.max(1, owners.length);
    for (let i = 0; i < size; i++) {
      const [sx, sy] = [x + 2 + (i % numColumns) * sw, y + 2 + Math.floor(i / numColumns) * sh];
      if (i >= filled) {
        if (owners.length && gap) {
          context.fillStyle = theme.page;
          context.fillRect(sx + gap, sy + gap, sw - 2 * gap, sh - 2 * gap);
        }
      } else if (owners.length) {
        owners.forEach((owner, k) => {
          context.fillStyle = owner.background;
          context.fillRect(sx + gap, sy + gap + k * band, sw - 2 * gap, band);
        });
        if (i >= filledBefore && gap) {
          context.fillStyle = owners[0].ink;
          context.beginPath();
          context.arc(sx + sw / 2, sy + sh / 2, Math.min(2.2, sw / 4), 0, 7);
          context.fill();
        }
      } else {
        hatch(context, sx + gap, sy + gap, sw - 2 * gap, sh - 2 * gap, theme.quiet);
      }
    }
  }

  /** A block among many: a colour, how full it is, and a letter while there is room for one. */
  drawSquare({ context, theme, frame, x, y, place, changed }, block) {
    const s = this.cell[0] - (this.cell[0] > 8 ? 2 : this.cell[0] > 4 ? 1 : 0);
    const owners = this.owners(frame, block);
    context.fillStyle = theme.empty;
    context.fillRect(x, y, s, s);
    const full = Math.max(1, Math.round((s * block.filled) / this.recording.blockSize));
    owners.slice(0, 4).forEach((owner, i, shown) => {
      context.fillStyle = owner.background;
      context.fillRect(x + (i * s) / shown.length, y + s - full, s / shown.length, full);
    });
    if (!owners.length && block.hash !== null) {
      if (s < 8) {
        context.fillStyle = theme.quiet;
        context.fillRect(x + s / 3, y + s / 3, s / 3, s / 3);
      } else {
        hatch(context, x, y, s, s, theme.quiet);
      }
      if (this.cell[0] >= WITH_PLACE) {
        context.fillStyle = theme.empty;
        context.fillRect(x + 3, y + s / 2 - 6, s - 6, 12);
        write(context, `#${place}`, x + s / 2, y + s / 2, { colour: theme.quiet, font: px(9), align: "center" });
      }
    }
    if (owners.length && s >= 14) {
      const text = owners.length > 1 ? `×${owners.length}` : owners[0].name;
      const font = bold(text.length > 2 ? 8 : s < 18 || text.length > 1 ? 9 : 11);
      const isOnColour = owners.length === 1 && full >= s / 2 + 5;
      const colour = isOnColour ? owners[0].ink : theme.ink;
      context.fillStyle = theme.page;
      if (!isOnColour) context.fillRect(x + 1, y + s / 2 - 5, s - 2, 10);
      write(context, text, x + s / 2, y + s / 2 + 0.5, { colour, font, align: "center", squeeze: s - 3 });
    }
    if (changed) {
      const line = s < 8 ? 1 : 2;
      context.strokeStyle = theme.ink;
      context.lineWidth = line;
      context.strokeRect(x + line / 2, y + line / 2, s - line, s - line);
    }
  }

  drawIds(context, theme) {
    const every = Math.ceil(12 / this.cell[1]);
    for (let row = 0; row * this.columns < this.recording.numBlocks; row += every) {
      const [, y] = this.corner(row * this.columns);
      const style = { colour: theme.quiet, font: px(10), align: "right" };
      write(context, String(row * this.columns), ID_WIDTH - 5, y + this.cell[1] / 2, style);
    }
  }

  /** The way from a request's logical blocks, in their order, to the physical ones. */
  drawPath(context, theme, path) {
    const [w, h] = this.large ? [this.cell[0] - 8, this.cell[1] - 20] : [this.cell[0] - 2, this.cell[1] - 2];
    const points = path.map((id) => this.corner(id)).map(([x, y]) => [x + w / 2, y + h / 2]);
    for (const [colour, width] of [[theme.page, 5], [theme.ink, 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.lineJoin = "round";
      context.beginPath();
      points.forEach(([x, y]) => context.lineTo(x, y));
      context.stroke();
    }
    path.forEach((id) => this.outline(context, id, theme.ink, this.cell[0] > 8 ? 2 : 1));
    if (w < 26) return;
    points.forEach(([x, y], i) => {
      const radius = this.large ? 10 : 7;
      context.fillStyle = theme.ink;
      context.beginPath();
      context.arc(x, y, radius, 0, 7);
      context.fill();
      write(context, String(i), x, y + 0.5, { colour: theme.page, font: bold(radius + 1), align: "center" });
    });
  }

  outline(context, id, colour, width) {
    const [x, y] = this.corner(id);
    const [w, h] = this.large ? [this.cell[0] - 8, this.cell[1] - 20] : [this.cell[0] - 2, this.cell[1] - 2];
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.strokeRect(x - 1, y - 1, w + 2, h + 2);
  }
}

// -- The requests -----------------------------------------------------------------------------------------------------

const MAX_BOXES = 48; // so many logical blocks are shown with their text; of more, only the block tables
const MAX_ROWS = 400; // and so many requests have a row; of more, the number
const LINE = 13;
const ROW = 20;
const ID_BOX = 27;
const TOKEN = `10.5px ${CODE}`;

class Requests extends Part {
  constructor(player) {
    super(player);
    this.element = document.createElement("div");
    this.element.className = "nanovllm-scroll";
    this.element.tabIndex = -1;
    this.element.append(this.canvas);
    this.element.addEventListener("scroll", () => player.redraw());
    this.canvas.addEventListener("mousemove", (event) => {
      player.pointAt({ request: this.requestAt(this.position(event)[1]) });
    });
    this.canvas.addEventListener("mouseleave", () => player.pointAt({}));
    this.canvas.addEventListener("click", (event) => player.choose(this.requestAt(this.position(event)[1])));
  }

  layout(width) {
    const { frames, blockSize } = this.recording;
    this.width = width;
    const requests = [...frames.at(-1).requests.values()];
    const boxes = requests.map(({ tokens }) => Math.ceil(tokens / blockSize));
    this.detailed = requests.length <= 8 && boxes.reduce((a, b) => a + b, 0) <= MAX_BOXES;
    this.slots = new Map();
    if (this.detailed) {
      this.perRow = Math.max(1, Math.min(4, Math.floor((width - 4) / 126)));
      this.boxWidth = Math.min(190, Math.floor((width - 4) / this.perRow) - 6);
      this.places = new Map(requests.map(({ id }) => [id, this.placeTokens(this.recording.texts.get(id))]));
      this.boxHeight = (1 + Math.max(0, ...[...this.places.values()].flat().map(({ line }) => line))) * LINE + 6;
      this.height = 0;
      requests.forEach(({ id }, i) => {
        const height = 24 + Math.ceil(boxes[i] / this.perRow) * (this.boxHeight + 18) + 6;
        this.slots.set(id, { y: this.height, height });
        this.height += height;
      });
    } else {
      const most = Math.max(...frames.map((frame) => this.present(frame).length));
      this.height = (Math.min(most, MAX_ROWS) + 2) * ROW;
    }
    this.height = Math.max(this.height, 24);
  }

  /** Those that are not done. */
  present(frame) {
    return [...frame.requests.values()].filter(({ status }) => !FINISHED.has(status));
  }

  requestAt(y) {
    for (const [id, slot] of this.slots) if (y >= slot.y && y < slot.y + slot.height) return id;
    return undefined;
  }

  draw(index, theme) {
    const context = prepare(this.canvas, this.width, this.height);
    const frame = this.recording.frames[index];
    if (this.detailed) {
      for (const request of frame.requests.values()) this.drawDetailed(context, theme, request);
      return;
    }
    this.slots.clear();
    const present = this.present(frame);
    const style = { colour: theme.quiet, font: px(11) };
    write(context, "cached / tokens", 154, ROW / 2, { ...style, align: "right" });
    write(context, "block table", 164, ROW / 2, style);
    const shown = present.slice(0, MAX_ROWS);
    const [top, bottom] = [this.element.scrollTop - ROW, this.element.scrollTop + this.element.clientHeight];
    shown.forEach((request, i) => {
      const y = (i + 1) * ROW;
      this.slots.set(request.id, { y, height: ROW });
      if (y > top && y < bottom) this.drawRow(context, theme, request, y); // the others are scrolled out of sight
    });
    const rest = [`${frame.requests.size - present.length} finished`];
    if (shown.length < present.length) rest.unshift(`${present.length - shown.length} more`);
    write(context, rest.join(", "), 5, (shown.length + 1.5) * ROW, style);
  }

  drawHead(context, theme, { id, name, status, computed, tokens, new: fresh, hit }, y) {
    if (this.player.lit === id) {
      context.fillStyle = theme.empty;
      context.fillRect(0, y, this.width, this.slots.get(id).height - (this.detailed ? 6 : 0));
      context.fillStyle = theme.ink;
      context.fillRect(0, y, 3, this.slots.get(id).height - (this.detailed ? 6 : 0));
    }
    badge(context, name, this.recording.colour(name), 5, y + 2, 26, 16);
    const quiet = FINISHED.has(status) || status === "waiting";
    write(context, status, 37, y + 10.5, {
      colour: quiet ? theme.quiet : theme.ink,
      font: status === "preempted" ? bold(12) : px(12),
    });
    if (!this.detailed) return;
    const now = [hit && `${hit} found`, fresh && `${fresh} computed now`].filter(Boolean).join(", ");
    const cached = `${computed} of ${tokens} tokens cached${now && ` (${now})`}`;
    const text = FINISHED.has(status) ? `${tokens} tokens` : cached;
    write(context, text, 118, y + 10.5, { colour: theme.quiet, font: px(12), width: this.width - 120 });
  }

  /** A request as its logical blocks, with the tokens in them, each above the physical block that holds it. */
  drawDetailed(context, theme, request) {
    const { y } = this.slots.get(request.id);
    const { blockSize } = this.recording;
    this.drawHead(context, theme, request, y);
    const places = this.places.get(request.id);
    for (let i = 0; i * blockSize < request.tokens; i++) {
      const x = 6 + (i % this.perRow) * (this.boxWidth + 6);
      const top = y + 24 + Math.floor(i / this.perRow) * (this.boxHeight + 18);
      const end = Math.min((i + 1) * blockSize, request.tokens);
      for (let k = i * blockSize; k < end; k++) this.drawToken(context, theme, request, k, places[k], x, top);
      const block = request.table[i];
      context.strokeStyle = block === undefined ? theme.line : theme.quiet;
      context.lineWidth = 1;
      context.setLineDash(block === undefined ? [3, 3] : []);
      context.strokeRect(x + 0.5, top + 0.5, this.boxWidth - 1, this.boxHeight - 1);
      context.setLineDash([]);
      const label = block === undefined ? `${i}` : `${i} → block ${block}`;
      write(context, label, x + 2, top + this.boxHeight + 8, { colour: theme.quiet, font: px(11) });
    }
  }

  /** Where each token stands in its logical block: {text, x, line, width}. A line that is full goes on below. */
  placeTokens(texts) {
    const context = this.canvas.getContext("2d");
    const room = this.boxWidth - 8;
    context.font = TOKEN;
    let [x, line] = [0, 0];
    return texts.map((text, i) => {
      const shown = shortened(context, printable(text), room);
      const width = context.measureText(shown).width;
      if (i % this.recording.blockSize === 0) [x, line] = [0, 0];
      else if (x + width > room) [x, line] = [0, line + 1];
      x += width;
      return { text: shown, x: x - width, line, width };
    });
  }

  /** A token: tinted if the cache holds its keys and values; strongly, and underlined, if this step computed them. */
  drawToken(context, theme, request, position, { text, x, line, width }, left, top) {
    const isComputed = position < request.computed && !FINISHED.has(request.status);
    const isNew = isComputed && position >= request.computed - request.new;
    const [tx, y] = [left + 4 + x, top + 3 + line * LINE];
    if (isComputed) {
      context.globalAlpha = isNew ? 0.55 : 0.22;
      context.fillStyle = this.recording.colour(request.name).background;
      context.fillRect(tx, y, width - 0.8, LINE - 1);
      context.globalAlpha = 1;
    }
    if (isNew) {
      context.fillStyle = theme.ink;
      context.fillRect(tx, y + LINE - 2, width - 0.8, 1);
    }
    write(context, text, tx, y + LINE / 2, { colour: isComputed ? theme.ink : theme.quiet, font: TOKEN });
  }

  /** A request as one line: its letter, what it does, its block table. */
  drawRow(context, theme, request, y) {
    this.drawHead(context, theme, request, y);
    const style = { colour: theme.quiet, font: px(11) };
    write(context, `${request.computed}/${request.tokens}`, 154, y + 10.5, { ...style, align: "right" });
    const { table } = request;
    const room = Math.floor((this.width - 166) / ID_BOX);
    const shown = table.length > room ? table.slice(0, room - 1) : table;
    shown.forEach((block, i) => {
      const x = 164 + i * ID_BOX;
      context.fillStyle = theme.empty;
      context.fillRect(x, y + 3, ID_BOX - 2, 15);
      write(context, String(block), x + ID_BOX / 2 - 1, y + 10.5, { colour: theme.ink, font: px(10), align: "center" });
    });
    const rest = table.length - shown.length;
    if (rest) write(context, `+${rest}`, 164 + shown.length * ID_BOX, y + 10.5, style);
  }

  /** Scroll to the request that the keys have chosen. */
  reveal(id) {
    const slot = this.slots.get(id);
    if (!slot) return;
    const lowest = slot.y + slot.height - this.element.clientHeight; // of the positions in which all of it is seen
    this.element.scrollTop = Math.min(slot.y, Math.max(lowest, this.element.scrollTop));
  }
}

function printable(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥");
}

// -- The timeline -----------------------------------------------------------------------------------------------------

const NAMES = 46; // left of the steps
const AXIS = 20;
const BUDGET = 44;
const NARROWEST = 5; // a step is at least so wide; of more steps than fit, those around the current one are shown

class Timeline extends Part {
  constructor(player) {
    super(player);
    this.canvas.style.cursor = "pointer";
    this.canvas.addEventListener("click", (event) => {
      const index = this.stepAt(this.position(event)[0]);
      if (index !== undefined) player.goTo(index);
    });
    this.canvas.addEventListener("mousemove", (event) => {
      const [x, y] = this.position(event);
      const step = this.stepAt(x);
      player.pointAt({ step, request: step === undefined ? undefined : this.requestAt(step, y) });
    });
    this.canvas.addEventListener("mouseleave", () => player.pointAt({}));
  }

  layout(width) {
    const { lanes, frames } = this.recording;
    this.width = width;
    const heights = [[12, 24], [32, 17], [70, 11], [130, 6], [Infinity, 3]]; // up to so many rows are so high
    this.rowHeight = heights.find(([most]) => lanes.count <= most)[1];
    const room = width - NAMES - 8;
    const count = Math.max(1, frames.length - 1);
    this.column = Math.max(NARROWEST, Math.min(44, room / count));
    this.visible = Math.min(count, Math.floor(room / this.column + 1e-6));
    this.bottom = AXIS + lanes.count * this.rowHeight + 6;
    this.height = this.bottom + BUDGET + 18;
  }

  /** The first step that is shown when frame `index` is. */
  start(index) {
    const count = this.recording.frames.length - 1;
    return Math.max(1, Math.min(index - Math.floor(this.visible / 2), count - this.visible + 1));
  }

  stepAt(x) {
    const index = this.start(this.player.index) + Math.floor((x - NAMES) / this.column);
    const isThere = x >= NAMES && index < this.recording.frames.length && x < NAMES + this.visible * this.column;
    return isThere ? index : undefined;
  }

  requestAt(step, y) {
    const lane = Math.floor((y - AXIS) / this.rowHeight);
    const { lanes, frames } = this.recording;
    const there = [...frames[step].requests.values()].filter(({ id }) => lanes.of.get(id) === lane);
    return there.at(-1)?.id;
  }

  draw(index, theme) {
    const context = prepare(this.canvas, this.width, this.height);
    const start = this.start(index);
    const end = Math.min(start + this.visible, this.recording.frames.length);
    const x = (step) => NAMES + (step - start) * this.column;
    const scene = { context, theme, start, end, x, index };
    if (index >= start && index < end) {
      context.fillStyle = theme.empty;
      context.fillRect(x(index), AXIS, this.column, this.height - AXIS);
    }
    this.drawAxis(scene);
    this.drawNames(scene);
    for (const run of this.recording.runs) if (run.last >= start && run.first < end) this.drawRun(scene, run);
    this.drawBudget(scene);
    if (index >= start && index < end) {
      context.strokeStyle = theme.ink;
      context.lineWidth = 1.5;
      context.strokeRect(x(index), AXIS, Math.max(3, this.column), this.height - AXIS - 2);
    }
  }

  drawAxis({ context, theme, start, end, x, index }) {
    const now = { background: theme.ink, ink: theme.page };
    const every = [1, 2, 5, 10, 20, 50, 100].find((n) => n * this.column >= 30) ?? 200;
    write(context, "step", NAMES - 6, 10, { colour: theme.quiet, font: px(11), align: "right" });
    for (let step = start; step < end; step++) {
      if ((step - 1) % every && step !== index) continue;
      if (step !== index && Math.abs(step - index) * this.column < 30) continue;
      const middle = x(step) + this.column / 2;
      if (step === index) badge(context, String(step - 1), now, middle - 15, 2, 30, 16);
      else write(context, String(step - 1), middle, 10, { colour: theme.quiet, font: px(11), align: "center" });
    }
    context.strokeStyle = theme.line;
    context.lineWidth = 0.5;
    context.beginPath();
    const lines = this.column >= 12 ? 1 : every;
    for (let step = start; step < end; step++) {
      if ((step - 1) % lines) continue;
      context.moveTo(x(step), AXIS);
      context.lineTo(x(step), this.bottom + BUDGET);
    }
    context.stroke();
  }

  /** The letter of who is in each row at the current step, or else of who was there last. */
  drawNames({ context, theme, index }) {
    const { lanes, frames, colour } = this.recording;
    const height = Math.min(16, this.rowHeight - 1);
    const latest = new Map();
    const requests = this.rowHeight < 9 ? [] : frames[index].requests.values();
    const everyone = lanes.count === frames.at(-1).requests.size ? frames.at(-1).requests.values() : requests;
    for (const request of everyone) latest.set(lanes.of.get(request.id), request);
    for (const [lane, { id, name }] of latest) {
      const y = AXIS + lane * this.rowHeight;
      if (this.player.lit === id) {
        context.fillStyle = theme.empty;
        context.fillRect(0, y, this.width, this.rowHeight);
      }
      badge(context, name, colour.call(this.recording, name), 8, y + (this.rowHeight - height) / 2, 28, height);
    }
  }

  drawRun({ context, theme, start, end, x }, { id, name, kind, first, last, tokens, hit, end: ending }) {
    const colour = this.recording.colour(name);
    const h = this.rowHeight;
    const y = AXIS + this.recording.lanes.of.get(id) * h;
    const [left, right] = [x(Math.max(first, start)), x(Math.min(last + 1, end))];
    const gap = this.column >= 8 ? 1 : 0;
    const middle = y + h / 2;
    if (kind === "prefill") {
      const [top, height] = [y + h * 0.08, h * 0.84];
      context.fillStyle = colour.background;
      context.fillRect(left + gap, top, right - left - 2 * gap, height);
      if (hit) {
        context.fillStyle = theme.page;
        context.fillRect(left + gap, top, right - left - 2 * gap, height * 0.3);
        hatch(context, left + gap, top, right - left - 2 * gap, height * 0.3, theme.ink);
      }
      context.font = bold(10);
      const room = right - left - 3;
      const text = [hit ? `H${tokens}` : "", String(tokens)].find((t) => t && context.measureText(t).width < room);
      if (h >= 14 && text) {
        const style = { colour: colour.ink, font: bold(10), align: "center" };
        write(context, text, (left + right) / 2, top + height * (hit ? 0.68 : 0.52), style);
      }
    } else if (kind === "decode") {
      context.fillStyle = colour.background;
      context.fillRect(left + gap, middle - h * 0.18, right - left - 2 * gap, h * 0.36);
      context.fillStyle = theme.page;
      if (this.column >= 8) {
        for (let step = Math.max(first, start) + 1; step <= last && step < end; step++) {
          context.fillRect(x(step) - 1, middle - h * 0.18, 2, h * 0.36);
        }
      }
    } else if (kind === "preempted") {
      const r = Math.min(h * 0.25, this.column * 0.45, 5);
      const cx = (left + right) / 2;
      context.strokeStyle = theme.ink;
      context.lineWidth = h < 14 ? 1.5 : 2;
      context.stroke(new Path2D(`M${cx - r} ${middle - r} l${2 * r} ${2 * r} m0 ${-2 * r} l${-2 * r} ${2 * r}`));
    } else if (kind === "failed") {
      const style = { colour: theme.ink, font: bold(Math.min(13, h)), align: "center" };
      write(context, "!", (left + right) / 2, middle, style);
    } else {
      context.strokeStyle = kind === "idle" ? colour.background : theme.quiet;
      context.lineWidth = 1.2;
      context.setLineDash(kind === "idle" ? [] : [2, 3]);
      context.beginPath();
      context.moveTo(left + 1, middle);
      context.lineTo(right - 1, middle);
      context.stroke();
      context.setLineDash([]);
    }
    if (ending && last < end) {
      context.fillStyle = theme.ink;
      context.fillRect(right - 2, y + h * 0.1, 2, h * 0.8);
      const style = { colour: theme.ink, font: bold(10), align: "right" };
      if (ending === "aborted" && h >= 14) write(context, "A", right - 4, middle, style);
    }
  }

  drawBudget({ context, theme, start, end, x, index }) {
    const { budget, frames } = this.recording;
    const most = frames.reduce((n, { tokens }) => Math.max(n, tokens), 1);
    const top = budget <= 4 * most ? budget : most; // else the budget is off the scale, as in the PNG
    const bottom = this.bottom + BUDGET;
    const gap = this.column >= 8 ? 1 : 0;
    const style = { colour: theme.quiet, font: px(10), align: "right" };
    write(context, String(top), NAMES - 6, this.bottom + 6, style);
    write(context, "tokens", NAMES - 6, this.bottom + 22, style);
    write(context, "0", NAMES - 6, bottom - 4, style);
    for (let step = start; step < end; step++) {
      const { tokens } = frames[step];
      const full = (BUDGET * Math.min(tokens, top)) / top;
      context.fillStyle = theme.quiet;
      if (tokens) context.fillRect(x(step) + gap, bottom - Math.max(1, full), this.column - 2 * gap, Math.max(1, full));
      context.font = px(10);
      if (tokens && this.column > context.measureText(tokens).width + 2) {
        const number = { ...style, colour: step === index ? theme.ink : theme.quiet, align: "center" };
        write(context, String(tokens), x(step) + this.column / 2, bottom + 9, number);
      }
    }
    context.strokeStyle = theme.line;
    context.lineWidth = 1;
    context.setLineDash([4, 3]);
    context.beginPath();
    if (top === budget) {
      context.moveTo(NAMES, this.bottom + 0.5);
      context.lineTo(x(end), this.bottom + 0.5);
    }
    context.stroke();
    context.setLineDash([]);
    context.beginPath();
    context.moveTo(NAMES, bottom + 0.5);
    context.lineTo(x(end), bottom + 0.5);
    context.stroke();
  }
}

// -- The player: a slider, keys, and the parts ------------------------------------------------------------------------

const VIEWS = {
  CacheMap: { label: "Cache map", parts: [CacheMap, Requests] },
  Timeline: { label: "Timeline", parts: [Timeline] },
  Player: { label: "Cache map and timeline", parts: [CacheMap, Requests, Timeline] },
};
const MAP_LEGEND =
  "kept: nobody holds the block, but the prefix cache still finds it. #1 is the free block that is taken next. " +
  "Bold frame: changed in this step; dots: tokens it added.";
const TIMELINE_LEGEND =
  "tall bar: prefill of so many tokens; H, hatched: after a hit in the prefix cache; thin bar: decode; dotted: waits; " +
  "X: preempted; !: the step fails; | finished; A| aborted. Below: the step's tokens; dashed: the budget, if it is near.";
const HINT = "Point at a block or a request, or choose a request with the up and down keys, to see whose blocks are where.";
const KEYS = "Left and right arrow: previous and next step. Page up and down: 10 steps. Home, End: first, last. " +
  "Space: play or pause. Plus and minus: speed. Up and down arrow: choose a request.";

class Player {
  constructor(element, recording, { view, index }) {
    this.recording = recording;
    this.index = index;
    this.pointed = {}; // what the mouse is on: {block}, {request} or {step, request}
    this.chosen = undefined; // the request that the keys or a click have chosen
    this.speed = 1; // steps a second: an index of SPEEDS
    this.numDrawn = 0;
    this.view = view;
    this.build(element);
    this.resizes = new ResizeObserver(() => this.layout());
    this.resizes.observe(this.root);
    this.themes = new MutationObserver(() => this.redraw());
    this.themes.observe(document.body, { attributes: true });
    this.media = ["(prefers-color-scheme: dark)", "print"].map((query) => window.matchMedia(query));
    this.onMedia = () => this.draw();
    for (const media of this.media) media.addEventListener("change", this.onMedia);
    this.layout();
  }

  build(element) {
    const { label, parts } = VIEWS[this.view];
    this.root = document.createElement("div");
    this.root.className = "nanovllm";
    this.root.setAttribute("role", "group");
    this.root.setAttribute("aria-label", label);
    this.root.nanovllm = this; // for tests, and for the curious
    this.root.innerHTML = `
      <div class="nanovllm-controls">
        <button class="nanovllm-previous" title="Previous step (←)" aria-label="Previous step" tabindex="-1">◀</button>
        <button class="nanovllm-play" title="Play or pause (space)" tabindex="-1">▶ Play</button>
        <button class="nanovllm-next" title="Next step (→)" aria-label="Next step" tabindex="-1">▶</button>
        <input type="range" min="0" step="1" aria-label="${label}: step" aria-description="${KEYS}">
        <span class="nanovllm-count"></span>
        <select tabindex="-1" title="Speed (+ and −)" aria-label="Speed">
          ${SPEEDS.map((speed, i) => `<option value="${i}">${speed} step${speed > 1 ? "s" : ""}/s</option>`).join("")}
        </select>
      </div>
      <div class="nanovllm-sentence" role="status" aria-live="polite"></div>
      <div class="nanovllm-parts"></div>
      <div class="nanovllm-detail" aria-live="polite"></div>
      <div class="nanovllm-legend"></div>`;
    const find = (selector) => this.root.querySelector(selector);
    this.slider = find("input");
    this.count = find(".nanovllm-count");
    this.sentence = find(".nanovllm-sentence");
    this.detail = find(".nanovllm-detail");
    this.speeds = find("select");
    this.buttons = { previous: find(".nanovllm-previous"), play: find(".nanovllm-play"), next: find(".nanovllm-next") };
    const legends = [parts.includes(CacheMap) && MAP_LEGEND, parts.includes(Timeline) && TIMELINE_LEGEND];
    find(".nanovllm-legend").append(...legends.filter(Boolean).flatMap((text) => [text, document.createElement("br")]));
    this.parts = parts.map((Part) => new Part(this));
    find(".nanovllm-parts").append(...this.parts.map((part) => part.element));
    this.speeds.value = String(this.speed);
    this.slider.addEventListener("input", () => this.goTo(this.slider.valueAsNumber));
    this.buttons.previous.addEventListener("click", () => this.goTo(this.index - 1));
    this.buttons.next.addEventListener("click", () => this.goTo(this.index + 1));
    this.buttons.play.addEventListener("click", () => this.play(!this.timer));
    this.speeds.addEventListener("change", () => this.setSpeed(Number(this.speeds.value)));
    this.slider.addEventListener("keydown", (event) => this.onKey(event));
    keepKeys(this.root);
    element.append(this.root);
  }

  // What the reader does.

  goTo(index, { playing = false } = {}) {
    if (!playing) this.play(false);
    this.index = Math.max(0, Math.min(index, this.last));
    this.redraw();
  }

  get last() {
    return this.recording.frames.length - 1;
  }

  play(plays) {
    clearInterval(this.timer);
    this.timer = plays ? setInterval(() => this.tick(), 1000 / SPEEDS[this.speed]) : undefined;
    this.buttons.play.textContent = plays ? "❚❚ Pause" : "▶ Play";
    this.sentence.setAttribute("aria-live", plays ? "off" : "polite"); // nobody listens that fast
    if (plays && this.index === this.last) this.goTo(0, { playing: true });
  }

  tick() {
    this.goTo(this.index + 1, { playing: true });
    if (this.index === this.last) this.play(false);
  }

  setSpeed(speed) {
    this.speed = Math.max(0, Math.min(speed, SPEEDS.length - 1));
    this.speeds.value = String(this.speed);
    if (this.timer) this.play(true);
  }

  onKey(event) {
    const actions = {
      ArrowLeft: () => this.goTo(this.index - 1),
      ArrowRight: () => this.goTo(this.index + 1),
      PageUp: () => this.goTo(this.index - 10),
      PageDown: () => this.goTo(this.index + 10),
      Home: () => this.goTo(0),
      End: () => this.goTo(this.last),
      " ": () => this.play(!this.timer),
      "+": () => this.setSpeed(this.speed + 1),
      "-": () => this.setSpeed(this.speed - 1),
      ArrowUp: () => this.chooseNext(-1),
      ArrowDown: () => this.chooseNext(1),
      Escape: () => this.choose(undefined),
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }

  /** The request whose way to its blocks is shown. */
  get lit() {
    return this.pointed.request ?? this.chosen;
  }

  pointAt(pointed) {
    if (JSON.stringify(pointed) === JSON.stringify(this.pointed)) return;
    this.pointed = pointed;
    this.redraw();
  }

  choose(request) {
    this.chosen = request === this.chosen ? undefined : request;
    this.redraw();
  }

  chooseNext(direction) {
    const ids = [undefined, ...this.recording.frames[this.index].requests.keys()];
    this.chosen = ids.at((ids.indexOf(this.chosen) + direction) % ids.length);
    for (const part of this.parts) part.reveal?.(this.chosen);
    this.redraw();
  }

  /** The run has grown, or is another one. */
  show(recording, index) {
    this.recording = recording;
    this.isLaidOut = false;
    this.layout();
    this.goTo(index);
  }

  // What the reader sees.

  layout() {
    const width = Math.floor(this.root.clientWidth);
    if (!width) return; // it is not in the page yet, or in a hidden tab
    const isWide = width >= 720;
    for (const part of this.parts) {
      if (part instanceof CacheMap) {
        part.layout(isWide ? Math.floor(width * (this.recording.numBlocks <= 32 ? 0.44 : 0.54)) : width);
      } else if (part instanceof Requests) {
        part.layout(isWide ? width - 20 - this.parts[0].width : width);
      } else {
        part.layout(width);
      }
    }
    this.isLaidOut = true;
    this.slider.max = String(this.last);
    const longest = Math.max(...this.recording.frames.map(({ sentence }) => sentence.length));
    const numLines = Math.min(3, Math.ceil((longest * 7) / width)); // room for them, so that the picture stays in place
    this.sentence.style.minHeight = `${1.45 * numLines}em`;
    this.draw();
  }

  /** Draw with the screen's next frame, once, however often it is asked for. */
  redraw() {
    this.request ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.request);
    this.request = undefined;
    if (this.root.clientWidth && !this.isLaidOut) return this.layout(); // it has grown in a hidden tab
    const frame = this.recording.frames[this.index];
    const style = getComputedStyle(this.root);
    const names = ["page", "ink", "quiet", "line", "empty", "accent"];
    const theme = Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    if (this.root.clientWidth) for (const part of this.parts) part.draw(this.index, theme);
    this.slider.value = String(this.index);
    this.slider.setAttribute("aria-valuetext", frame.title);
    this.count.textContent = `${frame.title} / ${Math.max(0, this.last - 1)}`;
    this.sentence.textContent = frame.sentence;
    this.detail.textContent = this.describe(frame) || HINT;
    this.buttons.previous.disabled = this.index === 0;
    this.buttons.next.disabled = this.index === this.last;
    this.root.dataset.index = String(this.index);
    this.numDrawn += 1;
  }

  /** What the mouse or the keys are on, in a line. */
  describe(frame) {
    const { block, step } = this.pointed;
    if (block !== undefined) return this.describeBlock(frame, block);
    const request = this.recording.frames[step ?? this.index].requests.get(this.lit);
    if (!request) return step === undefined ? "" : this.recording.frames[step].sentence;
    const way = request.table.map((id, i) => `${i} → ${id}`).join(", ");
    const where = step === undefined ? "" : `${this.recording.frames[step].title}, `;
    const found = request.hit ? `, finds ${request.hit} tokens in the cache` : "";
    const did = request.new ? `, computes ${request.new}` : "";
    const text = `${where}${request.name}: ${request.status}${found}${did}`;
    if (FINISHED.has(request.status)) return `${text}; ${request.tokens} tokens`;
    const cached = `${request.computed} of ${request.tokens} tokens cached`;
    return `${text}; ${cached}; logical → physical blocks: ${way || "none"}`;
  }

  describeBlock(frame, id) {
    const { owners, filled, hash } = frame.blocks[id];
    const names = owners.map((owner) => frame.requests.get(owner).name);
    const place = `number ${frame.free.indexOf(id) + 1} in the queue of free blocks`;
    const held = names.length ? `held by ${names.join(", ")}` : `${hash === null ? "free" : "kept"}, ${place}`;
    const known = hash === null ? "no hash" : `hash ${hash}`;
    const text = filled ? `: “${printable(this.recording.tokensOf(id, this.index).join(""))}”` : "";
    return `Block ${id}: ${held}; ${known}; ${filled} of ${this.recording.blockSize} tokens${text}`;
  }

  remove() {
    clearInterval(this.timer);
    cancelAnimationFrame(this.request);
    this.resizes.disconnect();
    this.themes.disconnect();
    for (const media of this.media) media.removeEventListener("change", this.onMedia);
    this.root.remove();
  }
}

// -- The explorer: controls, bars, a sentence -------------------------------------------------------------------------

class Explorer {
  /** `data` is what `pack_readings` made, `index` the number of the combination to begin with. */
  constructor(element, data, { index }) {
    this.data = data;
    this.places = []; // of the chosen value of each control
    for (const { values } of [...data.controls].reverse()) {
      this.places.unshift(index % values.length);
      index = Math.floor(index / values.length);
    }
    this.build(element);
    this.draw();
  }

  build(element) {
    const { title, controls, combinations } = this.data;
    this.controls = controls.map((control, i) => this.buildControl(control, i));
    this.sentence = make("div", { role: "status", "aria-live": "polite" });
    const longest = combinations.reduce((a, b) => (a.sentence.length < b.sentence.length ? b : a)).sentence;
    const room = make("div", { class: "nanovllm-room", "aria-hidden": "true" }, longest); // so that the bars stay in place
    this.root = make(
      "div", { class: "nanovllm nanovllm-explorer", role: "group", "aria-label": title },
      make("div", { class: "nanovllm-title" }, title),
      make("div", { class: "nanovllm-choices" }, ...this.controls.map(({ element }) => element)),
      make("div", { class: "nanovllm-sentence nanovllm-stack" }, this.sentence, room),
      this.buildChart(),
      this.buildLegend(),
    );
    this.root.nanovllm = this; // for tests, and for the curious
    keepKeys(this.root);
    element.append(this.root);
  }

  buildControl({ name, values, slides }, i) {
    const input = slides
      ? make("input", { type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": name })
      : make("select", { "aria-label": name }, ...values.map((value, k) => make("option", { value: k }, value)));
    const shown = make("output", {});
    input.addEventListener("input", () => this.choose(i, Number(input.value)));
    const head = make("span", {}, make("span", { class: "nanovllm-name" }, name), slides ? shown : "");
    return { input, shown, element: make("label", { class: "nanovllm-choice" }, head, input) };
  }

  /** A grid: the names of the rows, and beside them the bars; the axis below; the limits over all of it. */
  buildChart() {
    const { rows, ticks, unit, limits, room } = this.data;
    const at = (share) => `left: ${100 * share}%`;
    this.bars = rows.map(() => make("div", { class: "nanovllm-bar" }));
    const names = rows.map(({ label, look }) => {
      const style = look ? `color: ${look[1]}; background: ${look[0]}` : "";
      return make("div", { class: look ? "nanovllm-row nanovllm-badge" : "nanovllm-row", style }, label);
    });
    const lines = ticks.map(([share]) => make("i", { style: at(share) }));
    const flags = limits.map(([share, words, lane]) =>
      make("div", { class: "nanovllm-limit", style: `${at(share)}; --lane: ${lane}` }, make("span", {}, words)));
    const numbers = ticks.map(([share, text]) => make("span", { style: at(share) }, text));
    // A row of the grid each: the lines lie over all of them, and placed by itself a bar would evade them.
    [names, this.bars].forEach((column) => column.forEach((element, i) => { element.style.gridRow = i + 2; }));
    const numLanes = Math.max(0, ...limits.map(([, , lane]) => lane + 1));
    const style = `--rows: ${rows.length}; --lanes: ${numLanes}; --room: ${room}ch`;
    this.chart = make(
      "div", { class: "nanovllm-chart", role: "img", style },
      ...rows.flatMap((_, i) => [names[i], this.bars[i]]),
      make("div", { class: "nanovllm-lines" }, ...lines, ...flags),
      make("div", { class: "nanovllm-axis" }, ...numbers, make("b", {}, unit)),
    );
    return this.chart;
  }

  buildLegend() {
    const { segments, legend } = this.data;
    const items = segments.map(({ label, look, hatch }) =>
      make("span", {}, make("i", { class: `nanovllm-hatch-${hatch}`, style: dyed(look) }), label));
    return make("div", { class: "nanovllm-legend nanovllm-swatches" }, ...(legend ? items : []));
  }

  choose(i, place) {
    this.places[i] = place;
    this.draw();
  }

  /** The number of the chosen combination: the last control changes fastest. */
  get index() {
    return this.data.controls.reduce((index, { values }, i) => index * values.length + this.places[i], 0);
  }

  draw() {
    const { controls, combinations } = this.data;
    const { sentence, alt } = combinations[this.index];
    this.controls.forEach(({ input, shown }, i) => {
      const value = controls[i].values[this.places[i]];
      input.value = String(this.places[i]);
      shown.textContent = value;
      if (controls[i].slides) input.setAttribute("aria-valuetext", value);
    });
    this.sentence.textContent = sentence;
    this.chart.setAttribute("aria-label", alt);
    this.drawChart(combinations[this.index]);
    this.root.dataset.index = String(this.index);
  }

  drawChart({ bars }) {
    const { segments } = this.data;
    bars.forEach(([, parts, total, over], i) => {
      const drawn = parts.map(([label, start, end, number]) => {
        const { look, hatch } = segments.find((segment) => segment.label === label);
        const style = `${dyed(look)}; left: ${100 * start}%; width: ${100 * (end - start)}%`;
        const text = make("span", {}, number === total ? "" : number); // too wide, it breaks into a line that is cut off
        return make("div", { class: `nanovllm-segment nanovllm-hatch-${hatch}`, style, title: `${label}: ${number}` }, "\u200b", text);
      });
      const end = Math.max(0, ...parts.map(([, , end]) => end));
      const text = over ? `▸ ${total} = ${over}` : total;
      const words = make("span", { class: "nanovllm-number", style: `left: ${100 * end}%` }, text);
      this.bars[i].classList.toggle("nanovllm-over", Boolean(over));
      this.bars[i].replaceChildren(...drawn, words);
    });
  }

  remove() {
    this.root.remove();
  }
}

// -- Which rank holds which slice -------------------------------------------------------------------------------------

/** Controls and a sentence as an explorer has them; the tensors of a model as boxes, in the ranks' colours. */
class RankMap extends Explorer {
  buildChart() {
    this.chart = make("div", { class: "nanovllm-tensors", role: "img" });
    return make("div", { class: "nanovllm-wide" }, this.chart);
  }

  buildLegend() {
    const items = this.data.ranks.map(({ look, hatch }, rank) =>
      make("span", {}, make("i", { class: `nanovllm-hatch-${hatch}`, style: dyed(look) }), `rank ${rank}`));
    const copied = make("span", {}, make("i", { class: "nanovllm-copied" }), "a copy on each rank named");
    return make("div", { class: "nanovllm-legend nanovllm-swatches" }, ...items, copied);
  }

  drawChart({ scene, rank }) {
    const [boxes, height] = this.data.scenes[scene];
    const { width } = this.data;
    this.chart.style.aspectRatio = `${width} / ${height}`;
    const place = (left, top, wide, high, [w, h]) =>
      `left: ${(100 * left) / w}%; top: ${(100 * top) / h}%; width: ${(100 * wide) / w}%; height: ${(100 * high) / h}%`;
    this.chart.replaceChildren(...boxes.flatMap(([name, shape, left, top, wide, high, stretched, regions]) => {
      const words = make(
        "div", { class: "nanovllm-tensor-name", style: place(left, top - 30, wide, 28, [width, height]) },
        make("b", {}, name), make("span", {}, stretched ? `${shape}, drawn wider` : shape));
      const slices = regions.map(([from, above, to, below, ranks]) => {
        const style = place(from, above, to - from, below - above, [1, 1]);
        const { look, hatch } = this.data.ranks[ranks[0]];
        const kind = ranks.length > 1 ? "nanovllm-copied" : `nanovllm-hatch-${hatch}`;
        const pale = rank !== null && !ranks.includes(rank) ? " nanovllm-pale" : "";
        const colours = ranks.length > 1 ? "" : `; ${dyed(look)}`;
        const text = pale ? "" : make("span", {}, ranks.join(" "));
        return make("div", { class: `nanovllm-slice ${kind}${pale}`, style: style + colours }, text);
      });
      return [words, make("div", { class: "nanovllm-tensor", style: place(left, top, wide, high, [width, height]) }, ...slices)];
    }));
  }
}

function dyed([background, ink]) {
  return `background-color: ${background}; color: ${ink}`;
}

/** Keys pressed in an element stay there: `b` would insert a cell. Those with Ctrl or Cmd are JupyterLab's: it saves. */
function keepKeys(element) {
  element.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation();
  });
}

/** An element with these attributes and children. */
function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// -- Into the page ----------------------------------------------------------------------------------------------------

const CHOOSERS = { Explorer, RankMap }; // they know all that there is to choose; the others play a recording

/** What a view shows: a recording, or all combinations of some choices. `bytes` came from Python, packed. */
async function unpack(bytes, view) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = await new Response(stream).json();
  return view in CHOOSERS ? data : new Recording(data);
}

function showIn(element, shown, { view, index }) {
  return view in CHOOSERS ? new CHOOSERS[view](element, shown, { index }) : new Player(element, shown, { view, index });
}

/** Show a packed run, or packed combinations, in `element`. @returns {Promise<Player | Explorer>} */
export async function mount(element, { data, view, index }) {
  return showIn(element, await unpack(data, view), { view, index });
}

/** In a notebook: one recording, as many views of it as there are, and messages with new frames. */
export default function () {
  const players = new Set();
  let ready; // the recording; messages wait for it, one after the other
  const read = (model) => {
    const data = model.get("data");
    return unpack(new Uint8Array(data.buffer, data.byteOffset, data.byteLength), model.get("view"));
  };
  const show = (recording, index) => players.forEach((player) => player.show(recording, index));
  return {
    initialize({ model }) {
      ready = read(model);
      model.on("change:data", () => {
        ready = read(model);
        ready.then((recording) => show(recording, model.get("index")));
      });
      model.on("msg:custom", (message) => {
        ready = ready.then((recording) => {
          recording.append(message);
          show(recording, recording.frames.length - 1);
          return recording;
        });
      });
    },
    async render({ model, el }) {
      const player = showIn(el, await ready, { view: model.get("view"), index: model.get("index") });
      players.add(player);
      return () => {
        players.delete(player);
        player.remove();
      };
    },
  };
}
