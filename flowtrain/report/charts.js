"use strict";
// Draws each chart of the page as SVG from the JSON beside it, at the width that it has, and shows the values under a
// mouse, a finger or, by the arrow keys, a focused chart.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const colour = (series, i) => `var(--c${(series.colour ?? i) % 8})`;
  const extent = values => values.reduce(([a, b], v) => v == null ? [a, b] : [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  const clean = text => text.replace("-", "−");

  function node(parent, name, attributes, text) {
    const made = document.createElementNS(NS, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text != null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function element(parent, name, attributes, ...children) {
    const made = document.createElement(name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    made.append(...children);
    parent.append(made);
    return made;
  }

  function format(value, digits = 4) {
    if (value == null || !isFinite(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) {
      const [front, power] = value.toExponential(Math.max(0, digits - 1)).split("e");
      return clean(`${Number(front)}e${Number(power)}`);
    }
    const text = Number(value.toPrecision(Math.max(digits, size >= 1 ? Math.floor(Math.log10(size)) + 1 : 1)));
    return clean(size >= 1e4 ? text.toLocaleString("en") : String(text));
  }

  const STEPS = [1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 2 * 86400, 7 * 86400, 14 * 86400];
  const iso = seconds => new Date(seconds * 1000).toISOString();
  function formatTime(seconds, step = 1) {
    if (seconds == null || Math.abs(seconds) > 8e12) return "–";
    const text = iso(seconds);
    if (step >= 360 * 86400) return text.slice(0, 4);
    if (step >= 28 * 86400) return text.slice(0, 7);
    if (step >= 86400) return text.slice(0, 10);
    return step >= 60 ? `${text.slice(5, 10)} ${text.slice(11, 16)}` : text.slice(11, 19);
  }

  // ---- scales: from values to pixels and back, with ticks

  function scale(kind, low, high, start, end, count) {
    if (kind === "log") {
      if (!(low > 0)) low = high > 0 ? high / 1000 : 0.1;
      if (!(high > low)) high = low * 10;
      const a = Math.log10(low), b = Math.log10(high);
      const of = v => v > 0 ? start + (Math.log10(v) - a) / (b - a) * (end - start) : NaN;
      const every = Math.max(1, Math.ceil((b - a) / count)), ticks = [];
      for (let p = Math.floor(a); p <= b; p += every)
        for (const m of b - a < 2.5 ? [1, 2, 5] : [1]) ticks.push(Number(`${m}e${p}`));
      const inside = ticks.filter(v => v >= low * 0.999 && v <= high * 1.001);
      return {of, ticks: inside, text: v => format(v, 3), back: p => 10 ** (a + (p - start) / (end - start) * (b - a))};
    }
    if (!(high > low)) { const half = Math.abs(low) * 0.05 || 0.5; low -= half; high += half; }
    const of = v => start + (v - low) / (high - low) * (end - start);
    const back = p => low + (p - start) / (end - start) * (high - low);
    if (kind === "time") {
      const {ticks, step} = timeTicks(low, high, count);
      return {of, back, ticks, text: v => formatTime(v, step)};
    }
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map(m => m * power).find(s => s >= rough * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    const digits = Math.max(1, Math.ceil(Math.log10(Math.max(Math.abs(low), Math.abs(high)) / step)) + 2);
    return {of, back, ticks, text: v => format(Math.abs(v) < step * 1e-6 ? 0 : v, digits)};
  }

  function timeTicks(low, high, count) {
    const rough = (high - low) / Math.min(count, 4), found = STEPS.find(s => s >= rough);
    const ticks = [];
    if (found) {
      for (let t = Math.ceil(low / found) * found; t <= high; t += found) ticks.push(t);
      return {ticks, step: found};
    }
    const months = [1, 2, 3, 6, 12, 24, 60, 120, 240, 600, 1200].find(m => m * 30.4 * 86400 >= rough) ?? 6000;
    const first = new Date(low * 1000);
    for (let m = Math.floor((first.getUTCFullYear() * 12 + first.getUTCMonth()) / months) * months; ; m += months) {
      const t = Date.UTC(Math.floor(m / 12), m % 12) / 1000;
      if (t > high || ticks.length > 50) break;
      if (t >= low) ticks.push(t);
    }
    return {ticks, step: months * 30 * 86400};
  }

  const widest = texts => Math.max(0, ...texts.map(text => text.length)) * 6.6;

  // ---- the frame of a chart with two axes

  function frame(plot, data, [x0, x1], [y0, y1], width) {
    const height = Math.round(Math.min(300, Math.max(210, width * 0.58)));
    const rows = Math.max(3, Math.floor(height / 48));
    const trial = scale(data.y.scale, y0, y1, height, 0, rows);
    const box = {left: widest(trial.ticks.map(trial.text)) + 26, right: width - 14, top: 8, bottom: height - 38};
    const svg = surface(plot, data, width, height);
    const y = scale(data.y.scale, y0, y1, box.bottom, box.top, rows);
    const x = scale(data.x.scale, x0, x1, box.left, box.right, Math.max(3, Math.floor((box.right - box.left) / 80)));
    for (const tick of y.ticks) {
      node(svg, "line", {x1: box.left, x2: box.right, y1: y.of(tick), y2: y.of(tick), class: "grid"});
      node(svg, "text", {x: box.left - 6, y: y.of(tick) + 4, "text-anchor": "end"}, y.text(tick));
    }
    xAxis(svg, x, box, data.x.label);
    node(svg, "text", {transform: `translate(11 ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, data.y.label);
    return {svg, x, y, box, width, height};
  }

  function xAxis(svg, x, box, label) {
    node(svg, "line", {x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom, class: "axis"});
    for (const tick of x.ticks) {
      const at = x.of(tick);
      node(svg, "line", {x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4, class: "axis"});
      node(svg, "text", {x: at, y: box.bottom + 17, "text-anchor": "middle"}, x.text(tick));
    }
    node(svg, "text", {x: (box.left + box.right) / 2, y: box.bottom + 33, "text-anchor": "middle"}, label);
  }

  function surface(plot, data, width, height) {
    const svg = node(plot, "svg", {viewBox: `0 0 ${width} ${height}`, width, height, role: "img", tabindex: 0, "aria-label": describe(data)});
    return svg;
  }

  function describe(data) {
    const names = (data.series ?? data.tables).map(one => {
      const [low, high] = extent(one.y ?? []);
      return isFinite(low) ? `${one.name}: ${format(low)} to ${format(high)}` : one.name;
    });
    const axes = data.y ? `${[data.y.label, data.x.label].filter(Boolean).join(" by ")}; ` : "";
    return `${data.title}. ${axes}${names.join("; ")}. The arrow keys show values.`;
  }

  function legend(plot, data) {
    const series = data.series ?? data.tables;
    if (series.length < 2) return;
    const list = element(plot, "ul", {class: "legend"});
    series.forEach((one, i) => {
      const sign = element(document.createDocumentFragment(), "i", {style: `--colour:${colour(one, i)}`, class: one.dashed ? "dashed" : ""});
      element(list, "li", {}, sign, one.name);
    });
  }

  // ---- values under the pointer

  function interact(view, count, nearest, show) {
    // nearest(x, y) gives the index under a place in the drawing; show(index) its place and the tip's rows
    const {svg, plot} = view;
    const tip = element(plot, "div", {class: "tip", role: "status", hidden: ""});
    const overlay = node(svg, "g", {});
    let current = -1;
    const hide = () => { tip.hidden = true; overlay.replaceChildren(); current = -1; };
    const move = index => {
      if (index == null || index < 0 || index >= count) return hide();
      current = index;
      overlay.replaceChildren();
      const {x, y, head, rows} = show(index, overlay);
      tip.replaceChildren();
      if (head) element(tip, "b", {}, head);
      for (const [colour, text] of rows) {
        const line = element(tip, "div", {});
        if (colour) element(line, "i", {style: `--colour:${colour}`});
        line.append(text);
      }
      tip.hidden = false;
      const ratio = svg.clientWidth / svg.viewBox.baseVal.width, edge = plot.clientWidth - tip.offsetWidth;
      const right = x * ratio + 12, left = x * ratio - tip.offsetWidth - 12;
      tip.style.left = `${Math.max(0, right <= edge ? right : left >= 0 ? left : edge)}px`;
      const top = svg.getBoundingClientRect().top - plot.getBoundingClientRect().top;
      tip.style.top = `${top + Math.max(0, (y ?? view.box.top) * ratio)}px`;
    };
    const point = event => {
      const box = svg.getBoundingClientRect(), ratio = svg.viewBox.baseVal.width / box.width;
      move(nearest((event.clientX - box.left) * ratio, (event.clientY - box.top) * ratio));
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerdown", point);
    svg.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") hide(); });
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", event => {
      const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1}[event.key];
      if (event.key === "Escape") return hide();
      if (!step) return;
      event.preventDefault();
      move(current < 0 ? (step > 0 ? 0 : count - 1) : Math.min(count - 1, Math.max(0, current + step)));
    });
  }

  const cursor = (overlay, view, x) => node(overlay, "line", {x1: x, x2: x, y1: view.box.top, y2: view.box.bottom, class: "cursor"});
  const valueText = (scale, value) => scale === "time" ? `${iso(value).slice(0, 16).replace("T", " ")}` : format(value, 5);
  const ranged = (one, i) => one.low && one.low[i] != null ? ` (${format(one.low[i])} to ${format(one.high[i])})` : "";

  // ---- the kinds of charts

  function lines(plot, data, width) {
    const all = data.series.flatMap(one => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]);
    const positive = data.y.scale === "log" ? all.filter(v => v > 0) : all;
    let [low, high] = extent(positive);
    if (data.y.scale !== "log") { const room = (high - low) * 0.06; low -= room; high += room; }
    legend(plot, data);
    const view = frame(plot, data, extent(data.series.flatMap(one => one.x)), [low, high], width);
    const {svg, x, y} = view;
    data.series.forEach((one, i) => {
      if (one.low) {
        const upper = [], lower = [];
        one.x.forEach((at, k) => {
          if (one.low[k] == null || one.high[k] == null) return;
          upper.push(`${x.of(at).toFixed(1)} ${y.of(one.high[k]).toFixed(1)}`);
          lower.unshift(`${x.of(at).toFixed(1)} ${y.of(one.low[k]).toFixed(1)}`);
        });
        if (upper.length) node(svg, "path", {d: `M${[...upper, ...lower].join("L")}Z`, fill: colour(one, i), opacity: 0.18});
      }
      let path = "", open = false, alone = [];
      one.x.forEach((at, k) => {
        const place = one.y[k] == null ? NaN : y.of(one.y[k]);
        if (!isFinite(place)) { open = false; return; }
        path += `${open ? "L" : "M"}${x.of(at).toFixed(1)} ${place.toFixed(1)}`;
        if (!open && (one.y[k + 1] == null)) alone.push([x.of(at), place]);
        open = true;
      });
      node(svg, "path", {d: path, fill: "none", stroke: colour(one, i), "stroke-width": 1.8, "stroke-linejoin": "round", ...(one.dashed ? {"stroke-dasharray": "5 4"} : {})});
      for (const [cx, cy] of alone) node(svg, "circle", {cx, cy, r: 2.6, fill: colour(one, i)});
    });
    const places = [...new Set(data.series.flatMap(one => one.x))].filter(at => at != null).sort((a, b) => a - b);
    const index = data.series.map(one => new Map(one.x.map((at, k) => [at, k])));
    interact({...view, plot}, places.length, px => nearestOf(places, px, x.of), (k, overlay) => {
      const at = places[k], rows = [];
      cursor(overlay, view, x.of(at));
      data.series.forEach((one, i) => {
        const n = index[i].get(at);
        if (n == null || one.y[n] == null) return;
        node(overlay, "circle", {cx: x.of(at), cy: y.of(one.y[n]), r: 4, stroke: colour(one, i), class: "halo"});
        rows.push([colour(one, i), `${one.name}: ${valueText(data.y.scale, one.y[n])}${ranged(one, n)}${one.labels ? ` ${one.labels[n]}` : ""}`]);
      });
      return {x: x.of(at), head: `${data.x.label} ${valueText(data.x.scale, at)}`, rows};
    });
  }

  function nearestOf(places, px, of) {
    let best = -1, least = Infinity;
    places.forEach((at, k) => { const d = Math.abs(of(at) - px); if (d < least) { least = d; best = k; } });
    return best;
  }

  function scatter(plot, data, width) {
    const room = (kind, [low, high]) => kind === "log" ? [low / 1.3, high * 1.3] : [low - (high - low) * 0.06, high + (high - low) * 0.06];
    legend(plot, data);
    const ys = data.series.flatMap(one => [...one.y, ...(one.low ?? []), ...(one.high ?? [])]);
    const view = frame(plot, data, room(data.x.scale, extent(data.series.flatMap(one => one.x))), room(data.y.scale, extent(ys)), width);
    const {svg, x, y} = view, points = [];
    const many = data.series.reduce((n, one) => n + one.x.length, 0) > 200;
    data.series.forEach((one, i) => {
      let path = "";
      one.x.forEach((at, k) => {
        if (at == null || one.y[k] == null) return;
        const cx = x.of(at), cy = y.of(one.y[k]);
        if (!isFinite(cx) || !isFinite(cy)) return;
        points.push({cx, cy, one, i, k});
        path += `M${cx.toFixed(1)} ${cy.toFixed(1)}h0`;
        if (one.low && one.low[k] != null) node(svg, "line", {x1: cx, x2: cx, y1: y.of(one.low[k]), y2: y.of(one.high[k]), stroke: colour(one, i), "stroke-width": 1.5});
      });
      node(svg, "path", {d: path, stroke: colour(one, i), "stroke-width": many ? 3.5 : 7, "stroke-linecap": "round", opacity: many ? 0.55 : 0.9});
    });
    points.sort((a, b) => a.cx - b.cx);
    const nearest = (px, py) => {
      let best = null, least = 40 ** 2;
      points.forEach((p, k) => { const d = (p.cx - px) ** 2 + (p.cy - py) ** 2; if (d < least) { least = d; best = k; } });
      return best;
    };
    interact({...view, plot}, points.length, nearest, (k, overlay) => {
      const {cx, cy, one, i, k: n} = points[k];
      node(overlay, "circle", {cx, cy, r: 5, stroke: colour(one, i), class: "halo"});
      return {x: cx, y: cy, head: one.labels ? one.labels[n] : one.name, rows: [
        [null, `${data.x.label}: ${valueText(data.x.scale, one.x[n])}`],
        [colour(one, i), `${data.y.label}: ${valueText(data.y.scale, one.y[n])}${ranged(one, n)}`],
      ]};
    });
  }

  function histogram(plot, data, width) {
    const edges = data.edges, top = extent(data.series.flatMap(one => one.y))[1];
    legend(plot, data);
    const view = frame(plot, data, [edges[0], edges[edges.length - 1]], [0, (top || 1) * 1.08], width);
    const {svg, x, y, box} = view;
    data.series.forEach((one, i) => {
      let path = `M${x.of(edges[0]).toFixed(1)} ${box.bottom}`;
      one.y.forEach((v, k) => { path += `V${y.of(v ?? 0).toFixed(1)}H${x.of(edges[k + 1]).toFixed(1)}`; });
      node(svg, "path", {d: `${path}V${box.bottom}Z`, fill: colour(one, i), opacity: 0.2});
      node(svg, "path", {d: `${path}V${box.bottom}`, fill: "none", stroke: colour(one, i), "stroke-width": 1.5});
    });
    data.series.forEach((one, i) => {
      if (one.mark == null) return;
      const at = x.of(one.mark);
      node(svg, "line", {x1: at, x2: at, y1: box.top, y2: box.bottom, stroke: colour(one, i), "stroke-width": 1.5, "stroke-dasharray": "5 3"});
    });
    interact({...view, plot}, edges.length - 1, px => {
      const at = x.back(px);
      if (at < edges[0] || at > edges[edges.length - 1]) return null;
      return Math.max(0, edges.findIndex((edge, k) => k && at <= edge) - 1);
    }, (k, overlay) => {
      const left = x.of(edges[k]), right = x.of(edges[k + 1]);
      node(overlay, "rect", {x: left, width: Math.max(1, right - left), y: box.top, height: box.bottom - box.top, fill: "currentColor", opacity: 0.06});
      const text = v => valueText(data.x.scale, v);
      return {x: right, head: `${text(edges[k])} to ${text(edges[k + 1])}`, rows: data.series.map((one, i) => [colour(one, i), `${one.name}: ${format(one.y[k] ?? 0, 3)}${one.mark == null ? "" : `, mean ${text(one.mark)}`}`])};
    });
  }

  function bars(plot, data, width, dots = false) {
    const {names, series} = data;
    const ends = series.flatMap(one => one.y.flatMap((v, k) => v == null ? [] : [v - (one.error?.[k] ?? 0), v + (one.error?.[k] ?? 0)]));
    let [low, high] = extent(dots ? ends : [0, ...ends]);
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    if (dots || low < 0) low -= room;
    if (high > 0 || dots) high += room;
    const left = Math.min(width * 0.42, widest(names) + 14), most = Math.floor((left - 10) / 6.2);
    const row = Math.max(18, series.length * 11 + 8), box = {left, right: width - 16, top: 4, bottom: 4 + names.length * row};
    legend(plot, data);
    const svg = surface(plot, data, width, box.bottom + 40), x = scale("linear", low, high, box.left, box.right, Math.max(2, Math.floor((box.right - box.left) / 80)));
    for (const tick of x.ticks) node(svg, "line", {x1: x.of(tick), x2: x.of(tick), y1: box.top, y2: box.bottom, class: "grid"});
    xAxis(svg, x, box, data.x.label);
    const zero = Math.min(box.right, Math.max(box.left, x.of(0)));
    names.forEach((name, k) => {
      const short = name.length > most ? `${name.slice(0, most - 1)}…` : name;
      node(svg, "text", {x: left - 7, y: box.top + (k + 0.5) * row + 4, "text-anchor": "end"}, short);
      series.forEach((one, i) => {
        if (one.y[k] == null) return;
        const thick = (row - 8) / series.length, y = box.top + k * row + 4 + i * thick, at = x.of(one.y[k]);
        if (dots) node(svg, "circle", {cx: at, cy: y + thick / 2, r: 4, fill: colour(one, i)});
        else node(svg, "rect", {x: Math.min(zero, at), width: Math.max(0.5, Math.abs(at - zero)), y, height: thick - 1, fill: colour(one, i), opacity: 0.85});
        const error = one.error?.[k];
        if (error) node(svg, "line", {x1: x.of(one.y[k] - error), x2: x.of(one.y[k] + error), y1: y + thick / 2, y2: y + thick / 2, stroke: dots ? colour(one, i) : "currentColor", "stroke-width": 1.5});
      });
    });
    interact({svg, plot, box}, names.length, (_, py) => py > box.bottom ? null : Math.floor((py - box.top) / row), (k, overlay) => {
      node(overlay, "rect", {x: 0, width, y: box.top + k * row, height: row, fill: "currentColor", opacity: 0.06});
      const middle = Math.max(...series.map(one => one.y[k] == null ? 0 : x.of(one.y[k])));
      return {x: middle, y: box.top + k * row, head: names[k], rows: series.map((one, i) => [colour(one, i), `${one.name}: ${format(one.y[k], 5)}${one.error?.[k] ? ` ± ${format(one.error[k], 2)}` : ""}`])};
    });
  }

  function pairs(plot, data, width) {
    const most = width < 560 ? 4 : 8, columns = data.columns.slice(0, most), D = columns.length;
    const narrow = width < 560, left = narrow ? 22 : 74, bottom = 58, side = Math.min(190, (width - left - 6) / D), gap = side > 90 ? 8 : 5;
    legend(plot, data);
    const svg = surface(plot, data, width, Math.round(side * D + bottom)), points = [];
    const cell = i => left + i * side;
    const axes = columns.map((column, i) => scale(column.scale ?? "linear", column.low, column.high, 0, side - gap, Math.max(2, Math.floor(side / 55))));
    columns.forEach((down, r) => columns.forEach((across, c) => {
      const x0 = cell(c), y0 = r * side, size = side - gap;
      node(svg, "rect", {x: x0, y: y0, width: size, height: size, class: "frame"});
      if (r === c) {
        const counts = data.tables.map(table => shares(table.rows, c, across));
        const top = Math.max(...counts.flat(), 1e-9);
        counts.forEach((row, t) => {
          const step = size / row.length;
          const d = row.map((v, k) => `V${(y0 + size - v / top * size * 0.92).toFixed(1)}H${(x0 + (k + 1) * step).toFixed(1)}`).join("");
          node(svg, "path", {d: `M${x0} ${y0 + size}${d}V${y0 + size}Z`, fill: colour(data.tables[t], t), "fill-opacity": 0.25, stroke: colour(data.tables[t], t), "stroke-width": 1});
        });
      } else {
        const t = c < r || data.tables.length < 2 ? 0 : 1;
        if (c > r && data.tables.length < 2) return;
        let path = "";
        for (const row of data.tables[t].rows) {
          if (row[c] == null || row[r] == null) continue;
          const px = axes[c].of(row[c]), py = size - axes[r].of(row[r]);
          if (px >= 0 && px <= size && py >= 0 && py <= size) {
            path += `M${(x0 + px).toFixed(1)} ${(y0 + py).toFixed(1)}h0`;
            points.push({x: x0 + px, y: y0 + py, row, c, r, t});
          }
        }
        node(svg, "path", {d: path, stroke: colour(data.tables[t], t), "stroke-width": side > 110 ? 3 : 2, "stroke-linecap": "round", opacity: 0.5});
      }
      const room = Math.max(3, Math.floor(side / 6.6));
      const cut = text => text.length > room ? `${text.slice(0, room - 1)}…` : text;
      if (r === D - 1) node(svg, "text", {x: x0 + size / 2, y: D * side + 34, "text-anchor": "middle"}, cut(across.name));
      if (c === 0) node(svg, "text", {transform: `translate(10 ${y0 + size / 2}) rotate(-90)`, "text-anchor": "middle"}, cut(down.name));
      const few = axis => { const list = axis.ticks; return list.length > 3 ? list.filter((_, k) => k % Math.ceil(list.length / 3) === 0) : list; };
      const words = column => column.words && column.words.length * 26 <= side ? column.words.map((word, k) => [k, word.slice(0, Math.floor(side / column.words.length / 6.5))]) : column.words ? [] : null;
      const marks = (column, axis) => words(column) ?? few(axis).map(tick => [tick, axis.text(tick)]);
      if (r === D - 1) for (const [tick, text] of marks(across, axes[c])) {
        const at = x0 + axes[c].of(tick), half = text.length * 3.2;
        node(svg, "text", {x: Math.min(x0 + size - half + 4, Math.max(x0 + half - 4, at)), y: D * side + 12, "text-anchor": "middle"}, text);
      }
      if (c === 0 && r && !narrow) for (const [tick, text] of marks(down, axes[r])) if (text.length <= 7) node(svg, "text", {x: left - 4, y: y0 + size - axes[r].of(tick) + 4, "text-anchor": "end"}, text);
    }));
    if (D < data.columns.length) node(svg, "text", {x: width - 6, y: D * side + 52, "text-anchor": "end"}, `the first ${D} of ${data.columns.length} columns; a wider page shows more`);
    const nearest = (px, py) => {
      let best = null, least = 15 ** 2;
      points.forEach((p, k) => { const d = (p.x - px) ** 2 + (p.y - py) ** 2; if (d < least) { least = d; best = k; } });
      return best;
    };
    const say = (column, value) => column.words ? column.words[Math.round(value)] ?? "–" : valueText(column.scale, value);
    interact({svg, plot, box: {top: 0}}, points.length, nearest, (k, overlay) => {
      const {x, y, row, c, r, t} = points[k];
      node(overlay, "circle", {cx: x, cy: y, r: 4, stroke: colour(data.tables[t], t), class: "halo"});
      return {x, y, head: data.tables[t].name, rows: [[null, `${columns[c].name}: ${say(columns[c], row[c])}`], [null, `${columns[r].name}: ${say(columns[r], row[r])}`]]};
    });
  }

  function shares(rows, c, column) {
    const bins = column.words ? column.words.length : column.bins ?? 24, found = Array(bins).fill(0);
    for (const row of rows) {
      const k = Math.floor((row[c] - column.low) / (column.high - column.low) * bins);
      if (row[c] != null && k >= 0 && k < bins) found[k] += 1 / rows.length;
    }
    return found;
  }

  const KINDS = {lines, scatter, histogram, bars, dots: (plot, data, width) => bars(plot, data, width, true), pairs};

  for (const figure of document.querySelectorAll(".chart")) {
    const plot = figure.querySelector(".plot"), data = JSON.parse(figure.querySelector("script").textContent);
    let drawn = 0;
    const draw = () => {
      const width = Math.floor(plot.clientWidth);
      if (!width || width === drawn) return;
      drawn = width;
      plot.replaceChildren();
      KINDS[data.kind](plot, data, width);
    };
    draw();
    new ResizeObserver(draw).observe(plot);
  }
})();
