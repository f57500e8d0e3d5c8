// What this page shows: the data are the JSON in the element #data, which moe_trace.report wrote.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const whole = (n) => n.toLocaleString("en-US");
const percent = (share) => `${(100 * share).toFixed(2)} %`;
const times = (ratio) => (ratio === 0 ? "0" : ratio >= 100 ? ratio.toFixed(0) : +ratio.toPrecision(3)) + " ×";
const sum = (values) => values.reduce((total, value) => total + value, 0);

const layerNames = data.layers.map((layer) => String(layer.layer));
const most = Math.max(...data.layers.map((layer) => layer.experts));
const expertNames = Array.from({ length: most }, (_, i) => String(i));
for (const set of data.sets) set.totals = set.counts.map(sum);
let set = data.sets[0], chosen = data.chosen;

// Of one layer and expert in the set of tokens that is shown.
const share = (row, expert) => (set.totals[row] ? set.counts[row][expert] / set.totals[row] : 0);
const load = (row, expert) => {
  if (expert >= data.layers[row].experts || !set.totals[row]) return null;
  return share(row, expert) * data.layers[row].experts;
};
function sayExpert(row, expert) {
  const where = `layer ${layerNames[row]}, expert ${expert}`;
  if (load(row, expert) === null) return `${where}: ${expert < data.layers[row].experts ? "no assignments" : "there is none"}`;
  return `${where}: ${whole(set.counts[row][expert])} assignments, ${percent(share(row, expert))}, ${times(load(row, expert))} the even load`;
}
const largestLoad = () => Math.max(2, ...data.layers.map((layer, row) => (set.totals[row] ? (Math.max(...set.counts[row]) / set.totals[row]) * layer.experts : 0)));
const pointAt = "Point at a place, or use the arrow keys, to read it.";

// Tables: a click on a heading sorts by its column.
function sortable(table) {
  table.querySelectorAll("thead th").forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Numbers are looked at from the largest, words from the first.
      const first = heading.classList.contains("word") ? "ascending" : "descending";
      const now = heading.getAttribute("aria-sort");
      const order = !now ? first : now === "descending" ? "ascending" : "descending";
      table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows].map((row) => [row, value(row)]);
      rows.sort(([, a], [, b]) => {
        if (a === "" || b === "") return (a === "") - (b === ""); // what has no value is last in either order
        return sign * (heading.classList.contains("word") ? a.localeCompare(b) : a - b);
      });
      table.tBodies[0].append(...rows.map(([row]) => row));
    });
  });
}

function fill(table, headings, rows) {
  const line = (cells, kind) => {
    const row = document.createElement("tr");
    for (const [text, value] of cells) {
      const cell = document.createElement(kind);
      cell.textContent = text;
      if (value !== undefined) cell.dataset.value = value;
      row.append(cell);
    }
    return row;
  };
  if (!table.tHead.rows.length) {
    table.tHead.append(line(headings.map((heading) => [heading]), "th"));
    sortable(table);
  }
  table.querySelectorAll("th").forEach((heading) => heading.removeAttribute("aria-sort"));
  table.tBodies[0].replaceChildren(...rows.map((cells) => line(cells, "td")));
}

function select(element, names, at, changed) {
  element.append(...names.map((name, i) => new Option(name, i)));
  element.value = at;
  element.addEventListener("change", () => changed(Number(element.value)));
}

// Everything that needs a layer.
function present() {
  const map = new MapChart($("map-chart"), {
    title: "Load of each expert over the even load", hint: pointAt, rows: data.layers.length, columns: most, rowLabels: layerNames,
    columnLabels: expertNames, across: "expert (a row is a layer)", none: "never chosen", ratio: load, most: largestLoad(), say: sayExpert,
    pick: (row) => showLayer(row),
  });

  const bars = new BarChart($("bars-chart"), {
    title: "Share of the assignments", hint: pointAt, columns: 1, columnLabels: ["0"], across: "expert", values: [0], even: 1, marked: [],
    format: (y) => `${+(100 * y).toPrecision(3)} %`, say: (_, expert) => sayExpert(chosen, expert),
  });

  function showLayer(row) {
    chosen = row;
    $("layer").value = row;
    const { experts, layer } = data.layers[row], counts = set.counts[row];
    const order = counts.map((_, i) => i).sort((a, b) => counts[b] - counts[a] || a - b);
    bars.host.querySelector("h3").textContent = `Share of the assignments of layer ${layer} (${set.name}); dashed: the even share, ${percent(1 / experts)}`;
    bars.change({
      columns: experts, columnLabels: expertNames.slice(0, experts), values: counts.map((_, i) => share(row, i)), even: 1 / experts,
      marked: order.slice(0, 3).filter((i) => counts[i] > 0),
    });
    const others = data.sets.filter((other) => other !== set && other.totals[row]);
    fill($("experts"), ["expert", "assignments", "share", "× even load"], order.map((i) => [
      [String(i)], [whole(counts[i]), counts[i]], [percent(share(row, i)), share(row, i)], [times(load(row, i) ?? 0), load(row, i) ?? 0],
    ]));
    if (data.time) showTime(row);
  }

  select($("which"), data.sets.map((one) => one.name), 0, (at) => {
    set = data.sets[at];
    map.change({ most: largestLoad() });
    showLayer(chosen);
  });
  select($("layer"), layerNames, chosen, showLayer);

  for (const metric of data.metrics) {
    const host = document.createElement("div");
    $("balance-charts").append(host);
    const values = data.layers.map((layer) => layer[metric.key]);
    new LineChart(host, {
      title: metric.name, hint: "", columns: data.layers.length, columnLabels: layerNames, across: "layer", inner: 110, even: metric.even,
      fromZero: metric.even === 0, series: [{ name: metric.name, values }], format: (y) => String(+y.toPrecision(4)),
      say: (_, i) => `layer ${layerNames[i]}: ${values[i] === null ? "no value" : +values[i].toPrecision(5)}`, pick: (_, i) => showLayer(i),
    });
  }
  sortable($("layers"));

  if (data.phases) {
    const { distance, chance, rows } = data.phases, names = rows.map((row) => layerNames[row]);
    const [prefill, decode] = ["prefill", "decode"].map((name) => data.sets.find((one) => one.name === name));
    new LineChart($("distance-chart"), {
      title: "Assignments that prefill and decode give to different experts", hint: pointAt, columns: rows.length, columnLabels: names, across: "layer",
      legendHeight: 42, fromZero: true, series: [{ name: "prefill against decode", values: distance }, { name: "by chance, were tokens independent", values: chance, dash: true }],
      format: (y) => `${+(100 * y).toPrecision(3)} %`,
      say: (_, i) => `layer ${names[i]}: ${percent(distance[i])}; by chance, were tokens independent, ${percent(chance[i])}`,
    });
    const of = (one, row, expert) => one.counts[row][expert] / one.totals[row];
    const ratio = (i, expert) => {
      const row = rows[i];
      if (expert >= data.layers[row].experts || Math.max(prefill.counts[row][expert], decode.counts[row][expert]) < data.few) return null;
      // What only one of them chooses is at the end of the scale, which is no lack of data.
      return Math.min(Math.max(of(prefill, row, expert) / of(decode, row, expert), 1e-9), 1e9);
    };
    const logs = [];
    for (let i = 0; i < rows.length; i++)
      for (let expert = 0; expert < most; expert++) {
        const found = ratio(i, expert);
        if (found > 1e-9 && found < 1e9) logs.push(Math.abs(Math.log(found)));
      }
    logs.sort((a, b) => a - b);
    new MapChart($("ratio-chart"), {
      title: "Share of prefill over share of decode", hint: pointAt, rows: rows.length, columns: most, rowLabels: names, columnLabels: expertNames,
      across: "expert (a row is a layer)", none: "too few to say", ratio, most: Math.min(Math.max(Math.exp(logs[Math.floor(logs.length * 0.999)] ?? 0), 2), 64),
      say: (i, expert) => {
        const row = rows[i], where = `layer ${names[i]}, expert ${expert}`;
        if (expert >= data.layers[row].experts) return `${where}: there is none`;
        const each = [prefill, decode].map((one) => `${one.name} ${whole(one.counts[row][expert])} of ${whole(one.totals[row])} (${percent(of(one, row, expert))})`);
        return `${where}: ${each.join(", ")}`;
      },
    });
  }

  let timeChart;
  function showTime(row) {
    const { experts, counts, totals } = data.time.tops[row], { experts: of } = data.layers[row];
    const ratio = (i, window) => (totals[window] ? (counts[i][window] / totals[window]) * of : null);
    const options = {
      title: `The most chosen experts of layer ${layerNames[row]} over time: load over the even load`, hint: pointAt, rows: experts.length, columns: totals.length,
      rowLabels: experts.map(String), columnLabels: data.time.names, across: `${data.time.unit} since the first step (a row is an expert)`,
      none: "none", ratio,
      most: Math.max(2, ...experts.flatMap((_, i) => totals.map((_, window) => ratio(i, window) ?? 0))),
      say: (i, window) => `expert ${experts[i]}, from ${data.time.spans[window]}: ` + (totals[window]
        ? `${whole(counts[i][window])} of ${whole(totals[window])} assignments, ${times(ratio(i, window))} the even load` : "nothing was executed"),
    };
    if (timeChart) {
      timeChart.host.querySelector("h3").textContent = options.title;
      timeChart.change(options);
    } else timeChart = new MapChart($("time-chart"), options);
  }
  if (data.time) {
    const { imbalance } = data.time;
    const known = imbalance.flat().filter((value) => value !== null);
    new MapChart($("evenness-chart"), {
      title: "max/mean of each layer over time (1: even)", hint: pointAt, rows: data.layers.length, columns: data.time.names.length, rowLabels: layerNames,
      columnLabels: data.time.names, across: `${data.time.unit} since the first step (a row is a layer)`, none: "nothing executed",
      ratio: (row, window) => imbalance[row][window], most: Math.max(2, ...known),
      say: (row, window) => `layer ${layerNames[row]}, from ${data.time.spans[window]}: ` + (imbalance[row][window] === null ? "nothing was executed" : `max/mean ${+imbalance[row][window].toPrecision(5)} of ${whole(data.time.tops[row].totals[window])} assignments`),
      pick: (row) => showLayer(row),
    });
  }

  if (data.pairs) {
    const { experts, upper, factors, strongest, few } = data.pairs;
    const at = (i, j) => upper[i * experts - (i * (i + 1)) / 2 + j - i - 1]; // i < j
    const seen = (i, j) => (i < j ? at(i, j) : at(j, i)), expected = (i, j) => factors[i] * factors[j];
    const lift = (i, j) => (i === j || Math.max(seen(i, j), expected(i, j)) < few ? null : Math.max(seen(i, j) / expected(i, j), 1e-9));
    new MapChart($("pairs-chart"), {
      title: `How often experts of layer ${data.pairs.layer} are chosen by the same token, over how often they would be by chance`, hint: pointAt, square: true,
      rows: experts, columns: experts, rowLabels: expertNames.slice(0, experts), columnLabels: expertNames.slice(0, experts), across: "expert",
      none: "too few to say", ratio: lift, most: data.pairs.most,
      say: (i, j) => (i === j ? `expert ${i}: ${whole(data.pairs.chosen[i])} tokens`
        : `experts ${i} and ${j}: ${whole(seen(i, j))} tokens chose both, ${expected(i, j).toPrecision(3)} would by chance` + (lift(i, j) === null ? "; too few to say" : `: ${times(seen(i, j) / expected(i, j))}`)),
    });
    fill($("strongest"), ["experts", "and", "tokens", "by chance", "× chance"], strongest.map(([i, j]) => [
      [String(i)], [String(j)], [whole(seen(i, j)), seen(i, j)], [expected(i, j).toPrecision(3), expected(i, j)],
      [times(seen(i, j) / expected(i, j)), seen(i, j) / expected(i, j)],
    ]));
  }
  showLayer(chosen);
}

if (data.layers.length) present();
else for (const id of ["map", "one", "balance"]) $(id).hidden = true;
for (const [id, there] of [["phases", data.phases], ["time", data.time], ["pairs", data.pairs]])
  if (!there) document.querySelectorAll(`#${id} .chart, #${id} .scroll`).forEach((element) => (element.hidden = true));
drawAll();
document.documentElement.dataset.ready = "yes";
