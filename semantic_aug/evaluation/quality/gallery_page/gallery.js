// The gallery: filters, groups and sorts the records of data.js, draws only what is on screen, keeps the rejections.
"use strict";
(() => {
  const G = window.GALLERY, I = G.images, N = I.path.length;
  const $ = (id) => document.getElementById(id);
  const box = $("images"), viewport = $("viewport"), dialog = $("detail");
  const FIELDS = { subset: (i) => G.lists[I.list[i]].subset, source: (i) => I.source[i], target: (i) => I.target[i], strength: (i) => I.group[i] };
  const GAP = 12, HEADING = 46, TEXT = 42, PADDING = 12;
  const key = "semantic_aug gallery " + G.id;
  const name = (label) => G.classes[label];
  const from = (i) => (I.unlabelled[i] < 0 ? name(I.source[i]) : G.unlabelled[I.unlabelled[i]].title);
  const number = (value) => String(+value.toPrecision(4));

  const rejected = new Set();
  const history = []; // images whose rejection was changed, last one last
  let order = new Uint32Array(0), rows = [], rowOf = order, columns = 1, current = 0, width = 0;
  let wish = 128, size = 128; // side of a thumbnail on screen in pixels, as chosen and as it fits
  const drawn = new Map(); // key of a card or heading -> its element

  // ---------------------------------------------------------------- rejections

  function restore() {
    try {
      const kept = JSON.parse(localStorage.getItem(key) || "[]");
      kept.filter((i) => Number.isInteger(i) && i >= 0 && i < N).forEach((i) => rejected.add(i));
      localStorage.setItem(key, JSON.stringify([...rejected]));
    } catch (error) {
      warn("This browser keeps no rejections for this page: save the review before you close it.");
    }
  }

  function remember() {
    try {
      localStorage.setItem(key, JSON.stringify([...rejected].sort((a, b) => a - b)));
    } catch (error) {
      warn("This browser could not keep the last rejection: save the review before you close the page.");
    }
  }

  function toggle(i) {
    rejected.has(i) ? rejected.delete(i) : rejected.add(i);
    history.push(i);
    changed(i);
  }

  function undo() {
    if (!history.length) return;
    const i = history.pop();
    rejected.has(i) ? rejected.delete(i) : rejected.add(i);
    changed(i);
    const place = order.indexOf(i);
    if (place >= 0) dialog.open ? (move(place), showDetail()) : move(place);
  }

  function changed(i) {
    remember();
    $("undo").disabled = !history.length;
    const card = drawn.get(i);
    if (card) describe(card, i);
    if (dialog.open) $("reject").setAttribute("aria-pressed", rejected.has(order[current]));
    status(rejected.has(i) ? "" : "one is kept again");
  }

  function warn(text) {
    $("warning").textContent = text;
    $("warning").hidden = !text;
  }

  function status(last) {
    const shown = order.length === N ? `${N} images` : `${order.length} of ${N} images`;
    $("status").textContent = `${shown}, ${rejected.size} rejected` + (last ? ` (${last})` : "");
  }

  function review() {
    const lists = G.lists.map((list) => ({ ...list, subset: G.subsets[list.subset], rejected: [] }));
    [...rejected].sort((a, b) => a - b).forEach((i) => lists[I.list[i]].rejected.push(I.path[i]));
    return { format: G.format, gallery: G.id, dataset: G.dataset, lists };
  }

  function save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(review(), null, 1) + "\n"], { type: "application/json" }));
    link.download = "review.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    status("saved as review.json");
  }

  async function open(file) {
    try {
      const content = JSON.parse(await file.text());
      if (content.format !== G.format || content.gallery !== G.id) throw new Error("it is a review of other images");
      const index = new Map(I.path.map((path, i) => [I.list[i] + " " + path, i]));
      rejected.clear();
      content.lists.forEach((list, l) => list.rejected.forEach((path) => {
        const i = index.get(l + " " + path);
        if (i !== undefined) rejected.add(i);
      }));
      history.length = 0;
      warn("");
      remember();
      arrange();
    } catch (error) {
      warn(`${file.name} was not opened: ${error.message}`);
    }
  }

  // ------------------------------------------------------- filter, group, sort

  // Every field is a column of codes, numbered in the order in which its groups appear; every order of a score is kept once
  // it has been asked for. So a choice costs one pass over the images.
  const codes = new Map(), ranks = new Map();

  function column(field) {
    if (!codes.has(field)) {
      const value = FIELDS[field], values = Array.from({ length: N }, (_, i) => value(i));
      const text = field === "source" || field === "target" ? name : (v) => v;
      const different = [...new Set(values)].sort((a, b) => (text(a) < text(b) ? -1 : text(a) > text(b) ? 1 : a - b));
      const position = new Map(different.map((v, code) => [v, code]));
      codes.set(field, { of: Uint32Array.from(values, (v) => position.get(v)), position });
    }
    return codes.get(field);
  }

  function ranking(choice) { // all images in an order; those without a value come last, equal ones as in the list
    if (!ranks.has(choice)) {
      const [score, sign] = choice.split(":"), images = Uint32Array.from({ length: N }, (_, i) => i);
      if (score) {
        const keys = Float64Array.from(G.scores[score].values, (v) => (v === null ? Infinity : sign * v));
        images.sort((a, b) => (keys[a] < keys[b] ? -1 : keys[a] > keys[b] ? 1 : a - b));
      }
      ranks.set(choice, images);
    }
    return ranks.get(choice);
  }

  function chosen() { // bytes, 1 for each image that passes the filters
    const show = $("show").value, passes = new Uint8Array(N).fill(1);
    for (const field of Object.keys(FIELDS).filter((f) => $(f) && $(f).value !== "")) {
      const { of, position } = column(field), code = position.get(Number($(field).value));
      for (let i = 0; i < N; i++) if (of[i] !== code) passes[i] = 0;
    }
    if (show) for (let i = 0; i < N; i++) if (rejected.has(i) !== (show === "rejected")) passes[i] = 0;
    return passes;
  }

  function arrange() {
    const passes = chosen(), group = $("group").value, before = order[current];
    order = ranking($("sort").value).filter((i) => passes[i]);
    if (group) { // counting sort: the order within a group stays
      const { of, position } = column(group), next = new Uint32Array(position.size + 1), grouped = new Uint32Array(order.length);
      for (const i of order) next[of[i] + 1]++;
      for (let code = 0; code < position.size; code++) next[code + 1] += next[code];
      for (const i of order) grouped[next[of[i]]++] = i;
      order = grouped;
    }
    current = Math.max(0, order.indexOf(before));
    viewport.scrollTop = 0;
    layOut();
    status();
  }

  function title(i) {
    const kind = $("group").value;
    return { source: () => "from " + name(I.source[i]), target: () => "to " + name(I.target[i]),
      strength: () => "strength " + number(I.group[i]), subset: () => G.subsets[FIELDS.subset(i)] }[kind]();
  }

  function layOut() {
    const group = $("group").value && column($("group").value).of, whole = box.clientWidth + GAP;
    width = viewport.clientWidth;
    columns = Math.max(1, Math.floor(whole / (2 * wish + 14 + GAP)));
    size = Math.min(Math.floor((whole / columns - GAP - 14) / 2), 2 * wish); // cards fill the width
    document.documentElement.style.setProperty("--size", size + "px");
    const height = size + TEXT + PADDING;
    rows = [];
    rowOf = new Uint32Array(order.length);
    let y = 0;
    for (let p = 0; p < order.length; ) {
      let end = order.length;
      if (group) {
        end = p + 1;
        while (end < order.length && group[order[end]] === group[order[p]]) end++;
        rows.push({ y, height: HEADING, heading: title(order[p]), count: end - p });
        y += HEADING + GAP / 2;
      }
      for (; p < end; p += columns) {
        const last = Math.min(end, p + columns);
        for (let q = p; q < last; q++) rowOf[q] = rows.length;
        rows.push({ y, height, first: p, last });
        y += height + GAP;
      }
      p = end;
    }
    box.style.height = y + "px";
    drawn.clear();
    box.replaceChildren();
    draw(0); // what is on screen first, what is near it when that is done
    requestAnimationFrame(() => setTimeout(() => draw()));
  }

  // ------------------------------------------------------------------- drawing

  function draw(margin = 400) {
    const top = viewport.scrollTop - margin, bottom = viewport.scrollTop + viewport.clientHeight + margin;
    let low = 0, high = rows.length;
    while (low < high) { // the first row whose lower edge is on screen
      const middle = (low + high) >> 1;
      rows[middle].y + rows[middle].height < top ? (low = middle + 1) : (high = middle);
    }
    const wanted = new Set();
    for (let r = low; r < rows.length && rows[r].y < bottom; r++) drawRow(r, wanted);
    if (order.length) drawRow(rowOf[current], wanted); // the current image is always there for screen readers
    else wanted.add(drawEmpty());
    drawn.forEach((element, k) => {
      if (!wanted.has(k)) { element.remove(); drawn.delete(k); }
    });
    box.setAttribute("aria-activedescendant", order.length ? "image-" + order[current] : "");
  }

  function drawRow(r, wanted) {
    const row = rows[r];
    if (row.heading !== undefined) {
      wanted.add("row " + r);
      if (drawn.has("row " + r)) return;
      const heading = element("div", "heading", row.heading);
      heading.setAttribute("role", "presentation");
      heading.append(element("span", "muted", `${row.count} image${row.count > 1 ? "s" : ""}`));
      heading.style.transform = `translateY(${row.y}px)`;
      put("row " + r, heading);
      return;
    }
    for (let p = row.first; p < row.last; p++) {
      const i = order[p];
      wanted.add(i);
      if (!drawn.has(i)) put(i, card(i, p, (p - row.first) * (2 * size + 14 + GAP), row.y));
    }
  }

  function drawEmpty() {
    if (!drawn.has("empty")) put("empty", element("p", "empty", "No image has all of these. Choose “all” above."));
    return "empty";
  }

  function put(k, node) {
    drawn.set(k, node);
    box.append(node);
  }

  function element(tag, cls, text) {
    const node = document.createElement(tag);
    node.className = cls;
    if (text) node.textContent = text;
    return node;
  }

  function picture(path) {
    const image = new Image();
    image.decoding = "async";
    image.alt = "";
    image.src = path;
    return image;
  }

  function card(i, p, x, y) {
    const node = element("div", "card"), thumbs = element("div", "thumbs"), r = I.real[i];
    node.id = "image-" + i;
    node.dataset.place = p;
    node.setAttribute("role", "option");
    node.setAttribute("aria-setsize", order.length);
    node.setAttribute("aria-posinset", p + 1);
    thumbs.append(r >= 0 ? picture(G.sources.thumbnail[r]) : element("span", "none", "no source"), picture(I.thumbnail[i]));
    const facts = ["s " + number(I.strength[i])];
    if (G.scores.target_probability) facts.push("p " + scoreText("target_probability", i));
    const sorted = $("sort").value.split(":")[0];
    if (sorted && sorted !== "target_probability") facts.push(G.scores[sorted].label + " " + scoreText(sorted, i));
    const mark = element("span", "mark", "✕");
    mark.title = "Reject, or keep again (x)";
    node.append(thumbs, element("p", "", `${from(i)} → ${name(I.target[i])}`), element("p", "muted", facts.join(" · ")), mark);
    node.style.transform = `translate(${x}px, ${y}px)`;
    if (p === current) node.classList.add("current");
    describe(node, i);
    return node;
  }

  function describe(node, i) {
    node.setAttribute("aria-selected", rejected.has(i));
    const p = G.scores.target_probability ? `, target probability ${scoreText("target_probability", i)}` : "";
    node.setAttribute("aria-label", `${from(i)} to ${name(I.target[i])}, strength ${number(I.strength[i])}${p}${rejected.has(i) ? ", rejected" : ""}`);
  }

  function scoreText(score, i) {
    const value = G.scores[score].values[i];
    return value === null ? "–" : value.toFixed(3);
  }

  // ------------------------------------------------------------------ movement

  function move(place) {
    if (!order.length) return;
    drawn.get(order[current])?.classList.remove("current");
    current = Math.min(order.length - 1, Math.max(0, place));
    const row = rows[rowOf[current]], top = viewport.scrollTop, height = viewport.clientHeight;
    if (row.y - GAP < top) viewport.scrollTop = row.y - GAP - (rows[rowOf[current] - 1]?.heading ? HEADING : 0);
    else if (row.y + row.height + 2 * GAP > top + height) viewport.scrollTop = row.y + row.height + 2 * GAP - height;
    draw();
    drawn.get(order[current]).classList.add("current");
  }

  function vertical(step) { // to the same column of the row of images that is `step` rows away
    const column = current - rows[rowOf[current]].first;
    let r = rowOf[current];
    for (let left = Math.abs(step); left; left--) {
      let next = r + Math.sign(step);
      if (rows[next] && rows[next].heading !== undefined) next += Math.sign(step);
      if (!rows[next] || rows[next].heading !== undefined) break;
      r = next;
    }
    move(Math.min(rows[r].first + column, rows[r].last - 1));
  }

  const page = () => Math.max(1, Math.floor(viewport.clientHeight / (size + TEXT + PADDING + GAP)));
  const KEYS = {
    ArrowRight: () => move(current + 1), ArrowLeft: () => move(current - 1),
    ArrowDown: () => vertical(1), ArrowUp: () => vertical(-1),
    PageDown: () => vertical(page()), PageUp: () => vertical(-page()),
    Home: () => move(0), End: () => move(order.length - 1),
    Enter: showDetail, " ": showDetail, x: () => toggle(order[current]), u: undo,
  };
  const DETAIL_KEYS = {
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), x: KEYS.x, u: undo,
  };

  function pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT)$/.test(event.target.tagName)) return;
    const k = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const onPage = event.target === box || event.target === document.body;
    const action = dialog.open ? DETAIL_KEYS[k] : onPage ? KEYS[k] : k === "u" ? undo : undefined;
    if (!action || (!order.length && k !== "u")) return;
    event.preventDefault();
    action();
  }

  // ----------------------------------------------------------------- full size

  function step(by) {
    move(current + by);
    showDetail();
  }

  function showDetail() {
    if (!order.length) return;
    const i = order[current], r = I.real[i];
    $("detail-title").textContent = `${from(i)} → ${name(I.target[i])}`;
    $("detail-real").hidden = r < 0;
    $("detail-real").parentNode.classList.toggle("single", r < 0);
    if (r >= 0) fill("detail-source", G.sources, r, `source: ${name(I.source[i])}`);
    fill("detail-image", I, i, `synthetic: ${name(I.target[i])}, strength ${number(I.strength[i])}`);
    $("reject").setAttribute("aria-pressed", rejected.has(i));
    $("previous").disabled = current === 0;
    $("next").disabled = current === order.length - 1;
    $("record").replaceChildren(...recordOf(i).flatMap(([term, text]) => [element("dt", "", term), element("dd", "", text)]));
    if (!dialog.open) dialog.showModal();
  }

  function fill(id, table, row, caption) {
    const image = $(id);
    image.onerror = () => { image.onerror = null; image.src = table.thumbnail[row]; }; // a link whose image has gone
    image.src = table.full_size[row] || table.thumbnail[row];
    image.alt = caption;
    image.nextElementSibling.textContent = caption;
  }

  function recordOf(i) {
    const list = G.lists[I.list[i]], w = I.strength[i] ** G.gamma, b = name(I.target[i]), known = G.unlabelled[I.unlabelled[i]];
    const a = known ? `(${known.label})` : name(I.source[i]);
    const label = !known && I.source[i] === I.target[i] ? `1 ${a}` : `${(1 - w).toFixed(3)} ${a} + ${w.toFixed(3)} ${b}`;
    const entries = [
      ["prompt", G.prompts[I.prompt[i]]], ["strength", number(I.strength[i])], [`soft label (gamma ${number(G.gamma)})`, label],
      ["seed", I.seed[i]], ["number", String(I.number[i])], ["source image", I.real[i] >= 0 ? G.sources.key[I.real[i]] : ""],
      ["file", I.path[i]], ["subset", `${G.subsets[list.subset]} (${list.folder}, ${list.list})`],
    ];
    Object.keys(G.scores).forEach((score) => entries.push([G.scores[score].label, scoreText(score, i)]));
    return entries.filter(([, text]) => text);
  }

  // -------------------------------------------------------------------- events

  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("controls").addEventListener("change", (event) => event.target.id !== "size" && arrange());
  $("size").addEventListener("input", () => {
    wish = Number($("size").value);
    layOut();
    move(current);
  });
  $("save").addEventListener("click", save);
  $("undo").addEventListener("click", undo);
  $("open").addEventListener("change", (event) => {
    if (event.target.files[0]) open(event.target.files[0]);
    event.target.value = "";
  });
  box.addEventListener("click", (event) => {
    const target = event.target.closest(".card");
    if (!target) return;
    move(Number(target.dataset.place));
    box.focus({ preventScroll: true });
    event.target.closest(".mark") ? toggle(order[current]) : showDetail();
  });
  $("previous").addEventListener("click", () => step(-1));
  $("next").addEventListener("click", () => step(1));
  $("reject").addEventListener("click", () => toggle(order[current]));
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => box.focus({ preventScroll: true }));
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  document.addEventListener("keydown", pressed);
  viewport.addEventListener("scroll", () => draw(), { passive: true });
  new ResizeObserver(() => (viewport.clientWidth === width ? draw() : layOut())).observe(viewport);

  restore();
  arrange();
  box.focus({ preventScroll: true });
})();
