"""How the verbs of eval.py show what they found: tables, --json, --plot (needs matplotlib), the page of `show --html`."""
from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from data_prep import UserError, write_json, written

WRITTEN = ("json", "plot", "dump", "html", "strength")  # flags that name a file to be written


def save_json(args, result: dict) -> None:
    """Where --json asks for it: the result, and the flags and versions that it came from."""
    if args.json:
        versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
        flags = {k: v for k, v in vars(args).items() if k not in ("run", *WRITTEN)}
        write_json(args.json, {"verb": args.verb, "flags": flags, "versions": versions, **result})


def shown(value: float | None, ends: list[float] | None = None, form: str = ".3f", scale: float = 1) -> str:
    """A number and its interval, "-" for none: 0.512 [0.431, 0.598]."""
    if value is None:
        return "-"
    text, *others = (f"{scale * v:{form}}" for v in (value, *(ends or [])))
    return f"{text} [{', '.join(others)}]" if others else text


def percent(value: float | None, ends: list[float] | None = None, sign: str = "") -> str:
    """A share and its interval in %: 51.2 [43.1, 59.8]."""
    return shown(value, ends, sign + ".1f", 100)


def print_rows(header: list[str], rows: list[list[str]]) -> None:
    """A table with the first column at the left, the others at the right; short rows end in empty cells."""
    rows = [header, *(row + [""] * (len(header) - len(row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(c.rjust(w) if k else c.ljust(w) for k, (c, w) in enumerate(zip(row, widths))))


def print_accuracy(result: dict) -> None:
    """The models, the baselines, each subset; a table a benchmark, where the nine cells of an RM-Bench domain
    are left to --json."""
    def row(label: str, r: dict) -> list[str]:
        if not r["pairs"]:
            return [label, "-", *[""] * 5, str(r["dropped"])]
        gain, equal = r.get("difference"), r["equal_length"]
        reward, margin = (f"{r[k + '_mean']:.2f} ± {r[k + '_std']:.2f}" for k in ("reward", "margin"))
        return [label, percent(r["accuracy"], r["interval"]),
                percent(gain["mean"], gain["interval"], "+") if gain else "",
                f"{percent(equal['accuracy'])} of {equal['pairs']}", reward, margin, str(r["ties"]),
                str(r["dropped"])]

    rows = [row(name[-44:], r) for name, r in result["models"].items()]
    rows += [[name, percent(r["accuracy"], r.get("interval"))] for name, r in result["baselines"].items()]
    for subset, models in result["subsets"].items():
        rows.append([f"{subset} ({next(iter(models.values()))['pairs']})"])
        rows += [row("  " + name[-42:], r) for name, r in models.items()]
    print_rows(["accuracy %", "all [95 %]", "- first", "equal length", "reward", "margin", "ties", "dropped"], rows)
    for source, models in result.get("benchmarks", {}).items():
        counts, rows = {k: r["count"] for m in [*models.values()][::-1] for k, r in m.items()}, []
        for k in (k for k in counts if not re.search(r" \d-\d$", k)):
            cells = [m.get(k, {"value": None}) for m in models.values()]
            rows.append([f"{k} ({counts[k]})", *(percent(c["value"], c.get("interval")) for c in cells)])
        if rows:
            print(f"\n{source} in its own terms, a tie being a miss")
            print_rows(["% [95 %]"] + [name[-44:] for name in models], rows)


def print_attention(file: str, name: str, r: dict) -> None:
    """A row a stage, 0 = nothing masked; "masked from here": this stage and all after it."""
    def cells(key: str, form: str = ".2f", scale: float = 1) -> list[str]:
        return [shown(mean, ends, form, scale) for mean, ends in zip(r[key]["mean"], r[key]["interval"])]

    columns = {"masked to here %": cells("masked_from_start", ".1f", 100),
               "masked from here %": cells("masked_from_end", ".1f", 100)[::-1]}
    for k in ("right", "wrong"):
        columns[f"density, {r[f'density_{k}']['pairs']} {k}"] = ["", *cells(f"density_{k}")]
    for k in ("right", "wrong"):
        columns[f"cumulative %, {k}"] = ["", *cells(f"cumulative_{k}", ".0f", 100)]
    columns |= {f"KL {k}": ["", *cells(f"kl_{k}")] for k in ("intra", "inter") if f"kl_{k}" in r}
    shares = [f"{100 * v:.0f} % to {'the ' * (k == 'first token')}{k}" for k, v in r["shares"].items()]
    print(f"\n{file}, {name}: {r['pairs']} pairs; the scoring position gives " + ", ".join(shares))
    print_rows(["stage", *columns], [[str(k), *row] for k, row in enumerate(zip(*columns.values()))])


def print_page(page: dict) -> None:
    """The words of each side, in a terminal on a background as red as their share of the attention."""
    words, plain = page["words"], not sys.stdout.isatty()
    for s, side in ((1, "chosen"), (2, "rejected")):
        reward, attention = page["rewards"][s - 1], page["attention"][s - 1]
        most = [f"{words[w]} ({100 * attention[w]:.1f} %)" for w in np.argsort(attention)[::-1][:5]]
        share = f"{100 * sum(attention):.0f} % of the attention is on words, most on "
        print(f"\n{page['model']}, {side}, reward {reward:.3f}; {share}" + ", ".join(most))
        pale = [int(255 - 200 * a / (max(attention) or 1.0)) for a in attention]
        shaded = [f"\x1b[48;2;255;{p};{p}m\x1b[30m{word}\x1b[0m" for word, p in zip(words, pale)]
        for segment in (0, s):
            mine = [w for w, t in enumerate(page["segments"]) if t == segment]
            print(" ".join((words if plain else shaded)[w] for w in mine))


def print_attack(files: dict[str, list], edits: dict, result: dict) -> None:
    """The edits, each with a row a model."""
    for file, models in result.items():
        rows = [[f"{name[-44:]} ({m['pairs']} pairs, {m['dropped']} dropped)", "", "", percent(m.get("accuracy"))]
                for name, m in models.items()]
        for edit in edits:
            rows.append([edit])
            for name, e in ((name, m["edits"][edit]) for name, m in models.items() if m["pairs"]):
                rows.append(["  " + name[-42:], percent(e["flip_rate"], e["flip_interval"]),
                             percent(e["flips_of_all"]), percent(e["accuracy"]),
                             shown(e["shift"], e["shift_interval"], "+.2f")])
        print(f"\n{file}: {len(files[file])} pairs, only the rejected response is edited")
        print_rows(["", "flips % [95 %]", "of all %", "accuracy %", "shift [95 %]"], rows)
    print("\n(flips: of the pairs ranked right before, ties after the edit count half; shift: of the reward, "
          "in standard\n deviations of the model's rewards of the unedited responses; the same pairs and "
          "prompts for every edit)")


def print_bestofn(files: dict[str, list], result: dict) -> None:
    """A row for n = 1, 2, 4 ... N of each model, and what it gains."""
    for file, models in result.items():
        print(f"\n{file}: {len(files[file])} prompts, {len(files[file][0].responses)} candidates each")
        rows = []
        for name, m in models.items():
            rows.append([f"{name[-44:]} ({m['prompts']} prompts, {m['dropped']} dropped)"])
            for k, n in enumerate(m.get("n", [])):
                if n & (n - 1) == 0 or n == len(m["n"]):
                    gold = shown(m["gold"][k], [ends[k] for ends in m["gold_interval"]])
                    rows.append([f"  {n}", f"{m['kl'][k]:.2f}", shown(m["proxy"][k]), gold,
                                 shown(m["random"]), shown(m["oracle"][k])])
        print_rows(["best of n", "KL", "proxy", "gold [95 %]", "random", "oracle"], rows)
        for name, m in ((name, m) for name, m in models.items() if m["prompts"]):
            gain = [shown(m[k], form="+.2f") for k in ("proxy_gain", "gold_gain", "gain_difference")]
            print(f"{name[-44:]}: gap {shown(m['gap'], m['gap_interval'])} below the best gold, at n = "
                  f"{m['best_n']}; proxy gain {gain[0]}, gold gain {gain[1]}, difference {gain[2]}")
    print("\n(KL = log n - (n-1)/n; gap: highest gold of any n minus gold at N, never negative; gains: from "
          "n = 1 to N, in standard\n deviations within a prompt; intervals: 95 %, bootstrap over prompts)")


def print_stability(files: dict[str, list], result: dict, drifts: dict) -> None:
    """A row a run, then the drift of each."""
    for file, r in result.items():
        rows = []
        for k, (name, m) in enumerate(r["models"].items()):
            c = m.get("calibration", {})
            numbers = [c.get(v) for v in ("nll", "brier", "ece", "temperature")]
            for row in (r["rank_correlation_of_rewards"][k], r["rank_correlation_of_margins"][k]):
                others = [v for j, v in enumerate(row) if j != k and v is not None]
                numbers.append(float(np.mean(others)) if others else None)
            rows.append([name[-44:], percent(m.get("accuracy"), m.get("interval")), *map(shown, numbers),
                         str(m["dropped"])])
        print(f"\n{file}: {len(files[file])} pairs; accuracy of the runs {percent(r['accuracy']['mean'])} ± "
              f"{percent(r['accuracy']['std'])} (mean, standard deviation)")
        print_rows(["stability", "accuracy % [95 %]", "NLL", "Brier", "ECE", "T", "rank corr.", "of margins",
                    "dropped"], rows)
    for name, d in drifts.items():
        steps = [f"{step}: {mean:.2f} ± {std:.2f}" for step, mean, std in zip(*d.values())] if d else []
        said = "validation reward by step: " + ", ".join(steps) if d else "no metrics.jsonl beside it, so no drift"
        print(f"{name[-44:]}: {said}")
    print("\n(NLL, Brier, ECE of sigma(margin); T: the temperature that would minimise the NLL; rank "
          "correlation: Spearman, mean over\n the other runs, of all rewards and of the margins, which do "
          "not see a shift between prompts)")


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


def plot_attack(edits: dict, result: dict, path: str) -> None:
    """Flips by edit, the models side by side; a panel a file."""
    panels = []
    for file, models in result.items():
        points = {name: (list(edits), *([e[v] for e in m["edits"].values()] for v in ("flip_rate", "flip_interval")))
                  for name, m in models.items() if m["pairs"]}
        panels.append((file, "", "share of flips, 95 % interval", points))
    draw(path, [panels])


def plot_bestofn(result: dict, path: str) -> None:
    """Gold score against the KL of the best of n, beside the oracle and a random choice; a panel a file."""
    panels = []
    for file, models in result.items():
        curves = {name: (m["kl"], m["gold"], list(zip(*m["gold_interval"]))) for name, m in models.items() if m["prompts"]}
        m = next(iter(models.values()))
        if m["prompts"]:
            curves["oracle"] = (m["kl"], m["oracle"], None)
            curves["random"] = (m["kl"], [m["random"]] * len(m["kl"]), None)
        panels.append((file, "KL of the best of n, nats", "gold score, 95 % interval", curves))
    draw(path, [panels])


def plot_stability(result: dict, drifts: dict, path: str) -> None:
    """Reliability of sigma(|margin|), a panel a file; then the drift of the runs that have one."""
    panels = []
    for file, r in result.items():
        bins = {name: m["calibration"]["bins"] for name, m in r["models"].items() if "calibration" in m}
        curves = {name: ([b["confidence"] for b in some], [b["right"] for b in some], None) for name, some in bins.items()}
        curves["calibrated"] = ([0.5, 1], [0.5, 1], None)
        panels.append((file, "confidence, sigma(|margin|)", "share ranked right", curves))
    curves = {name: (d["steps"], d["mean"], list(zip(np.subtract(d["mean"], d["std"]), np.add(d["mean"], d["std"]))))
              for name, d in drifts.items() if d}
    if curves:
        panels.append(("", "step", "validation reward, mean ± standard deviation", curves))
    draw(path, [panels])


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
