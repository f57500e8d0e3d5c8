"use strict";
// Charts on canvases: a map, bars, lines. Each says what it shows at the place that is pointed at or that the arrow keys
// have reached, in the line below it, and is drawn again when its width or the colours change.

const SCALES = { // violet, below 1, to orange, above: told apart with any kind of colour vision
  light: ["#2d004b", "#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214", "#b35806", "#7f3b08"],
  dark: ["#d5c8ff", "#a994f0", "#7c68cc", "#534798", "#37325f", "#26272c", "#5c3f1c", "#915c18", "#ca7b17", "#f59b2c", "#ffcf96"],
};
const INKS = {
  light: { text: "#1b1f24", quiet: "#5a6068", line: "#d9dde2", none: "#cfcfcf", bar: "#8fa3b5", top: "#d55e00", even: "#0b3c5d",
           series: ["#0072b2", "#d55e00", "#009e73", "#cc79a7"] },
  dark: { text: "#e4e6ea", quiet: "#9aa1aa", line: "#363b42", none: "#565a61", bar: "#7d92a6", top: "#ff9b50", even: "#7db8e0",
          series: ["#56b4e9", "#ff9b50", "#3fcf9f", "#e29ac0"] },
};
const dark = matchMedia("(prefers-color-scheme: dark)"), printed = matchMedia("print");
const theme = () => (dark.matches && !printed.matches ? "dark" : "light");
const FONT = "12px system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif";

const bytes = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

// The colour of a ratio on a logarithmic scale from 1 / most to most; null and 0 have the colour of "none".
function colourOf(ratio, most, stops, none) {
  if (!(ratio > 0)) return none;
  const place = Math.min(Math.max((Math.log(ratio) / Math.log(most) + 1) / 2, 0), 1) * (stops.length - 1);
  const low = Math.min(Math.floor(place), stops.length - 2), part = place - low;
  return stops[low].map((value, i) => Math.round(value + (stops[low + 1][i] - value) * part));
}

const charts = [];

class Chart {
  // host: the element that gets the chart; options: `title`, `hint` (what to do), `say(…)`, `pick(…)` and the data.
  constructor(host, options) {
    Object.assign(this, options);
    this.host = host;
    const heading = document.createElement("h3");
    heading.textContent = this.title;
    this.canvas = document.createElement("canvas");
    this.canvas.tabIndex = 0;
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", this.title);
    this.canvas.chart = this;
    this.output = document.createElement("output");
    host.replaceChildren(heading, this.canvas, this.output);
    this.at = null;
    this.quiet();
    const pointed = (event) => this.show(this.under(event.offsetX, event.offsetY));
    this.canvas.addEventListener("pointermove", pointed);
    this.canvas.addEventListener("pointerdown", pointed);
    this.canvas.addEventListener("pointerleave", () => this.show(null));
    this.canvas.addEventListener("click", () => this.at && this.pick && this.pick(...this.at));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    charts.push(this);
    new ResizeObserver(() => this.width !== this.canvas.clientWidth && this.draw()).observe(this.canvas);
  }

  quiet() {
    this.output.textContent = this.hint || "";
    this.output.className = "waiting";
  }

  key(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Enter" && this.at && this.pick) this.pick(...this.at);
    if (!step) return;
    event.preventDefault();
    const [row, column] = this.at || [0, -step[1] || 0];
    const within = (n, size) => Math.min(Math.max(n, 0), size - 1);
    this.show([within(row + step[0], this.rows), within(column + step[1], this.columns)]);
  }

  show(at) {
    if (String(at) === String(this.at)) return;
    this.at = at;
    if (at) {
      this.output.textContent = this.say(...at);
      this.output.className = "";
    } else this.quiet();
    this.draw();
  }

  // Where the middle of a cell is, in pixels of the canvas.
  place(row, column) {
    return [this.left + (column + 0.5) * this.cellWidth, this.top + (row + 0.5) * this.cellHeight];
  }

  under(x, y) {
    const column = Math.floor((x - this.left) / this.cellWidth), row = Math.floor((y - this.top) / this.cellHeight);
    return column >= 0 && column < this.columns && row >= 0 && row < this.rows ? [row, column] : null;
  }

  draw() {
    this.width = this.canvas.clientWidth;
    if (!this.width) return;
    const sharp = window.devicePixelRatio || 1;
    this.height = this.tall(this.width);
    this.canvas.style.height = `${this.height}px`;
    this.canvas.width = Math.round(this.width * sharp);
    this.canvas.height = Math.round(this.height * sharp);
    this.pen = this.canvas.getContext("2d");
    this.pen.scale(sharp, sharp);
    this.pen.font = FONT;
    this.pen.textBaseline = "middle";
    this.ink = INKS[theme()];
    this.paint();
  }

  text(words, x, y, align, colour) {
    this.pen.fillStyle = colour || this.ink.quiet;
    this.pen.textAlign = align;
    this.pen.fillText(words, x, y);
  }

  rule(x0, y0, x1, y1, colour, dash) {
    this.pen.strokeStyle = colour;
    this.pen.lineWidth = dash ? 1.4 : 1;
    this.pen.setLineDash(dash || []);
    this.pen.beginPath();
    this.pen.moveTo(x0, y0);
    this.pen.lineTo(x1, y1);
    this.pen.stroke();
    this.pen.setLineDash([]);
  }

  // The names of columns, as many as there is room for, and below them what they are of.
  nameColumns(y, names, what) {
    const room = Math.max(...names.map((name) => this.pen.measureText(name).width)) + 10;
    const step = niceStep(Math.ceil(room / this.cellWidth));
    names.forEach((name, i) => i % step || this.text(name, this.place(0, i)[0], y + 9, "center"));
    this.text(what, this.left + (this.columns * this.cellWidth) / 2, y + 25, "center");
  }
}

function niceStep(least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512].find((step) => step >= least) || least;
}

const short = (x) => (x >= 1 ? String(+x.toPrecision(3)) : `1/${+(1 / x).toPrecision(3)}`);

// rows x columns as colours. ratio(row, column): a number, 0 or null for none; most: the end of the scale.
class MapChart extends Chart {
  tall(width) {
    this.left = 34;
    this.top = 8;
    this.cellWidth = (width - this.left - 4) / this.columns;
    const square = this.square ? Math.min(width - this.left - 4, 640) / this.rows : 0;
    if (this.square) this.cellWidth = square;
    this.cellHeight = square || Math.min(Math.max(420 / this.rows, 7), 22);
    return this.top + this.rows * this.cellHeight + 76;
  }

  change(options) {
    Object.assign(this, options);
    this.image = null;
    this.at = null;
    this.quiet();
    this.draw();
  }

  paint() {
    if (!this.image || this.painted !== theme()) this.image = this.colours();
    const { pen, left, top } = this, wide = this.columns * this.cellWidth, tall = this.rows * this.cellHeight;
    // Cells smaller than a pixel of the screen are averaged, none is left out.
    pen.imageSmoothingEnabled = this.cellWidth * (window.devicePixelRatio || 1) < 1;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(this.image, left, top, wide, tall);
    const step = niceStep(Math.ceil(14 / this.cellHeight));
    this.rowLabels.forEach((name, i) => i % step || this.text(name, left - 5, this.place(i, 0)[1], "right"));
    this.nameColumns(top + tall, this.columnLabels, this.across);
    this.legend(left, top + tall + 44);
    if (this.at) {
      const [row, column] = this.at;
      pen.strokeStyle = this.ink.text;
      pen.lineWidth = 2;
      pen.strokeRect(left + column * this.cellWidth - 1, top + row * this.cellHeight - 1, this.cellWidth + 2, this.cellHeight + 2);
    }
  }

  colours() {
    this.painted = theme();
    const stops = SCALES[theme()].map(bytes), none = bytes(this.ink.none);
    const image = document.createElement("canvas");
    image.width = this.columns;
    image.height = this.rows;
    const pen = image.getContext("2d"), pixels = pen.createImageData(this.columns, this.rows);
    for (let row = 0, at = 0; row < this.rows; row++)
      for (let column = 0; column < this.columns; column++, at += 4) {
        pixels.data.set(colourOf(this.ratio(row, column), this.most, stops, none), at);
        pixels.data[at + 3] = 255;
      }
    pen.putImageData(pixels, 0, 0);
    return image;
  }

  legend(x, y) {
    const { pen } = this, stops = SCALES[theme()], wide = Math.min(180, this.width * 0.3);
    const paint = pen.createLinearGradient(x + 40, 0, x + 40 + wide, 0);
    stops.forEach((colour, i) => paint.addColorStop(i / (stops.length - 1), colour));
    pen.fillStyle = paint;
    pen.fillRect(x + 40, y, wide, 10);
    this.text(short(1 / this.most), x + 35, y + 6, "right");
    this.text(short(this.most), x + 45 + wide, y + 6, "left");
    this.text("1", x + 40 + wide / 2, y + 19, "center");
    pen.fillStyle = this.ink.none;
    pen.fillRect(x + wide + 84, y, 12, 10);
    this.text(this.none || "none", x + wide + 101, y + 6, "left");
  }
}

// Values over columns, on an axis: what bars and lines share. `format` writes a value.
class AxisChart extends Chart {
  rows = 1;

  tall() {
    this.left = 58;
    this.top = this.legendHeight || 8;
    this.cellWidth = (this.width - this.left - 6) / this.columns;
    this.cellHeight = this.inner || 170;
    return this.top + this.cellHeight + 36;
  }

  axis(low, high) {
    this.low = low;
    this.high = high > low ? high : low + 1;
    const rough = (this.high - this.low) / 4, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= rough);
    for (let n = Math.ceil(this.low / step - 1e-9); n * step <= this.high * (1 + 1e-9); n++) {
      const y = this.y(n * step);
      this.rule(this.left, y, this.width - 6, y, this.ink.line);
      this.text(this.format(+(n * step).toPrecision(12)), this.left - 6, y, "right");
    }
  }

  y(value) {
    return this.top + this.cellHeight * (1 - (value - this.low) / (this.high - this.low));
  }

  pointer() {
    if (!this.at) return;
    const x = this.place(0, this.at[1])[0];
    this.rule(x, this.top, x, this.top + this.cellHeight, this.ink.text);
  }
}

// values: one a column; even: the height of a dashed line; marked: columns that stand out.
class BarChart extends AxisChart {
  inner = 220;

  change(options) {
    Object.assign(this, options);
    this.at = null;
    this.quiet();
    this.draw();
  }

  paint() {
    this.axis(0, Math.max(...this.values, this.even) * 1.08);
    const gap = this.cellWidth > 4 ? this.cellWidth * 0.18 : 0;
    this.values.forEach((value, i) => {
      this.pen.fillStyle = this.marked.includes(i) ? this.ink.top : this.ink.bar;
      const x = this.left + i * this.cellWidth + gap / 2, y = this.y(value);
      // A bar is as wide as a pixel at least, so that none disappears.
      this.pen.fillRect(x, y, Math.max(this.cellWidth - gap, 1), this.y(0) - y);
    });
    this.rule(this.left, this.y(this.even), this.width - 6, this.y(this.even), this.ink.even, [5, 4]);
    this.nameColumns(this.top + this.cellHeight, this.columnLabels, this.across);
    this.pointer();
  }
}

// series: [{name, values, dash}], null where there is none; even: the height of a dashed line.
class LineChart extends AxisChart {
  paint() {
    const known = this.series.flatMap((one) => one.values).filter((value) => value !== null);
    if (this.even !== undefined) known.push(this.even);
    const low = Math.min(...known), high = Math.max(...known), room = (high - low) * 0.08 || 0.5;
    this.axis(this.fromZero ? 0 : low - room, high + room);
    if (this.even !== undefined) this.rule(this.left, this.y(this.even), this.width - 6, this.y(this.even), this.ink.even, [5, 4]);
    let x = this.left, line = 8;
    this.series.forEach((one, number) => {
      const { pen } = this, colour = this.ink.series[number];
      pen.strokeStyle = pen.fillStyle = colour;
      pen.lineWidth = 1.5;
      pen.setLineDash(one.dash ? [2, 3] : []);
      pen.beginPath();
      let drawing = false;
      one.values.forEach((value, i) => {
        const at = [this.place(0, i)[0], value === null ? 0 : this.y(value)];
        if (value !== null) drawing ? pen.lineTo(...at) : pen.moveTo(...at);
        drawing = value !== null;
      });
      pen.stroke();
      pen.setLineDash([]);
      if (!one.dash)
        one.values.forEach((value, i) => {
          if (value === null) return;
          pen.beginPath();
          pen.arc(this.place(0, i)[0], this.y(value), 2.6, 0, 7);
          pen.fill();
        });
      if (this.series.length > 1) {
        const wide = 40 + pen.measureText(one.name).width;
        if (x > this.left && x + wide - 16 > this.width) [x, line] = [this.left, line + 16];
        this.rule(x, line, x + 18, line, colour, one.dash ? [2, 3] : []);
        this.text(one.name, x + 23, line, "left");
        x += wide;
      }
    });
    this.nameColumns(this.top + this.cellHeight, this.columnLabels, this.across);
    this.pointer();
  }
}

const drawAll = () => charts.forEach((chart) => chart.draw());
dark.addEventListener("change", drawAll);
printed.addEventListener("change", drawAll);
