"use strict";
// The page of a report. Text from the data enters by textContent only; nothing is asked from elsewhere.
(() => {
  const inline = document.getElementById("report-data");
  const D = inline ? JSON.parse(inline.textContent) : window.REPORT_DATA;
  const root = document.documentElement;
  const main = document.getElementById("main");
  root.classList.replace("no-js", "js");
  const COLOURS = ["--for", "--against"].map((name) => rgb(getComputedStyle(root).getPropertyValue(name)));
  const state = { k: D.k, overlay: true, opacity: 0.6, off: new Set(), move: () => {} };

  // -- elements -----------------------------------------------------------------------------------------------------

  function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === undefined || value === null || value === false) continue;
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (name === "style") node.style.cssText = value;
      else node.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat(3)) {
      if (child === undefined || child === null || child === false) continue;
      node.append(child instanceof Node ? child : String(child));
    }
    return node;
  }
  const h = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
  const s = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
  const a = (href, ...children) => h("a", { href }, ...children);
  const percent = (value, digits = 1) =>
    value === null || value === undefined ? "–" : (100 * value).toFixed(digits) + " %";
  const number = (value, digits = 3) =>
    value === null || value === undefined ? "–" : String(Number(Number(value).toPrecision(digits)));
  const signed = (value, digits = 3) => (value > 0 ? "+" : "") + value.toFixed(digits);
  const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : word.endsWith("s") ? "es" : "s"}`;
  const name = (index) => D.names[index];
  const isolated = (index) => h("bdi", {}, name(index));
  const classLink = (index) => a(`#/class/${index}`, isolated(index));
  const chip = (index) => h("a", { class: "chip", href: `#/class/${index}`, title: name(index) }, isolated(index));
  const channelLink = (channel, text) => a(`#/channel/${channel}`, text || `channel ${channel}`);
  function rgb(text) {
    const value = parseInt(text.trim().slice(1), 16);
    return [value >> 16, (value >> 8) & 255, value & 255];
  }

  // -- chunks of bytes, decoded when they are needed ------------------------------------------------------------------

  const chunks = new Map(), waiting = new Map();
  function bytes(text) {
    const raw = atob(text), result = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) result[i] = raw.charCodeAt(i);
    return result;
  }
  window.reportChunk = (id, text) => waiting.get(id)(bytes(text));
  function chunk(id) {
    if (!chunks.has(id)) {
      const element = document.getElementById("chunk-" + id);
      chunks.set(id, new Promise((resolve, reject) => {
        if (element) return resolve(bytes(element.textContent));
        waiting.set(id, resolve);
        const script = h("script", { src: `chunks/${id}.js` });
        script.addEventListener("error", () => reject(new Error(`chunks/${id}.js is missing`)));
        document.head.append(script);
      }));
    }
    return chunks.get(id);
  }
  const starts = [0];
  for (const length of D.pictures.lengths) starts.push(starts[starts.length - 1] + length);
  const urls = new Map();
  function picture(index) {
    if (!urls.has(index)) {
      const part = Math.floor(index / D.pictures.chunk), first = starts[part * D.pictures.chunk];
      urls.set(index, chunk("t" + part).then((all) => URL.createObjectURL(
        new Blob([all.slice(starts[index] - first, starts[index + 1] - first)], { type: "image/webp" }))));
    }
    return urls.get(index);
  }
  const classes = D.names.length, channels = D.channels;
  const order = Object.keys(D.shown).map(Number).sort((x, y) => x - y);
  const rowOf = new Map(order.map((channel, row) => [channel, row]));
  async function mapOf(channel, place) {
    if (!D.maps) return null;
    const row = rowOf.get(channel), part = Math.floor(row / D.maps.rows);
    const [height, width] = D.maps.size, size = height * width, all = await chunk("m" + part);
    const start = ((row - part * D.maps.rows) * D.perChannel + place) * size;
    return Float32Array.from(all.subarray(start, start + size), (value) => (value - 128) / 127);
  }
  function int16(all, start, length) {
    return new Int16Array(all.buffer.slice(all.byteOffset + 2 * start, all.byteOffset + 2 * (start + length)));
  }
  let headRows = null;
  function head() {
    const parts = Math.ceil(classes / D.head.rows);
    headRows = headRows || Promise.all(Array.from({ length: parts }, (_, i) => chunk("w" + i))).then((all) => {
      const rows = [];
      for (let row = 0; row < classes; row++) {
        const part = Math.floor(row / D.head.rows);
        rows.push(int16(all[part], (row - part * D.head.rows) * channels, channels));
      }
      return rows;
    });
    return headRows;
  }
  async function weights(row) {
    const part = Math.floor(row / D.head.rows);
    const values = int16(await chunk("w" + part), (row - part * D.head.rows) * channels, channels);
    return Float64Array.from(values, (value) => value * D.head.scales[row]);
  }
  async function features(index) {
    const part = Math.floor(index / 64);
    const values = int16(await chunk("f" + part), (index - part * 64) * channels, channels);
    return Float64Array.from(values, (value) => value * D.examples[index].scale);
  }
  async function exampleMaps(index) {
    if (!D.exampleMaps) return null;
    const [height, width] = D.exampleMaps.size, size = height * width, part = Math.floor(index / D.exampleMaps.rows);
    const all = await chunk("e" + part), start = (index - part * D.exampleMaps.rows) * 2 * size;
    return [0, 1].map((side) =>
      Float32Array.from(all.subarray(start + side * size, start + (side + 1) * size), (value) => (value - 128) / 127));
  }

  // -- pictures -------------------------------------------------------------------------------------------------------

  function paint(canvas, values, size, opacity = 1) {
    [canvas.height, canvas.width] = size;
    const context = canvas.getContext("2d"), image = context.createImageData(size[1], size[0]);
    values.forEach((value, i) => {
      const colour = COLOURS[value < 0 ? 1 : 0];
      image.data.set([colour[0], colour[1], colour[2], Math.round(255 * opacity * Math.min(1, Math.abs(value)))], 4 * i);
    });
    context.putImageData(image, 0, 0);
  }
  function frame(index, alt, values, size) {
    const image = h("img", { alt });
    const node = h("span", { class: "frame" + (D.pictures.small ? " small" : "") }, image);
    if (index >= 0) picture(index).then((url) => { image.src = url; });
    if (values) {
      const canvas = h("canvas", { "aria-hidden": "true" });
      node.append(canvas);
      Promise.resolve(values).then((map) => {
        if (!map) return canvas.remove();
        const draw = () => { canvas.hidden = !state.overlay; paint(canvas, map, size, state.opacity); };
        canvas.redraw = draw;
        draw();
        // a map lies on the picture, which may not fill the square
        image.addEventListener("load", () => {
          const { naturalWidth: w, naturalHeight: t } = image;
          if (w !== t) canvas.style.cssText = w > t ? `inset:${50 - 50 * t / w}% 0;height:${100 * t / w}%` : `inset:0 ${50 - 50 * w / t}%;width:${100 * w / t}%`;
        });
      });
    }
    return node;
  }
  function tiles(channel, own) {
    const shown = D.shown[channel] || [];
    if (!shown.length || !D.pictures.lengths.length) return h("p", { class: "soft" }, D.pictures.lengths.length ? "No judged image." : "There are no pictures: the inputs are not images.");
    return h("div", { class: "tiles" }, shown.map(([index, value, label], place) => h("figure", { class: "tile" },
      frame(index, `${name(label)}, activation ${number(value)}`, D.maps && mapOf(channel, place), D.maps && D.maps.size),
      h("figcaption", { title: name(label) }, label === own ? h("b", {}, isolated(label)) : isolated(label), h("br"), number(value)))));
  }
  function scale(channel) {
    if (!D.maps) return null;
    const largest = D.maps.largest[rowOf.get(channel)], [f, g] = COLOURS.map((c) => c.join(","));
    const gradient = D.maps.signed
      ? `linear-gradient(90deg, rgb(${g}), rgba(${g},0) 50%, rgba(${f},0) 50%, rgb(${f}))` : `linear-gradient(90deg, rgba(${f},0), rgb(${f}))`;
    return h("div", { class: "scale", title: "One scale for all pictures of this channel, in units of the feature map" },
      D.maps.signed ? "−" + number(largest) : "0", h("i", { style: `background:${gradient}` }), number(largest));
  }
  const placeBytes = D.places && D.places.values ? bytes(D.places.values) : null;
  function whereMap(row, place) {
    if (!placeBytes || row < 0 || place < 0) return null;
    const [height, width] = D.places.size, size = height * width, start = (row * D.most + place) * size;
    const canvas = h("canvas", { class: "mini", role: "img", "aria-label": "Where the channel fires on average" });
    paint(canvas, Array.from(placeBytes.subarray(start, start + size), (value) => value / 255), D.places.size);
    return h("div", { class: "where" }, canvas, h("span", {}, "Where it fires on average", h("br"), "on judged images of ", isolated(row)));
  }
  function overlayControls() {
    const redraw = () => main.querySelectorAll(".frame canvas").forEach((canvas) => canvas.redraw && canvas.redraw());
    if (!D.maps) return null;
    return [
      h("label", {}, h("input", { type: "checkbox", id: "overlay", checked: state.overlay,
        onchange: (event) => { state.overlay = event.target.checked; redraw(); } }), "maps over the pictures"),
      h("label", {}, "opacity", h("input", { type: "range", min: 0.1, max: 1, step: 0.05, value: state.opacity, "aria-label": "Opacity of the maps",
        oninput: (event) => { state.opacity = Number(event.target.value); redraw(); } })),
    ];
  }
  function shareBar(share) {
    if (share.value === null) return h("span", { class: "soft" }, "no images");
    return h("span", { class: "bar", role: "img", "aria-label": `${percent(share.value)}, 95 % interval ${percent(share.low)} to ${percent(share.high)}` },
      h("i", { style: `width:${100 * share.value}%` }),
      h("em", { style: `left:${100 * share.low}%;width:${100 * (share.high - share.low)}%` }));
  }
  const intervalText = (share) => share.value === null ? "no images" : `${percent(share.value)} (95 % interval ${percent(share.low)} to ${percent(share.high)})`;

  // -- views ----------------------------------------------------------------------------------------------------------

  // classes of which something is known
  const known = D.names.map((_, index) => index).filter((index) => D.samples[index] > 0 || D.trained[index] > 0);
  const ROWS = 100;
  const pairsOf = (test) => D.pairs.filter(test);
  function notes() {
    return [...D.about.notes, ...D.dropped].map((note) => h("p", { class: "note" }, note));
  }
  function figure(value, words) {
    return h("div", { class: "figure" }, h("b", {}, value), h("span", {}, words));
  }
  function curve() {
    const points = (kind) => D.curve.filter((row) => row.kind === kind);
    const own = points("filters"), random = points("random"), dense = points("dense")[0];
    const left = 44, right = 470, top = 12, bottom = 218, most = Math.max(...own.map((row) => row.k), 2);
    const x = (k) => left + (right - left) * Math.log(k) / Math.log(most), y = (share) => bottom - (bottom - top) * share;
    const path = (rows, key) => rows.map((row, i) => `${i ? "L" : "M"}${x(row.k).toFixed(1)},${y(row[key]).toFixed(1)}`).join("");
    const words = own.map((row) => `k = ${row.k}: ${percent(row.value)}`).join("; ");
    return s("svg", { viewBox: "0 0 590 256", width: "100%", role: "img", "aria-label": `Accuracy with only k channels for each class. ${words}` },
      [0, 0.25, 0.5, 0.75, 1].map((share) => [s("line", { class: "axis", x1: left, x2: right, y1: y(share), y2: y(share) }),
        s("text", { x: left - 8, y: y(share) + 4, "text-anchor": "end" }, `${100 * share}%`)]),
      random.length && s("path", { class: "band", d: path(random, "high") + path([...random].reverse(), "low").replace("M", "L") + "Z" }),
      random.length && s("path", { class: "random", d: path(random, "value") }),
      dense && s("line", { class: "line dense", x1: left, x2: right, y1: y(dense.value), y2: y(dense.value) }),
      s("path", { class: "line", d: path(own, "value") }),
      own.map((row) => [s("line", { class: "ci", x1: x(row.k), x2: x(row.k), y1: y(row.low), y2: y(row.high) }),
        s("circle", { class: "dot", cx: x(row.k), cy: y(row.value), r: 3.5 }, s("title", {}, `k = ${row.k}: ${percent(row.value)} (${percent(row.low)} to ${percent(row.high)})`)),
        s("text", { x: x(row.k), y: bottom + 18, "text-anchor": "middle" }, row.k)]),
      s("text", { x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, "k: channels kept for each class"),
      labelled([[own, `${D.method}`, "ink"], [dense ? [dense] : [], "all channels", ""], [random, "random channels", ""]], right, y));
  }
  function labelled(entries, right, y) {
    const rows = entries.filter(([rows]) => rows.length).map(([rows, text, kind]) => ({ text, kind, y: y(rows[rows.length - 1].value) + 4 })).sort((p, q) => p.y - q.y);
    rows.forEach((row, i) => { if (i) row.y = Math.max(row.y, rows[i - 1].y + 15); });
    return rows.map((row) => s("text", { x: right + 10, y: row.y, class: row.kind }, row.text));
  }
  function overview() {
    const worst = D.pairs.slice(0, 5), about = D.about;
    const sorted = { key: "index", up: true, all: false };
    const rows = known.map((index) => ({ index, recall: D.recall[index].value, samples: D.samples[index], name: name(index) }));
    const body = h("tbody"), more = h("button", { type: "button", onclick: () => { sorted.all = true; draw(); } }, `Show all ${rows.length} classes`);
    const draw = () => {
      rows.sort((p, q) => {
        const x = p[sorted.key], y = q[sorted.key];
        if (x === null || y === null) return (x === null) - (y === null);
        return (typeof x === "string" ? x.localeCompare(y) : x - y) * (sorted.up ? 1 : -1);
      });
      more.hidden = sorted.all || rows.length <= ROWS;
      body.replaceChildren(...rows.slice(0, sorted.all ? rows.length : ROWS).map(({ index }) => {
        const rivals = classes <= 200 ? pairsOf(([t]) => t === index).slice(0, 2) : [];
        return h("tr", {}, h("th", { scope: "row" }, classLink(index)),
          h("td", {}, shareBar(D.recall[index]), " ", D.recall[index].value === null ? "" : percent(D.recall[index].value)),
          h("td", { class: "n" }, D.samples[index]),
          h("td", {}, D.top[index].slice(0, D.k).map((channel, i) => [i ? ", " : "", channelLink(channel, String(channel))])),
          classes <= 200 && h("td", {}, rivals.map(([t, p, n], i) => [i ? ", " : "", a(`#/why/${p}/${t}`, isolated(p), ` ${n}`)])));
      }));
    };
    const column = (key, text, kind) => h("th", { scope: "col", class: kind }, h("button", { type: "button", onclick: () => {
      sorted.up = sorted.key === key ? !sorted.up : true; sorted.key = key; draw();
    } }, text, " ↕"));
    draw();
    return [
      h("h1", {}, `${about.title}: which channels work for which class`),
      h("p", { class: "lead" }, `Network ${about.model}, head ${about.layer}. ${plural(channels, "channel")}, ${plural(classes, "class")}. ` +
        `Filters (${D.method}) from ${plural(about.trainImages, "image")}, judged on ${plural(about.judgedImages, "image")}. Made ${about.date}.`),
      notes(),
      h("div", { class: "figures" },
        figure(percent(D.all.value), D.all.value === null ? "accuracy" : `accuracy, 95 % interval ${percent(D.all.low)} to ${percent(D.all.high)}`),
        figure(D.samples.reduce((x, y) => x + y, 0) - D.right.reduce((x, y) => x + y, 0), "images classified wrongly"),
        figure(order.length, `of ${channels} channels are among the ${D.most} strongest of a class`)),
      h("div", { class: "grid" },
        h("section", { class: "card" }, h("h3", {}, "Accuracy with only k channels for each class"), curve(),
          h("p", { class: "soft" }, "Band: as many random channels, 95 % interval of the mean. If the line is far above the band, the channels carry their class.")),
        h("section", { class: "card" }, h("h3", {}, "Most confused"),
          worst.length ? h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "true"), h("th", { scope: "col" }, "taken for"), h("th", { scope: "col", class: "n" }, "images"), h("th", {}, h("span", { class: "hidden" }, "link")))),
            h("tbody", {}, worst.map(([t, p, n]) => h("tr", {}, h("td", {}, classLink(t)), h("td", {}, classLink(p)), h("td", { class: "n" }, n), h("td", {}, a(`#/why/${p}/${t}`, "why?"))))))
            : h("p", {}, "No image was classified wrongly."),
          D.suspects.length > 0 && h("p", {}, "First suspect: ", channelLink(D.suspects[0].channel), " for ", classLink(D.suspects[0].class), ". ", a("#/suspects", "All suspects")))),
      h("h2", {}, "Classes"),
      h("div", { class: "scroll" }, h("table", { id: "classes" },
        h("thead", {}, h("tr", {}, column("name", "class"), column("recall", "recall"), column("samples", "images", "n"),
          h("th", { scope: "col" }, "strongest channels"), classes <= 200 && h("th", { scope: "col" }, "taken for"))), body)),
      more,
      known.length < classes && h("p", { class: "soft" }, `${classes - known.length} of ${classes} classes have no image and are not listed.`),
    ];
  }

  function alsoIn(channel, k, but) {
    const found = [];
    D.top.forEach((row, index) => { if (index !== but && row.slice(0, k).includes(channel)) found.push(index); });
    return found;
  }
  function alsoWords(found) {
    return found.length ? [found.slice(0, 8).map(chip), found.length > 8 ? ` and ${found.length - 8} more` : ""] : h("span", {}, "no other class");
  }
  function filterCard(row, place) {
    const channel = D.top[row][place], weight = h("dd", {}, "…");
    weights(row).then((values) => { weight.textContent = signed(values[channel]); });
    let stable = null;
    if (D.stability) {
      const parts = Number(D.stability[row][place][state.k - 1]);
      stable = h("dd", { title: "Among the strongest k in so many fifths of the training images" },
        h("span", { class: "dots", "aria-hidden": "true" }, "●".repeat(parts) + "○".repeat(D.parts - parts)), ` ${parts} of ${D.parts}`);
    }
    return h("article", { class: "card filter", "data-channel": channel },
      h("div", {}, h("h3", {}, `${place + 1}. `, channelLink(channel)),
        h("dl", {},
          h("dt", {}, D.perImage ? "score / image" : "score"), h("dd", {}, number(D.scores[row][place])),
          h("dt", {}, "weight"), weight,
          stable && h("dt", {}, "stable"), stable,
          h("dt", {}, "also in"), h("dd", {}, alsoWords(alsoIn(channel, state.k, row)))),
        whereMap(row, place)),
      h("div", {}, tiles(channel, row), scale(channel)));
  }
  function classView(row) {
    const cards = h("div", { id: "cards" }), told = h("output", {}, state.k);
    const draw = () => {
      told.textContent = state.k;
      cards.replaceChildren(...D.top[row].slice(0, state.k).map((_, place) => filterCard(row, place)));
    };
    if (D.top[row].length) draw();
    else cards.append(h("p", { class: "note" }, "This class had no training image, so nothing is known of its channels."));
    const taken = pairsOf(([t]) => t === row), mistaken = pairsOf(([, p]) => p === row);
    const list = (pairs, link) => pairs.length ? pairs.slice(0, 6).map(link) : h("span", { class: "soft" }, "none");
    const at = known.indexOf(row);
    state.move = (step) => go(`#/class/${at < 0 ? known[0] : known[(at + step + known.length) % known.length]}`);
    state.confusions = taken.length ? `#/why/${taken[0][1]}/${row}` : "#/confusions";
    return [
      h("h1", {}, isolated(row)),
      h("p", {}, "Recall ", shareBar(D.recall[row]), " ", intervalText(D.recall[row]), `. ${plural(D.samples[row], "judged image")}, ${plural(D.trained[row], "training image")}.`),
      h("p", {}, "Taken for: ", list(taken, ([t, p, n]) => h("a", { class: "chip", href: `#/why/${p}/${t}` }, isolated(p), ` ${n}`)),
        " Mistaken for it: ", list(mistaken, ([t, p, n]) => h("a", { class: "chip", href: `#/why/${p}/${t}` }, isolated(t), ` ${n}`))),
      D.top[row].length > 0 && h("div", { class: "controls" },
        h("label", {}, "k", h("input", { id: "k", type: "range", min: 1, max: D.most, step: 1, value: state.k, "aria-label": "Number of channels",
          oninput: (event) => { state.k = Number(event.target.value); draw(); } }), told),
        overlayControls()),
      h("h2", { class: "hidden" }, "Filter cards"),
      D.top[row].length > 0 && h("p", { class: "soft" }, "The strongest channels of the class. Pictures: the judged images, of any class, that activate the channel most; below each, its true class (bold: this one) and the activation."),
      cards,
    ];
  }

  function channelView(channel) {
    if (!rowOf.has(channel)) {
      return [h("h1", {}, `Channel ${channel}`), h("p", {}, channel < channels
        ? `It is not among the ${D.most} strongest channels of any class, so the report has no pictures of it.` : `There is no such channel: the head reads ${channels}.`), weightList(channel)];
    }
    const at = order.indexOf(channel);
    state.move = (step) => go(`#/channel/${order[(at + step + order.length) % order.length]}`);
    const users = [];
    D.top.forEach((row, index) => { const place = row.indexOf(channel); if (place >= 0) users.push([index, place]); });
    users.sort((p, q) => p[1] - q[1]);
    return [
      h("h1", {}, `Channel ${channel}`),
      h("p", { class: "lead" }, `Among the ${D.most} strongest of ${plural(users.length, "class")}.`),
      h("div", { class: "controls" }, overlayControls() || "no maps"),
      h("section", { class: "card" }, h("h3", {}, "Images that activate it most"), h("br"), tiles(channel, users.length === 1 ? users[0][0] : -1), scale(channel)),
      h("h2", {}, "Classes that use it"),
      h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["class", "rank", D.perImage ? "score / image" : "score", "where it fires"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, users.slice(0, 60).map(([row, place]) => h("tr", {}, h("th", { scope: "row" }, classLink(row)), h("td", {}, place + 1), h("td", {}, number(D.scores[row][place])), h("td", {}, whereMap(row, place) || "–")))))),
      users.length > 60 && h("p", { class: "soft" }, `and ${users.length - 60} more classes`),
      weightList(channel),
    ];
  }
  function weightList(channel) {
    const body = h("tbody");
    if (channel < channels) head().then((rows) => {
      const all = rows.map((row, index) => [index, row[channel] * D.head.scales[index]]).sort((p, q) => q[1] - p[1]);
      const shown = all.length > 12 ? [...all.slice(0, 6), ...all.slice(-6)] : all, most = Math.max(...shown.map(([, w]) => Math.abs(w)), 1e-9);
      body.replaceChildren(...shown.map(([index, w]) => h("tr", {}, h("th", { scope: "row" }, classLink(index)), h("td", { class: "track" }, bar(w / most)), h("td", { class: "n" }, signed(w)))));
    });
    return [h("h2", {}, "Its weights in the head"), h("p", { class: "soft" }, h("span", { class: "for" }, "for"), " and ", h("span", { class: "against" }, "against"), " a class; the largest of both signs"), h("div", { class: "card" }, h("table", { class: "contributions" }, body))];
  }
  function bar(share) {
    const width = 50 * Math.min(1, Math.abs(share));
    return h("i", { style: `left:${share >= 0 ? 50 : 50 - width}%;width:${width}%;background:var(--${share >= 0 ? "for" : "against"})` });
  }

  function confusions() {
    const wrong = D.pairs.reduce((sum, pair) => sum + pair[2], 0);
    let picture;
    if (D.matrix) {
      const most = Math.max(1, ...D.pairs.map((pair) => pair[2]));
      picture = h("div", { class: "scroll" }, h("table", { class: "matrix" },
        h("caption", {}, "Rows: the true class. Columns: what the network says. Hatched: right answers."),
        h("thead", {}, h("tr", {}, h("td"), D.names.map((_, index) => h("th", { scope: "col", title: name(index) }, h("span", {}, isolated(index)))))),
        h("tbody", {}, D.matrix.map((row, t) => h("tr", {}, h("th", { scope: "row", title: name(t) }, classLink(t)), row.map((n, p) => t === p
          ? h("td", { class: "right", title: `${name(t)}: ${n} right` }, n || "")
          : h("td", { style: n ? `background:rgba(var(--heat),${0.12 + 0.6 * n / most})` : "" }, n ? h("a", { href: `#/why/${p}/${t}`, title: `${name(t)} taken for ${name(p)}: ${n}`, "aria-label": `${n} images of ${name(t)} taken for ${name(p)}` }, n) : "")))))));
    } else {
      picture = h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, ["true", "taken for", "images", ""].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, D.pairs.slice(0, 300).map(([t, p, n]) => h("tr", {}, h("td", {}, classLink(t)), h("td", {}, classLink(p)), h("td", {}, n), h("td", {}, a(`#/why/${p}/${t}`, "why?")))))),
        D.pairs.length + D.pairsLeftOut > 300 && h("p", { class: "soft" }, `The 300 most frequent of ${D.pairs.length + D.pairsLeftOut} pairs.`));
    }
    return [h("h1", {}, "Confusions"), h("p", { class: "lead" }, wrong ? "Choose a number to see the images, and the channels that made the network take one class for the other." : "No image was classified wrongly. On the page of a class are its strongest channels."),
      picture, wrong === 0 && closest()];
  }
  function closest() {
    const close = D.examples.filter((example) => !example.wrong).slice(0, 12);
    return close.length > 0 && [h("h2", {}, "Nearly wrong"), h("p", {}, close.map((example) => [a(`#/why/${example.rival}/${example.true}`, isolated(example.true), " rather than ", isolated(example.rival)), h("br")]))];
  }

  function whyView(won, lost, chosen) {
    if (!(won < classes && lost < classes) || won === lost) return [h("h1", {}, "No such pair of classes"), a("#/confusions", "Confusions")];
    const matching = D.examples.map((example, index) => [example, index]).filter(([example]) => example.rival === won && example.true === lost);
    const pair = D.pairs.find(([t, p]) => t === lost && p === won), count = pair ? pair[2] : 0;
    const header = [
      h("h1", {}, "Why ", h("span", { class: "for" }, isolated(won)), " and not ", h("span", { class: "against" }, isolated(lost)), "?"),
      h("p", { class: "lead" }, `${plural(count, "judged image")} of `, classLink(lost), " taken for ", classLink(won), ". ", a(`#/why/${lost}/${won}`, "The other way round"), " · ", a("#/confusions", "All confusions")),
    ];
    if (!matching.length) return [...header, h("p", { class: "note" }, count ? "None of these images is in the report, to keep its size." : "No judged image was confused in this way.")];
    let at = matching.findIndex(([, index]) => index === chosen);
    if (at < 0) at = 0;
    const detail = h("div", { id: "detail" }), buttons = [];
    const select = (place) => {
      at = (place + matching.length) % matching.length;
      state.off = new Set();
      buttons.forEach((button, i) => button.setAttribute("aria-pressed", String(i === at)));
      history.replaceState(null, "", `#/why/${won}/${lost}/${matching[at][1]}`);
      explain(detail, matching[at][1], won, lost);
    };
    matching.forEach(([example, index], place) => buttons.push(h("button", { type: "button", class: "tile", "aria-pressed": "false", onclick: () => select(place) },
      frame(example.picture, `Image ${example.place}`), h("span", { class: "soft" }, example.wrong ? `image ${example.place}` : `image ${example.place}, right`))));
    state.move = (step) => select(at + step);
    select(at);
    return [...header, h("div", { class: "tiles", role: "group", "aria-label": "Images" }, buttons),
      matching.length < count && h("p", { class: "soft" }, `${matching.length} of ${count} images are in the report.`), detail];
  }
  let turn = 0;
  async function explain(node, index, won, lost) {
    const mine = ++turn, example = D.examples[index];
    const [rows, values, maps] = await Promise.all([head(), features(index), exampleMaps(index)]);
    if (mine !== turn) return;
    const weight = (row, channel) => rows[row][channel] * D.head.scales[row];
    const parts = Array.from({ length: channels }, (_, channel) => (weight(won, channel) - weight(lost, channel)) * values[channel]);
    const ranked = parts.map((_, channel) => channel).sort((x, y) => Math.abs(parts[y]) - Math.abs(parts[x]));
    const listed = ranked.slice(0, 14), others = ranked.slice(14), bias = D.head.bias[won] - D.head.bias[lost];
    const logits = () => rows.map((row, index) => {
      let sum = 0;
      for (let channel = 0; channel < channels; channel++) if (!state.off.has(channel)) sum += row[channel] * values[channel];
      return sum * D.head.scales[index] + D.head.bias[index];
    });
    const before = logits(), bars = h("div"), table = h("div");
    const most = Math.max(...listed.map((channel) => Math.abs(parts[channel])), Math.abs(bias), 1e-9);
    const toggle = (channel) => { state.off.has(channel) ? state.off.delete(channel) : state.off.add(channel); draw(); };
    const line = (label, value, channel) => h("tr", { class: channel !== undefined && state.off.has(channel) ? "off" : "" },
      h("td", {}, channel !== undefined && h("input", { type: "checkbox", checked: !state.off.has(channel), "data-channel": channel, "aria-label": `Channel ${channel} is on`, onchange: () => toggle(channel) })),
      h("th", { scope: "row" }, label), h("td", { class: "track" }, bar(value / most)), h("td", { class: "n", "data-contribution": value }, signed(value)));
    function draw() {
      const focus = document.activeElement && document.activeElement.dataset ? document.activeElement.dataset.channel : undefined;
      const after = logits(), on = (channel) => (state.off.has(channel) ? 0 : parts[channel]);
      const rest = others.reduce((sum, channel) => sum + on(channel), 0), difference = after[won] - after[lost];
      bars.replaceChildren(h("table", { class: "contributions" },
        h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "on"), h("th", { scope: "col" }), h("th", { scope: "col" }, h("span", { class: "against" }, "◀ ", isolated(lost)), " · ", h("span", { class: "for" }, isolated(won), " ▶")), h("th", { scope: "col", class: "n" }, "adds"))),
        h("tbody", {}, listed.map((channel) => line(channelLink(channel), on(channel), channel)),
          others.length > 0 && line(`${others.length} other channels`, rest), line("bias", bias),
          h("tr", { class: "total" }, h("td"), h("th", { scope: "row" }, "difference of logits"), h("td"), h("td", { class: "n", id: "difference", "data-difference": difference }, signed(difference))))));
      const shown = [...new Set([won, lost, ...after.map((_, i) => i).sort((x, y) => after[y] - after[x]).slice(0, 5)])].sort((x, y) => after[y] - after[x]);
      table.replaceChildren(h("table", { id: "logits" }, h("thead", {}, h("tr", {}, ["class", "logit", state.off.size ? `without ${state.off.size}` : "now"].map((text, i) => h("th", { scope: "col", class: i ? "n" : "" }, text)))),
        h("tbody", {}, shown.map((row, i) => h("tr", { "data-class": row }, h("th", { scope: "row", class: row === won ? "for" : row === lost ? "against" : "" }, isolated(row), i === 0 ? " ←" : ""),
          h("td", { class: "n" }, before[row].toFixed(3)), h("td", { class: "n", "data-logit": after[row] }, after[row].toFixed(3)))))));
      if (focus !== undefined) { const box = bars.querySelector(`input[data-channel="${focus}"]`); if (box) box.focus(); }
      const best = after.indexOf(Math.max(...after));
      document.getElementById("status").textContent = `${name(best)} has the highest logit`;
    }
    const clear = (list) => { list.forEach((channel) => state.off.add(channel)); draw(); };
    const strongest = ranked.filter((channel) => parts[channel] > 0).slice(0, 3);
    draw();
    const legend = (colour, text) => h("span", { class: colour }, text);
    node.replaceChildren(h("div", { class: "why" },
      h("section", { class: "card" },
        h("h3", {}, `Image ${example.place}: `, isolated(lost), example.wrong ? ", taken for " : ", right, before ", isolated(won)), h("br"),
        maps ? [h("div", { class: "pair" },
          h("figure", { class: "tile" }, frame(example.picture, "Where channels speak for the class that won", maps[0], D.exampleMaps.size), h("figcaption", {}, legend("for", "for "), isolated(won))),
          h("figure", { class: "tile" }, frame(example.picture, "Where channels speak for the true class", maps[1], D.exampleMaps.size), h("figcaption", {}, legend("against", "for "), isolated(lost)))),
          h("div", { class: "scale" }, "0", h("i", { style: `background:linear-gradient(90deg, rgba(${COLOURS[0]},0), rgb(${COLOURS[0]}))` }), number(D.exampleMaps.largest[index]), " added to the difference at one position"),
          !D.addsUp && h("p", { class: "soft" }, "The head reads a class token: the maps show what it would read at the other places."),
          h("div", { class: "controls" }, overlayControls())]
          : h("div", { style: "max-width:220px" }, frame(example.picture, `Image ${example.place}`)),
        h("h2", {}, "Logits"), table),
      h("section", { class: "card" }, h("h3", {}, "What each channel adds to the difference"),
        h("p", { class: "soft" }, "Untick a channel to set it to 0: the logits are computed anew."),
        h("p", {}, h("button", { type: "button", id: "three-off", onclick: () => clear(strongest) }, "the 3 strongest for ", isolated(won), " to 0"), " ", h("button", { type: "button", id: "all-on", onclick: () => { state.off = new Set(); draw(); } }, "all on")), bars)));
  }

  function suspectsView() {
    const list = h("div"), more = h("button", { type: "button", onclick: () => show(true) }, "Show all");
    const sentence = (suspect) => {
      const drop = suspect.recall - suspect.without;
      const words = [`Without this channel the class has a recall of ${percent(suspect.without)} instead of ${percent(suspect.recall)}`, drop < 0.005 ? ": it can do without. " : ". "];
      words.push(`Without a random one: ${percent(suspect.random)}. It gives ${percent(suspect.share, 0)} of the class's lead over its rivals`);
      words.push(suspect.alsoIn ? `, and ${plural(suspect.alsoIn, "other class")} use${suspect.alsoIn === 1 ? "s" : ""} it. ` : ", and no other class uses it. ");
      if (suspect.beside !== null) {
        words.push(`${percent(suspect.beside, 0)} of its map lies beside the rest of the evidence`);
        if (suspect.elsewhere !== null) words.push(`, and ${percent(suspect.elsewhere, 0)} of its average map where the evidence for other classes is not`);
        words.push(suspect.border !== null && suspect.border > (suspect.borderRest || 0) + 0.15 ? `, ${percent(suspect.border, 0)} along the border` : "");
        words.push(suspect.onePlace > 0.4 ? ", nearly always at the same place" : "");
        words.push(suspect.oneColour !== null && suspect.oneColour > 0.6 ? ", over nearly the same colour" : "", ".");
      }
      return words.join("");
    };
    const card = (suspect, rank) => h("article", { class: "card suspect", "data-suspect": `${suspect.class}-${suspect.channel}` },
      h("div", { class: "rank" }, rank + 1),
      h("div", {}, h("h3", {}, channelLink(suspect.channel), " for ", classLink(suspect.class)), h("p", {}, sentence(suspect)),
        h("dl", { class: "facts" },
          h("dt", {}, "recall"), h("dd", {}, percent(suspect.recall)),
          h("dt", {}, "without it"), h("dd", {}, `${percent(suspect.without)} (${percent(suspect.low)} to ${percent(suspect.high)})`),
          h("dt", {}, "suspicion"), h("dd", {}, number(suspect.suspicion, 2)), h("dt", {}, "images"), h("dd", {}, suspect.samples)),
        whereMap(suspect.class, D.top[suspect.class].indexOf(suspect.channel))),
      h("div", {}, tiles(suspect.channel, suspect.class), scale(suspect.channel)));
    const show = (all) => {
      list.replaceChildren(...D.suspects.slice(0, all ? D.suspects.length : 8).map(card));
      more.hidden = all || D.suspects.length <= 8;
    };
    show(false);
    return [
      h("h1", {}, "Suspects"),
      h("p", { class: "lead" }, "Channels that could be shortcuts, such as a watermark, a border or a background: one class leans on them, and they fire beside the rest of the evidence, or at a place of their own."),
      h("p", {}, "Ranked by how much the class leans on the channel (recall lost without it, beyond a random channel, plus its part of the lead) times how oddly it fires (beside the rest, or where the evidence for other classes is not). There is always a first one: look at the pictures before you believe it."),
      h("details", { class: "card" }, h("summary", {}, "What this cannot tell"),
        h("p", {}, "Where the object is, is not known: “beside” means beside the other evidence for the class. A shortcut that covers the object, that several channels share, or that no judged image has, is not found. A channel at one place can be right where objects are always at one place. A low recall without a channel shows that the network leans on it, not that it should not. The proof is another test: images of the class without the mark, and other images with it.")),
      h("div", { class: "controls" }, overlayControls() || "no maps: ranked without places"), list, more,
    ];
  }
  function methodsView() {
    return [h("h1", {}, "Methods"), h("p", { class: "lead" }, "All methods on the same network and the same images."), h("div", { class: "scroll card" }, h("table", {}, h("thead", {}, h("tr", {}, D.methods.columns.map((column) => h("th", { scope: "col" }, column)))),
      h("tbody", {}, D.methods.rows.map((row) => h("tr", {}, row.map((cell) => h("td", {}, typeof cell === "number" ? number(cell, 4) : cell === null ? "–" : cell)))))))];
  }
  function aboutView() {
    const facts = (entries) => h("dl", { class: "facts" }, Object.entries(entries).map(([key, value]) => [h("dt", {}, key), h("dd", {}, String(value))]));
    return [
      h("h1", {}, "About this report"), notes(),
      h("h2", {}, "Make it again"), h("pre", {}, D.about.command),
      h("div", { class: "grid" }, h("section", { class: "card" }, h("h3", {}, "Settings"), facts(D.about.settings)), h("section", { class: "card" }, h("h3", {}, "Versions"), facts({ ...D.about.versions, made: D.about.date }))),
      h("h2", {}, "How to read it"),
      h("p", {}, "A channel is one feature that the last layer reads. Its score says how much it works for a class, by the method under Settings. Its weight is that of the last layer. “Also in” lists the other classes that have the channel among their k strongest. “Stable” counts the fifths of the training images in which it is among the k strongest."),
      h("p", {}, "Orange speaks for a class, blue against it, and where there is no colour there is nothing. A map shows where on the image a channel is active; all pictures of a channel have one scale."),
      h("h2", {}, "Limits"),
      h("ul", {},
        h("li", {}, "A map is as coarse as the last feature map, and a position sees more of the image than it covers."),
        h("li", {}, "Pictures show the images that activate a channel most. What the channel does on others may differ."),
        h("li", {}, "Setting a channel to 0 in the page changes the last layer's input only; the network before it stays as it is."),
        h("li", {}, "Weights and features are stored with 16 bits. Logits in the page differ from the network's in the fourth digit."),
        h("li", {}, "Intervals are of 95 % and speak of the chance in the judged images, not of other data.")),
    ];
  }

  // -- routes, search, keys ---------------------------------------------------------------------------------------------

  const VIEWS = [["#/", "Overview"], ["#/confusions", "Confusions"], ["#/suspects", "Suspects"], ...(D.methods ? [["#/methods", "Methods"]] : []), ["#/about", "About"]];
  const go = (hash) => { location.hash = hash; };
  function render() {
    const [view = "", ...rest] = location.hash.replace(/^#\/?/, "").split("/"), ids = rest.map(Number);
    state.move = (step) => go(`#/class/${known[step > 0 ? 0 : known.length - 1]}`);
    state.confusions = "#/confusions";
    turn++;
    const views = {
      "": overview, class: () => (ids[0] < classes ? classView(ids[0]) : [h("h1", {}, "No such class"), a("#/", "Overview")]),
      channel: () => channelView(ids[0]), confusions, why: () => whyView(ids[0], ids[1], ids[2]), suspects: suspectsView, about: aboutView,
      ...(D.methods ? { methods: methodsView } : {}),
    };
    if (location.hash === "#main") return main.focus();
    const content = (views[view] || (() => [h("h1", {}, "No such page"), a("#/", "Overview")]))();
    main.replaceChildren(h("div", {}, content));
    const current = { class: "#/", channel: "#/", why: "#/confusions", "": "#/" }[view] || "#/" + view;
    document.getElementById("nav").replaceChildren(...VIEWS.map(([href, text]) => h("a", { href, "aria-current": href === current ? "page" : null }, text)));
    const title = main.querySelector("h1");
    document.title = `${title ? title.textContent : ""} – ${D.about.title}`;
    window.scrollTo(0, 0);
    main.dataset.view = view || "overview";
  }
  const search = document.getElementById("search"), hits = document.getElementById("hits");
  let marked = 0;
  function find() {
    const text = search.value.trim().toLowerCase(), found = [];
    if (text) {
      const starting = [], inside = [];
      D.names.forEach((label, index) => {
        const at = label.toLowerCase().indexOf(text);
        if (at >= 0) (at ? inside : starting).push([`#/class/${index}`, label]);
      });
      found.push(...starting, ...inside);
      const channel = text.match(/^(?:channel\s*|#)?(\d+)$/);
      if (channel && Number(channel[1]) < channels) found.unshift([`#/channel/${Number(channel[1])}`, `channel ${Number(channel[1])}`]);
    }
    const shown = found.slice(0, 30);
    marked = Math.min(marked, Math.max(0, shown.length - 1));
    hits.hidden = !text;
    search.setAttribute("aria-expanded", String(Boolean(text)));
    hits.replaceChildren(...(shown.length ? shown.map(([hash, label], i) => h("li", { role: "option", "aria-selected": String(i === marked), onmousedown: (event) => { event.preventDefault(); choose(hash); } }, h("bdi", {}, label))) : [h("li", {}, "nothing found")]));
    return shown;
  }
  function choose(hash) { search.value = ""; search.blur(); hits.hidden = true; go(hash); }
  search.addEventListener("input", () => { marked = 0; find(); });
  search.addEventListener("blur", () => { hits.hidden = true; });
  search.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { search.value = ""; search.blur(); }
    const shown = find();
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); marked = (marked + (event.key === "ArrowDown" ? 1 : -1) + shown.length) % Math.max(1, shown.length); find(); }
    if (event.key === "Enter" && shown.length) choose(shown[marked][0]);
  });

  const help = document.getElementById("help");
  const KEYS = [["/", "search for a class or a channel"], ["j  k", "next and previous class, channel or image"], ["c", "confusions; on a class: its most frequent one"], ["d", "dark or light"], ["?", "these keys"], ["Esc", "close"]];
  fill(help, {}, [h("h2", { id: "help-title", style: "margin-top:0" }, "Keys"), h("table", {}, h("tbody", {}, KEYS.map(([key, text]) => h("tr", {}, h("td", {}, key.split("  ").map((one) => [h("kbd", {}, one), " "])), h("td", {}, text))))), h("p", {}, h("button", { type: "button", onclick: () => help.close() }, "Close"))]);
  function theme(value) {
    root.dataset.theme = value;
    try { localStorage.setItem("report-theme", value); } catch (error) { /* a viewer may keep nothing */ }
  }
  let kept = null;
  try { kept = localStorage.getItem("report-theme"); } catch (error) { /* as above */ }
  theme(kept || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  const flip = () => theme(root.dataset.theme === "dark" ? "light" : "dark");
  document.getElementById("theme").addEventListener("click", flip);
  document.getElementById("keys").addEventListener("click", () => help.showModal());
  document.addEventListener("keydown", (event) => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && !/^(checkbox|range)$/.test(event.target.type);
    if (typing || event.ctrlKey || event.metaKey || event.altKey || help.open) return;
    const act = { "/": () => search.focus(), j: () => state.move(1), k: () => state.move(-1), c: () => go(state.confusions), d: flip, "?": () => help.showModal() }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  window.addEventListener("hashchange", () => { if (location.hash !== "#main") { render(); main.focus({ preventScroll: true }); } else main.focus(); });
  render();
})();
