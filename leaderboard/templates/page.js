(() => {
"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const one = (selector, root = document) => root.querySelector(selector);
const images = JSON.parse(one("#images").textContent);
const tip = one("#tip");

/* Images stand once in the page, by id; they are put in place when they are first seen. */
function fill(root) {
  for (const img of all("img[data-i]", root)) {
    const uri = images[img.dataset.i];
    if (typeof uri === "string") img.src = uri;
    img.removeAttribute("data-i");
  }
}

class Board {
  constructor(section) {
    this.section = section;
    this.name = section.dataset.name;
    this.table = one("table.results", section);
    this.heads = all("th[data-key]", this.table);
    this.rows = all("tr.row", this.table);
    this.rows.forEach((row, i) => { row.place = i; row.drawer = one(`#${CSS.escape(row.id)}-d`); });
    this.hiddenAtFirst = new Set(["more"]);
    this.reset();
    this.listen();
  }

  reset() {
    this.key = null; this.descending = false; this.query = ""; this.families = new Set(); this.sees = new Set();
    this.hidden = new Set(this.hiddenAtFirst); this.diffs = false; this.opened = new Set(); this.picked = new Set();
  }

  listen() {
    for (const head of this.heads) one("button", head).addEventListener("click", () => this.sortBy(head));
    one("input[type=search]", this.section).addEventListener("input", (e) => { this.query = e.target.value; this.show(); });
    one(".toolbar", this.section).addEventListener("click", (e) => this.toggle(e.target.closest("button")));
    one("[data-clear]", this.section)?.addEventListener("click", () => {
      this.query = ""; this.families.clear(); this.sees.clear(); this.show();
      one("input[type=search]", this.section).focus();
    });
    const scroller = one(".scroller", this.section);
    this.edge = () => scroller.parentNode.classList.toggle("more", scroller.scrollLeft + scroller.clientWidth < scroller.scrollWidth - 4);
    scroller.addEventListener("scroll", this.edge, { passive: true });
    addEventListener("resize", this.edge);
    for (const row of this.rows) {
      one(".open", row).addEventListener("click", () => this.open(row, !this.opened.has(row.id)));
      row.addEventListener("pointerenter", () => this.heat(row.id, true));
      row.addEventListener("pointerleave", () => this.heat(row.id, false));
    }
    for (const mark of all(".mark", this.section)) this.listenMark(mark);
    for (const pick of all(".pick", this.section)) this.listenPick(pick);
  }

  listenPick(pick) {
    const names = pick.dataset.series === undefined ? pick.dataset.all.split("\n") : [pick.dataset.series];
    const area = pick.closest("tr");
    area.addEventListener("pointerenter", () => this.light(names));
    area.addEventListener("pointerleave", () => this.light());
    pick.addEventListener("focus", () => this.light(names));
    pick.addEventListener("blur", () => this.light());
    pick.addEventListener("click", () => {
      const off = names.every((n) => this.picked.has(n));
      for (const n of names) if (off) this.picked.delete(n); else this.picked.add(n);
      this.show();
    });
  }

  listenMark(mark) {
    const enter = () => { this.point(mark, true); showTip(mark); };
    const leave = () => { this.point(mark, false); hideTip(); };
    mark.addEventListener("pointerenter", enter);
    mark.addEventListener("focus", enter);
    mark.addEventListener("pointerleave", leave);
    mark.addEventListener("blur", leave);
    const go = () => {
      const row = one(`#${CSS.escape(mark.dataset.row)}`);
      hideTip();
      if (row.hidden) { this.query = ""; this.families.clear(); this.sees.clear(); }
      this.open(row, true);
      row.scrollIntoView({ block: "start" });
      one(".open", row).focus({ preventScroll: true });
    };
    mark.addEventListener("click", go);
    mark.addEventListener("keydown", (e) => {
      if (e.key === "Enter" || e.key === " ") { e.preventDefault(); go(); }
      if (e.key === "Escape") hideTip();
    });
  }

  toggle(button) {
    if (!button) return;
    const flip = (set, value) => { if (!set.delete(value)) set.add(value); };
    const { family, see, group } = button.dataset;
    if (family !== undefined) flip(this.families, family);
    else if (see !== undefined) flip(this.sees, see);
    else if (group !== undefined) flip(this.hidden, group);
    else if ("diff" in button.dataset) this.diffs = !this.diffs;
    this.show();
  }

  /* Best first, then worst first, then back to the groups by method. */
  sortBy(head) {
    const bestDescends = head.dataset.dir !== "lower";
    if (this.key !== head.dataset.key) { this.key = head.dataset.key; this.descending = bestDescends; }
    else if (this.descending === bestDescends) this.descending = !this.descending;
    else this.key = null;
    this.show();
  }

  open(row, yes) {
    if (yes) this.opened.add(row.id); else this.opened.delete(row.id);
    if (row.hidden) this.show();
    else { this.unfold(row); save(); }
  }

  unfold(row) {
    const open = this.opened.has(row.id);
    row.drawer.hidden = row.hidden || !open;
    row.classList.toggle("opened", open);
    one(".open", row).setAttribute("aria-expanded", String(open));
    if (!row.drawer.hidden) fill(row.drawer);
  }

  heat(id, on) {
    for (const mark of all(".mark", this.section)) if (mark.dataset.row === id) mark.classList.toggle("hot", on);
  }

  point(mark, on) {
    one(`#${CSS.escape(mark.dataset.row)}`).classList.toggle("hot", on);
    this.light(on ? [mark.dataset.series] : undefined);
  }

  /* The plot's methods that stand out: those pointed at, else those picked, else all alike. */
  light(names = [...this.picked]) {
    for (const svg of all(".scatter svg", this.section)) {
      svg.classList.toggle("lit", names.length > 0);
      for (const part of all("[data-series]", svg)) {
        part.classList.toggle("dim", names.length > 0 && !names.includes(part.dataset.series));
      }
    }
  }

  /* Puts the page into the state that the fields say. */
  show() {
    this.order();
    this.filter();
    for (const head of this.heads) {
      head.setAttribute("aria-sort", head.dataset.key !== this.key ? "none" : this.descending ? "descending" : "ascending");
    }
    const press = (name, has) => {
      for (const b of all(`[data-${name}]`, one(".toolbar", this.section))) b.setAttribute("aria-pressed", has(b.dataset[name]));
    };
    press("family", (x) => this.families.has(x));
    press("see", (x) => this.sees.has(x));
    press("group", (x) => !this.hidden.has(x));
    press("diff", () => this.diffs);
    for (const b of all("[data-group]", this.section)) this.table.classList.toggle(`hide-${b.dataset.group}`, this.hidden.has(b.dataset.group));
    for (const p of all(".pick[data-series]", this.section)) p.setAttribute("aria-pressed", String(this.picked.has(p.dataset.series)));
    this.light();
    this.table.classList.toggle("diffs", this.diffs);
    this.table.classList.toggle("flat", this.key !== null);
    const input = one("input[type=search]", this.section);
    if (input.value !== this.query) input.value = this.query;
    this.edge();
    save();
  }

  /* Controls are pinned above the methods and keep their order; blanks come last either way. */
  order() {
    const index = this.key === null ? -1 : columnIndex(this.table, this.key);
    const value = (row) => {
      if (this.key === "name") return one(".m", row).textContent;
      const text = row.cells[index].dataset.v;
      return text === "" ? null : isNaN(text) ? text : Number(text);
    };
    const sign = this.descending ? -1 : 1;
    const compare = (a, b) => {
      if (this.key === null) return a.place - b.place;
      const x = value(a), y = value(b);
      if (x === null || y === null) return (x === null) - (y === null) || a.place - b.place;
      return (x < y ? -sign : x > y ? sign : 0) || a.place - b.place;
    };
    const body = one("tbody.methods", this.table);
    const now = this.rows.filter((row) => row.parentNode === body);
    const sorted = [...now].sort(compare);
    if (sorted.map((row) => row.id).join() === this.sequence) return;
    this.sequence = sorted.map((row) => row.id).join();
    for (const row of sorted) body.append(row, row.drawer);
    body.append(one(".empty", body));
  }

  /* "May see at most": a method fits if it needs nothing beyond what is chosen. Controls always stay. */
  fits(row) {
    if (row.classList.contains("control")) return true;
    const words = this.query.toLowerCase().split(/\s+/).filter(Boolean);
    const needs = row.dataset.sees.split("|").filter((k) => k !== "nothing");
    return words.every((w) => row.dataset.text.includes(w))
      && (!this.families.size || this.families.has(row.dataset.family))
      && (!this.sees.size || needs.every((k) => this.sees.has(k)));
  }

  filter() {
    let shown = 0, total = 0;
    for (const row of this.rows) {
      const fits = this.fits(row);
      row.hidden = !fits;
      this.unfold(row);
      if (!row.classList.contains("control")) { total += 1; shown += fits; }
    }
    one(".empty", this.table).hidden = shown > 0 || total === 0;
    one(".count", this.section).textContent = shown === total ? `${total} row${total === 1 ? "" : "s"}` : `${shown} of ${total} rows`;
  }

  /* The state as it stands in the address, so that a view can be sent to somebody. */
  write(params) {
    const list = (name, values) => { if (values.length) params.set(name, values.join("|")); };
    if (this.key !== null) params.set("sort", (this.descending ? "-" : "") + this.key);
    if (this.query) params.set("q", this.query);
    list("family", [...this.families]);
    list("see", [...this.sees]);
    list("hide", [...this.hidden].filter((g) => !this.hiddenAtFirst.has(g)));
    list("show", [...this.hiddenAtFirst].filter((g) => !this.hidden.has(g)));
    if (this.diffs) params.set("diff", "1");
    list("open", [...this.opened]);
    list("pick", [...this.picked]);
  }

  read(params) {
    this.reset();
    const list = (name) => (params.get(name) || "").split("|").filter(Boolean);
    const sort = params.get("sort");
    const key = sort && sort.replace(/^-/, "");
    if (key && this.heads.some((h) => h.dataset.key === key)) { this.key = key; this.descending = sort.startsWith("-"); }
    this.query = params.get("q") || "";
    const known = (name, values) => values.filter((v) => all(`.toolbar [data-${name}]`, this.section).some((b) => b.dataset[name] === v));
    this.families = new Set(known("family", list("family")));
    this.sees = new Set(known("see", list("see")));
    for (const g of known("group", list("hide"))) this.hidden.add(g);
    for (const g of list("show")) this.hidden.delete(g);
    this.diffs = params.get("diff") === "1";
    const drawn = new Set(all(".pick[data-series]", this.section).map((p) => p.dataset.series));
    this.picked = new Set(list("pick").filter((n) => drawn.has(n)));
    this.opened = new Set(list("open").filter((id) => this.rows.some((r) => r.id === id)));
  }
}

/* The first header row spans two, so a column's place is counted from the body's cells. */
function columnIndex(table, key) {
  const fixed = { rank: 0, name: 1, family: 2, sees: 3 };
  if (key in fixed) return fixed[key];
  return 4 + all("thead th.num", table).findIndex((head) => head.dataset.key === key);
}

function hideTip() {
  tip.mark = null;
  tip.hidden = true;
}

function showTip(mark) {
  tip.mark = mark;
  tip.textContent = mark.dataset.tip;
  tip.hidden = false;
  const at = one(".shape", mark).getBoundingClientRect(), box = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - box.width / 2), document.documentElement.clientWidth - box.width - 8);
  const above = at.top - box.height - 10;
  tip.style.left = `${left}px`;
  tip.style.top = `${above < 8 ? at.bottom + 10 : above}px`;
}

const boards = all("section.board").map((section) => new Board(section));
const select = one("#board");
let current = boards[0];

function save() {
  const params = new URLSearchParams();
  if (boards.length > 1 && current !== boards[0]) params.set("board", current.name);
  current.write(params);
  const hash = params.toString();
  try {
    history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  } catch { /* some viewers forbid it; the page works without */ }
}

function choose(board) {
  current = board;
  for (const b of boards) b.section.hidden = b !== board;
  if (select) select.value = board.section.id;
  for (const track of all(".tracks a")) {
    if (track.dataset.boards.split(" ").includes(board.section.id)) track.setAttribute("aria-current", "true");
    else track.removeAttribute("aria-current");
  }
  fill(one(".lead", board.section) || document.createElement("i"));
  board.show();
}

function restore() {
  const params = new URLSearchParams(location.hash.slice(1));
  const board = boards.find((b) => b.name === params.get("board")) || boards[0];
  board.read(params);
  choose(board);
}

if (boards.length) {
  select?.addEventListener("change", () => choose(boards.find((b) => b.section.id === select.value)));
  addEventListener("hashchange", () => { if (location.hash.includes("=") || !location.hash) restore(); });
  addEventListener("scroll", () => { if (tip.mark) showTip(tip.mark); }, { passive: true });
  restore();
}
})();
