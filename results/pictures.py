"""What the verbs of eval.py draw: --plot (needs matplotlib) and the page of `show --html`."""
from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep import UserError, written


def canvas(high: int = 1, wide: int = 1, size: tuple[float, float] = (5, 3.6)):
    """(a figure, its axes (high, wide)), panels of that size in inches, drawn to files alone. Raises UserError where
    matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib (all else works without)") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figsize = (wide * size[0], high * size[1])
    return pyplot.subplots(high, wide, figsize=figsize, squeeze=False, layout="tight")


def short(name: str) -> str:
    """The end of a model's path, for a legend."""
    return "/".join(Path(name).parts[-3:])


def draw(path: str, grid: list[list[tuple]], **settings) -> None:
    """Rows of panels, told apart without colour, each (title, x label, y label, {label: (x, y, intervals)}, heights to
    mark ...), n points each, None where not known: lines with bands, or, where x are names, bars with error bars."""
    figure, all_axes = canvas(len(grid), len(grid[0]))
    for axes, (title, xlabel, ylabel, series, *heights) in zip(all_axes.flat, sum(grid, [])):
        named = any(isinstance(x[0], str) for x, *_ in series.values())
        for k, (label, (x, y, ends)) in enumerate(series.items()):
            y = np.array(y, dtype=float)
            low, high = np.array([[np.nan] * 2 if e is None else e for e in ends or [None] * len(y)]).T
            grey, label = 0.7 * k / max(1, len(series) - 1), short(label)
            if named:
                at = np.arange(len(x)) + 0.8 * ((k + 0.5) / len(series) - 0.5)
                axes.bar(at, y, 0.8 / len(series), yerr=np.abs((low - y, high - y)), capsize=2,
                         label=label, color=str(0.95 - grey), hatch=["", "//", "..", "xx"][k % 4], edgecolor="black")
                axes.margins(y=0.35)  # room for the legend
                axes.set_xticks(range(len(x)), x, rotation=35 if max(map(len, x)) > 3 else 0, ha="right")
            else:
                axes.plot(x, y, label=label, color=str(grey), linestyle=["-", "--", ":", "-."][k % 4],
                          marker="osD^vx"[k % 6], markersize=4)
                axes.fill_between(x, low, high, color=str(grey), alpha=0.08, linewidth=0)
        for height in heights:
            axes.axhline(height, color="black", linewidth=0.7)
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, **settings)
        below = {} if named else dict(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        if series:  # none where no pair could be scored
            axes.legend(fontsize=7, **below)  # lines are not to be hidden
        if settings.get("xscale") == "log":
            axes.set_xticks(x, map(str, x))
            axes.set_xticks([], minor=True)
            axes.yaxis.set_major_formatter("{x:g}")
            if np.divide(*axes.get_ylim()) > 1 / 30:
                axes.yaxis.set_minor_formatter("{x:g}")
    save_plot(figure, path)


def save_plot(figure, path: str) -> None:
    """Written aside, then renamed: never half a picture. Raises UserError."""
    with written(path, "wb") as f:
        figure.savefig(f, format=Path(path).suffix[1:].lower(), dpi=150, bbox_inches="tight")


def plot_accuracy(result: dict, path: str) -> None:
    """The models and what length alone reaches, side by side for each file."""
    series = {}
    for name in [*next(iter(result.values()))["models"], "longer response"]:
        rows = [{**r["baselines"], **r["models"]}[name] for r in result.values()]
        series[name] = list(result), [r.get("accuracy") for r in rows], [r.get("interval") for r in rows]
    draw(path, [[("", "", "accuracy, 95 % interval", series, 0.5)]])


def plot_attention(result: dict, path: str) -> None:
    """A row a file: the masking curves of all models, then the density of each model by stage."""
    grid = []
    for file, models in result.items():
        curves, panels = {}, []
        for name, r in models.items():
            for side in ("start", "end"):
                c = r[f"masked_from_{side}"]
                curves[f"{name}, from the {side}"] = np.linspace(0, 1, len(c["mean"])), c["mean"], c["interval"]
            bars, stages = {}, [str(k) for k in range(1, len(c["mean"]))]
            for side in ("right", "wrong"):
                c = r[f"density_{side}"]
                bars[f"ranked {side} ({c['pairs']})"] = stages, c["mean"], c["interval"]
            panels.append((short(name), "stage", "attention density (1 = even)", bars, 1))
        grid.append([(file, "share of the stages masked", "pair accuracy, 95 % band", curves, 0.5), *panels])
    draw(path, grid)


def plot_show(pages: list[dict], path: str) -> None:
    """A row a model, its maps side by side; lines between the segments."""
    figure, grid = canvas(len(pages), len(pages[0]["maps"]), (4, 4))
    for axes, page in zip(grid, pages):
        for panel, (name, values) in zip(axes, page["maps"].items()):
            values = np.sqrt(np.array(values))  # the root shows small shares too
            panel.imshow(values, cmap="Greys", vmax=np.quantile(values, 0.995) or 1)
            for edge in np.flatnonzero(np.diff(np.maximum(page["segments"], 0))) + 0.5:
                panel.axhline(edge, color="black", linewidth=0.5)
                panel.axvline(edge, color="black", linewidth=0.5)
            panel.set_title(f"{short(page['model'])}\n{name}")
            if len(values) <= 60:  # more words could not be read
                panel.set_xticks(range(len(values)), page["words"], rotation=90, fontsize=5)
                panel.set_yticks(range(len(values)), page["words"], fontsize=5)
            panel.set(xlabel="attended word", ylabel="attending word")
    save_plot(figure, path)


HTML = """<!doctype html><meta charset="utf-8"><title>attention of a reward model</title>
<style>body{font:15px/1.7 sans-serif;margin:2em;max-width:75em} span{padding:1px 2px;cursor:pointer}
.on{outline:2px solid #000} figure{display:inline-block;margin:0 1em 1em 0}
canvas{width:20em;height:20em;image-rendering:pixelated;border:1px solid #999}</style>
<h1>One pair</h1><p>Words are shaded by the attention of the scoring position, the darkest for the strongest.
Click a word: all words are then shaded by its row of the simulated map (student) or of the teacher's. Maps:
rows attend to columns.</p><div id="page"></div><script>
const add = (to, tag, text) => {
  const e = document.createElement(tag); if (text) e.textContent = text; to.append(e); return e }
for (const page of PAGES) {
  const root = document.getElementById("page"), sides = ["prompt", "chosen", "rejected"], spans = []
  const names = Object.keys(page.maps); let which = names[0], picked = null
  const paint = (s, list, colour) => s.e.style.background =
    `rgba(${colour},${(0.85 * list[s.i] / (Math.max(...list) || 1)).toFixed(3)})`
  const show = () => {
    for (const s of spans) { s.e.className = ""; paint(s, page.attention[s.view], "200,40,0") }
    if (picked) { picked.e.className = "on"
      for (const s of spans) paint(s, page.maps[which][picked.i], "0,60,200") } }
  add(root, "h2", page.model)
  for (const view of [0, 1]) {
    add(root, "h3", `${sides[view + 1]}: reward ${page.rewards[view].toFixed(3)}`)
    for (const segment of [0, view + 1]) { const p = add(root, "p"); add(p, "b", sides[segment] + ": ")
      page.words.forEach((w, i) => { if (page.segments[i] != segment) return
        const e = add(p, "span", w), s = {e, i, view}; spans.push(s); p.append(" ")
        e.onclick = () => { picked = picked === s ? null : s; show() } }) } }
  const choose = add(root, "p"); add(choose, "b", "A clicked word shows its row of: ")
  for (const n of names) add(choose, "button", n).onclick = () => { which = n; show() }
  for (const n of names) {
    const f = add(root, "figure"), c = add(f, "canvas"), W = page.words.length; add(f, "figcaption", n)
    c.width = c.height = W; const g = c.getContext("2d"), m = page.maps[n], top = Math.max(...m.flat()) || 1
    for (let i = 0; i < W; i++) for (let j = 0; j < W; j++) {
      const v = 255 - Math.round(255 * Math.sqrt(m[i][j] / top))
      g.fillStyle = `rgb(${v},${v},${v})`; g.fillRect(j, i, 1, 1) } }
  show()
}
</script>
"""
