"use strict";
// Draws the results in the element `data` with inline SVG. Nothing is fetched.
const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = ["#0b6bcb", "#d9730d", "#1a7f4b", "#8e44ad", "#b42318", "#5b6875", "#0e8a8a", "#a1640a"];
const targets = data.targets.map((target) => target.name);
const colour = (target) => COLOURS[Math.max(0, targets.indexOf(target)) % COLOURS.length];
const escape = (text) => String(text ?? "").replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const main = document.querySelector("main");
const add = (html) => main.insertAdjacentHTML("beforeend", html);
const median = (values) => {
  const sorted = values.filter((v) => v !== null && v !== undefined && !Number.isNaN(v)).sort((a, b) => a - b);
  if (!sorted.length) return null;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
};
const number = (value, digits) => {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  const places = digits ?? (value >= 1000 ? 0 : value >= 100 ? 1 : value >= 1 ? 2 : 3);
  return value.toLocaleString("en", { maximumFractionDigits: places, minimumFractionDigits: Math.min(places, 2) });
};
const UNIT = { event: "CPU µs per event", request: "CPU µs per request", stream: "bytes of memory per open stream" };
const COST = { event: "cpu_us_per_event", request: "cpu_us_per_request", stream: "bytes_per_open_stream" };
const sum = (values) => values.reduce((a, b) => a + b, 0);
const cost = (cell, report) => {
  const known = report.processes.map((process) => process[COST[cell.figure]]).filter((value) => value !== null);
  return known.length ? sum(known) : null;
};
const failures = (report) => sum(Object.values(report.failures));
const latencyName = (report) => (report.delay.count ? "delay" : report.total.count ? "total" : "ttft");
const latency = (report) => report[latencyName(report)];
const milliseconds = (micros) => (micros === null || micros === undefined ? null : micros / 1e3);

function ticks(low, high, log) {
  if (log) {
    for (const steps of high / low > 300 ? [[1], [1, 2, 5]] : [[1, 2, 5]]) {
      const marks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const step of steps) {
          const mark = step * 10 ** power;
          if (mark >= low * 0.999 && mark <= high * 1.001) marks.push(mark);
        }
      }
      if (marks.length > 2) return marks;
    }
    // Over a narrow range too few of them fall, and even steps can be read as well.
  }
  const raw = (high - low) / 4 || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= raw);
  const marks = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step / 1e6; mark += step) marks.push(mark);
  return marks;
}
// As many digits behind the point as tell a mark from its neighbour.
const digits = (marks, mark) => {
  const step = marks.length > 1 ? Math.min(mark || Infinity, marks[1] - marks[0]) : mark || 1;
  return Math.min(3, Math.max(0, -Math.floor(Math.log10(step) + 1e-9)));
};

// A chart of lines. `lines`: [{ name, points: [[x, y]] }].
function chart(title, note, lines, options = {}) {
  const shown = lines.filter((line) => line.points.length > 1);
  if (!shown.length) return "";
  const width = 420, height = 210, left = 52, right = 10, top = 8, bottom = 34;
  const xs = shown.flatMap((line) => line.points.map((point) => point[0]));
  const ys = shown.flatMap((line) => line.points.map((point) => point[1]));
  const x0 = Math.min(...xs), x1 = Math.max(...xs);
  // One that is far off must not flatten the others to a line on the floor.
  const peaks = shown.map((line) => Math.max(...line.points.map((point) => point[1]))).sort((a, b) => a - b);
  if (!options.logY && peaks[peaks.length - 1] > 25 * peaks[peaks.length >> 1] && peaks[peaks.length >> 1] > 0) options = { ...options, logY: true };
  let y0 = options.logY ? Math.min(...ys.filter((y) => y > 0)) : 0, y1 = Math.max(...ys);
  if (!(y1 > y0)) { y1 = (y0 || 1) * 2; }
  if (options.logY) { y0 /= 1.3; y1 *= 1.3; } else { y1 *= 1.08; }
  const scale = (value) => (options.logY ? Math.log(Math.max(value, y0)) : value);
  const X = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (width - left - right);
  const Y = (y) => height - bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (height - top - bottom);
  let svg = "";
  const marks = ticks(y0, y1, options.logY);
  for (const mark of marks) {
    svg += `<line x1="${left}" x2="${width - right}" y1="${Y(mark)}" y2="${Y(mark)}" stroke="#e6ebef"/>`;
    svg += `<text x="${left - 6}" y="${Y(mark) + 4}" text-anchor="end">${mark.toLocaleString("en", { maximumFractionDigits: digits(marks, mark) })}</text>`;
  }
  for (const [x, label] of options.xTicks ?? ticks(x0, x1, false).map((x) => [x, number(x, 0)])) {
    if (x < x0 || x > x1) continue;
    svg += `<line x1="${X(x)}" x2="${X(x)}" y1="${top}" y2="${height - bottom}" stroke="#f0f3f5"/>`;
    svg += `<text x="${X(x)}" y="${height - bottom + 15}" text-anchor="${X(x) > width - right - 16 ? "end" : "middle"}">${label}</text>`;
  }
  svg += `<text x="${width - right}" y="${height - 4}" text-anchor="end">${escape(options.xLabel ?? "")}</text>`;
  for (const line of shown) {
    const path = line.points.map(([x, y], index) => `${index ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
    svg += `<path d="${path}" fill="none" stroke="${line.colour ?? colour(line.name)}" stroke-width="1.7"${line.dashed ? ' stroke-dasharray="5 3"' : ""}><title>${escape(line.name)}</title></path>`;
  }
  return `<div class="card"><h3>${escape(title)}</h3><small>${escape(note)}</small><svg viewBox="0 0 ${width} ${height}" role="img">${svg}</svg></div>`;
}

// Bars with the lowest and highest round as a whisker. `bars`: [{ name, value, low, high, text }]. A bar many times as long as
// the middle one is cut off and drawn pale.
function bars(title, note, rows) {
  const shown = rows.filter((row) => row.value !== null);
  if (!shown.length) return "";
  const limit = 6 * median(shown.map((row) => row.value));
  const most = Math.max(...shown.filter((row) => row.value <= limit).map((row) => Math.min(row.high, limit)));
  const rowHeight = 24, left = 78, right = 92, width = 420;
  const X = (value) => left + (value / (most || 1)) * (width - left - right);
  let svg = "";
  shown.forEach((row, index) => {
    const y = index * rowHeight + 4;
    svg += `<text x="${left - 8}" y="${y + 12}" text-anchor="end">${escape(row.name)}</text>`;
    const cut = row.value > limit, end = X(Math.min(row.high, most));
    svg += `<rect x="${left}" y="${y}" height="15" width="${Math.max(1, X(Math.min(row.value, most)) - left)}" fill="${colour(row.name)}"${cut ? ' fill-opacity="0.35"' : ""} rx="2"/>`;
    if (!cut) svg += `<line x1="${X(row.low)}" x2="${end}" y1="${y + 7.5}" y2="${y + 7.5}" stroke="#1c2530"/>`;
    svg += `<text x="${end + 7}" y="${y + 12}" style="fill:#1c2530">${cut ? "… " : ""}${escape(row.text)}</text>`;
  });
  return `<div class="card"><h3>${escape(title)}</h3><small>${escape(note)}</small><svg viewBox="0 0 ${width} ${shown.length * rowHeight + 6}" role="img">${svg}</svg></div>`;
}

const QUANTILES = [[0, "p0"], [1, "p90"], [2, "p99"], [3, "p99.9"], [4, "p99.99"], [5, "p99.999"]];
function curve(title, note, cells, field) {
  const lines = cells.map((cell) => ({
    name: cell.target,
    points: (cell.reports[cell.reports.length >> 1].curves[field] ?? []).filter(([, us]) => us > 0).map(([q, us]) => [-Math.log10(1 - q), us / 1e3]),
  }));
  return chart(title, note, lines, { logY: true, xTicks: QUANTILES, xLabel: "share of all that is faster" });
}
function course(title, note, cells, of) {
  const lines = cells.map((cell) => ({
    name: cell.target,
    points: cell.reports[cell.reports.length >> 1].series.filter((point) => of(point) !== null).map((point) => [point.at_s, of(point)]),
  }));
  return lines.some((line) => line.points.some((point) => point[1] > 0)) ? chart(title, note, lines, { xLabel: "seconds" }) : "";
}

// A target's cost over nginx's, round by round.
function ratios(cell) {
  const base = data.cells.find((other) => other.scenario === cell.scenario && other.target === "nginx" && other.reports.length);
  if (!base || cell.target === "direct") return [];
  return cell.reports.map((report, index) => {
    const other = base.reports[index] && cost(base, base.reports[index]);
    const own = cost(cell, report);
    return other && own !== null ? own / other : null;
  }).filter((ratio) => ratio !== null);
}
const shade = (ratio) => (ratio === null ? "" : ratio <= 1 ? "good" : "soft");
const failedOf = (cell) => sum(cell.reports.map(failures));

// Context switches of the target for each event or request.
const switches = (per, report) => {
  const known = report.processes.map((process) => process[`switches_per_${per}`]).filter((value) => value !== null && value !== undefined);
  return known.length ? sum(known) : null;
};
const NAMES = { connect: "connect", cut: "cut", malformed: "malformed", timeout: "timeout", mismatch: "token mismatch", border: "event border", no_finish: "no finish reason",
  no_done: "no [DONE]", error_event: "error event", status: "unexpected status" };

// What was answered, all rounds together.
function answers(cells) {
  const rows = cells.map((cell) => {
    const all = (of) => sum(cell.reports.map(of));
    const added = (field) => cell.reports.flatMap((report) => Object.entries(report[field])).reduce((sums, [key, count]) => ({ ...sums, [key]: (sums[key] ?? 0) + count }), {});
    const listed = (sums, name) => Object.entries(sums).filter(([, count]) => count).map(([key, count]) => `${name(key)}: ${count}`).join(", ");
    const failed = listed(added("failures"), (key) => NAMES[key] ?? key);
    const notStarted = all((report) => report.not_started);
    const said = [...new Set(cell.reports.flatMap((report) => [report.first_refusal, report.first_error, report.interrupted ? `interrupted, ${report.left} under way` : null,
      ...report.processes_gone.map((pid) => `process ${pid} ended`), report.system_calls_missing ? `system calls: ${report.system_calls_missing}` : null]).filter((text) => text))];
    return `<tr><td><b style="color:${colour(cell.target)}">${escape(cell.target)}</b></td><td>${all((r) => r.requests)}</td><td class="${all((r) => r.ok) || !all((r) => r.failures.status) ? "" : "bad"}">${all((r) => r.ok)}</td>
      <td class="text">${escape(listed(added("status"), (key) => key)) || "none"}</td><td class="text ${failed ? "bad" : ""}">${escape(failed) || "none"}</td><td>${all((r) => r.not_timed)}</td>
      <td>${all((r) => r.hung_up)}</td><td>${all((r) => r.late_starts)}</td><td class="${notStarted ? "bad" : ""}">${notStarted}</td>
      <td>${all((r) => r.tokens)}</td><td>${all((r) => r.connections_opened)}</td><td class="text">${escape(said.join(" · "))}</td></tr>`;
  });
  return `<table><tr><th>target</th><th>requests</th><th>ok (200)</th><th class="text">by status</th><th class="text">failures</th><th>not timed</th><th>hung up</th><th>late starts</th><th>never started</th>
    <th>tokens</th><th>connections</th><th class="text">first error</th></tr>${rows.join("")}</table>`;
}

// Latencies of the middle round.
function latencies(cells) {
  const rows = cells.flatMap((cell) => {
    const report = cell.reports[cell.reports.length >> 1];
    return [["ttft", "first token"], ["inter_token", "between tokens"], ["total", "whole request"], ["delay", "delay"]].filter(([field]) => report[field].count).map(([field, name]) =>
      `<tr><td><b style="color:${colour(cell.target)}">${escape(cell.target)}</b></td><td class="text">${name}</td><td>${report[field].count}</td><td>${number(report[field].mean_us / 1e3)}</td>
      ${["p50_us", "p90_us", "p99_us", "p999_us", "max_us"].map((quantile) => `<td>${number(report[field][quantile] / 1e3)}</td>`).join("")}</tr>`);
  });
  return rows.length ? `<table><tr><th>target</th><th class="text">latency, ms</th><th>samples</th><th>mean</th><th>p50</th><th>p90</th><th>p99</th><th>p99.9</th><th>max</th></tr>${rows.join("")}</table>` : "";
}

function summary(cells) {
  const of = { delay: "delay", total: "whole request", ttft: "first token" }[latencyName(cells[0].reports[0])];
  const direct = cells.find((cell) => cell.target === "direct");
  const at = (cell, field) => median(cell.reports.map((report) => latency(report)[field] / 1e3));
  const over = (cell, field) => (direct && cell !== direct ? number(at(cell, field) - at(direct, field)) : "–");
  const per = cells[0].figure === "request" ? "request" : "event";
  const rows = cells.map((cell) => {
    const own = ratios(cell), ratio = median(own);
    const failed = failedOf(cell);
    const middle = (of) => median(cell.reports.map(of));
    const spread = own.length > 1 ? ` <small class="soft">(${number(Math.min(...own), 2)}–${number(Math.max(...own), 2)})</small>` : "";
    return `<tr><td><b style="color:${colour(cell.target)}">${escape(cell.target)}</b></td>
      <td>${number(middle((r) => (per === "request" ? r.requests_per_s : r.events_per_s)), 0)}</td><td>${number(median(cell.reports.map((r) => cost(cell, r))))}</td>
      <td class="${shade(ratio)}">${ratio === null ? "–" : "× " + number(ratio, 2)}${spread}</td>
      <td>${number(middle((r) => sum(r.processes.map((p) => p.cores)) * 100), 0)}</td>
      <td>${number(at(cell, "p50_us"))}</td><td>${number(at(cell, "p99_us"))}</td><td>${over(cell, "p50_us")}</td><td>${over(cell, "p99_us")}</td>
      <td>${number(middle((r) => (per === "request" ? r.system_calls_per_request : r.system_calls_per_event)))}</td>
      <td>${number(middle((r) => switches(per, r)))}</td>
      <td>${number(middle((r) => sum(r.processes.map((p) => p.resident_after_bytes)) / 1048576), 0)}</td>
      <td class="${failed ? "bad" : ""}">${failed}</td></tr>`;
  });
  return `<table><tr><th>target</th><th>${per}s/s</th><th>${UNIT[cells[0].figure]}</th><th>to nginx (low–high)</th><th>core %</th><th>${of} p50 ms</th><th>${of} p99 ms</th>
    <th>p50 over direct</th><th>p99 over direct</th><th>system calls per ${per}</th><th>context switches per ${per}</th><th>MiB</th><th>failed</th></tr>${rows.join("")}</table>`;
}

// Every scenario on one line: what each target costs, and how that is to nginx.
function overview(names) {
  const shown = targets.filter((target) => target !== "direct" && data.cells.some((cell) => cell.target === target && cell.reports.length));
  if (names.length < 2 || !shown.length) return "";
  const rows = names.map((name) => {
    const cells = data.cells.filter((cell) => cell.scenario === name);
    const columns = shown.map((target) => {
      const cell = cells.find((candidate) => candidate.target === target);
      if (!cell || !cell.reports.length) return `<td class="soft" title="${escape(cell?.skipped ?? "not run")}">–</td>`;
      const ratio = median(ratios(cell));
      return `<td>${number(median(cell.reports.map((report) => cost(cell, report))))}${target === "nginx" || ratio === null ? "" : ` <small class="${shade(ratio)}">× ${number(ratio, 2)}</small>`}
        ${failedOf(cell) ? `<small class="bad">${failedOf(cell)} failed</small>` : ""}</td>`;
    });
    return `<tr><td><a href="#${escape(name)}">${escape(name)}</a></td><td class="text soft">${escape(UNIT[cells[0].figure])}</td>${columns.join("")}</tr>`;
  });
  return `<h2>Overview</h2><p>What one unit of work costs the target (medians of the rounds), and × that of nginx in the same rounds. Less is better.</p>
    <table><tr><th>scenario</th><th class="text">cost</th>${shown.map((target) => `<th style="color:${colour(target)}">${escape(target)}</th>`).join("")}</tr>${rows.join("")}</table>` +
    (data.remarks?.length ? `<ul>${data.remarks.map((remark) => `<li>${escape(remark)}</li>`).join("")}</ul>` : "");
}

function parts(cells) {
  const rows = cells.flatMap((cell) => {
    const report = cell.reports[cell.reports.length >> 1];
    return report.parts.length < 2 ? [] : report.parts.map((part) => `<tr><td>${escape(cell.target)}</td><td class="text">${escape(part.name)}</td><td>${part.requests}</td>
      <td>${part.ok}</td><td class="${part.failures ? "bad" : ""}">${part.failures}</td><td>${number(part.ttft.p50_us / 1e3)}</td><td>${number(part.ttft.p99_us / 1e3)}</td>
      <td>${number(part.inter_token.p99_us / 1e3)}</td><td>${number(part.delay.p99_us / 1e3)}</td><td>${number(part.total.p99_us / 1e3)}</td></tr>`);
  });
  return rows.length ? `<table><tr><th>target</th><th class="text">part of the mix</th><th>requests</th><th>ok</th><th>failed</th><th>ttft p50 ms</th><th>ttft p99</th>
    <th>inter-token p99</th><th>delay p99</th><th>total p99</th></tr>${rows.join("")}</table>` : "";
}

const machine = data.machine;
document.title = `gateway-bench ${machine.date}`;
add(`<h1>gateway-bench</h1><p>${escape(machine.date)} · Linux ${escape(machine.kernel)} · ${escape(machine.processor)}, ${machine.cores} cores,
  ${number(machine.memory_bytes / 2 ** 30, 0)} GiB · commit <code>${escape(machine.commit ?? "unknown")}</code><br><code>${escape(data.command)}</code></p>`);
const names = [...new Set(data.cells.map((cell) => cell.scenario))];
add(overview(names));
if (data.targets.length) {
  add(`<h2>Targets</h2><table class="targets"><tr><th>target</th><th class="text">what it is</th><th class="text">on</th><th class="text">off</th><th class="text">version</th></tr>${data.targets.map((target) =>
    `<tr><td><b style="color:${colour(target.name)}">${escape(target.name)}</b></td><td class="text">${escape(target.about)}</td><td class="text">${escape(target.on.join(", "))}</td>
    <td class="text">${escape(target.off.join(", "))}</td><td class="text ${target.missing ? "soft" : ""}">${escape(target.missing ?? target.version)}</td></tr>`).join("")}</table>`);
}
for (const name of names) {
  const all = data.cells.filter((cell) => cell.scenario === name);
  const cells = all.filter((cell) => cell.reports.length);
  const skipped = all.filter((cell) => cell.skipped).map((cell) => `<br>${escape(cell.target)} skipped: ${escape(cell.skipped)}`);
  add(`<h2 id="${escape(name)}">${escape(name)}</h2><p>${escape(all[0].about)}${skipped.join("")}</p>`);
  if (!cells.length) continue;
  const stamped = cells.some((cell) => cell.reports.some((report) => report.delay.count));
  const costs = cells.map((cell) => {
    const values = cell.reports.map((report) => cost(cell, report)).filter((value) => value !== null);
    return { name: cell.target, value: median(values), low: Math.min(...values), high: Math.max(...values), text: number(median(values)) };
  });
  const dots = (field) => cells.some((cell) => cell.reports[0][field].count);
  add(`<div class="legend">${cells.map((cell) => `<span><i style="background:${colour(cell.target)}"></i>${escape(cell.target)}</span>`).join("")}</div>` + summary(cells) + answers(cells) + latencies(cells) + parts(cells) + `<div class="grid">` +
    bars(UNIT[all[0].figure], "less is better; line: lowest and highest round" + (cells.some((cell) => cell.target === "direct") ? "; direct: of the upstream itself" : ""), costs) +
    (stamped ? curve("Delay of each token, ms", "sent by the upstream to read by the client, one clock", cells, "delay") : "") +
    (dots("ttft") ? curve("Time to first token, ms", "from when the request was due", cells, "ttft") : "") +
    (dots("inter_token") ? curve("Time between tokens, ms", "as the client reads them", cells, "inter_token") : "") +
    curve("Whole request, ms", "from when it was due to its end", cells, "total") +
    course("Rate", all[0].figure === "request" ? "requests per second" : "events per second", cells, (point) => (all[0].figure === "request" ? point.requests_per_s : point.events_per_s)) +
    course(stamped ? "Delay p99 over time, ms" : "First token or whole answer, p99 over time, ms", "of each interval", cells, (point) => milliseconds(stamped ? point.delay_p99_us : point.first_p99_us)) +
    course("CPU of the target, cores", "of each interval", cells, (point) => point.cores) +
    course("Resident memory of the target, MiB", "", cells, (point) => (point.resident_bytes ? point.resident_bytes / 1048576 : null)) +
    course("Requests under way", "", cells, (point) => point.active) + `</div>`);
}
add(`<h2>How to read this</h2><p>CPU is that of the target's processes, user and kernel, divided by what was done in the measured window. A process at the limit of its core gathers work and looks
  cheaper than one at rest: compare like with like. Ratios are of runs of the same round. Any failure makes a row worthless: speed with a lost token does not count.
  Curves are of the middle round; to the right is the slowest share. In the open loop latencies count from when a request was due.</p>`);
