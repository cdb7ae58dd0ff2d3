"""Show a benchmark's result: a terminal table, a self-contained HTML page with plots, the README's table."""

import io
import json
import re
import statistics
from pathlib import Path

TEMPLATE = Path(__file__).with_name("report.html")
MARKS = re.compile(r"(<!-- (?P<kind>results|summary): (?P<files>.+?) -->\n).*?(<!-- end of results -->)", re.S)


def save(result: dict, folder: str | Path, name: str) -> list[Path]:
    """Write the result as JSON and, where matplotlib and jinja2 are installed, as HTML; return the paths.

    Both files are called after the device and `name`, so that the results of several machines lie side by side.
    """
    paths = [_path(result, folder, name)]
    paths[0].write_text(json.dumps(result, indent=1) + "\n")
    _path(result, folder, f"{name}-partial").unlink(missing_ok=True)
    try:
        page = html(result)
    except ImportError as missing:
        print(f"no HTML report: {missing.name} is not installed (pip install 'fastlm[report]')")
    else:
        paths.append(paths[0].with_suffix(".html"))
        paths[1].write_text(page)
    return paths


def save_partial(result: dict, folder: str | Path, name: str) -> None:
    """Write what there is of a result as JSON, until `save` has the whole."""
    _path(result, folder, f"{name}-partial").write_text(json.dumps(result, indent=1) + "\n")


def _path(result, folder, name):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{_slug(result['machine'])}-{name}.json"


def _slug(machine):
    words = re.sub(r"\(\w+\)|CPU|Processor|@|both capped to", " ", machine["device"])
    return re.sub(r"[^a-z0-9.]+", "-", f"{words} {machine['threads']}t".lower()).strip("-")


def cells(row: dict) -> tuple[str, ...]:
    """Format one row of a result: what, ran, time, ratio, error, memory, share of the machine's peak."""
    memory = "-"
    if row["memory"] is not None:
        memory = f"{row['memory'] / 1e6:.0f} / {row['baseline_memory'] / 1e6:.0f}"
    return (
        row["name"], row["case"], f"{SHORT.get(row['dtype'], row['dtype'])} {row['mode']}", row["ran"],
        f"{row['seconds'] * 1e3:.2f}", f"{row['baseline_seconds'] * 1e3:.2f}",
        "-" if row["ratio"] == 1 else f"{row['ratio']:.2f}×", _goal(row),
        f"{row['error']:.1e} / {row['stock_error']:.1e}" + ("" if row["within_rule"] else " FAILS"), memory,
        _floor(row),
    )


def _goal(row):
    """Say what the row was to reach, each figure with whether it did."""
    slack = f" or {row['goal']['slack'] * 1e6:.0f} µs" if "slack" in row["goal"] else ""
    allowance = row["goal"].get("allowance", 0)
    beyond = f" beyond {allowance / 1e6:.0f}" if allowance else ""
    signs = {"ratio": "≥{:.2f}×" + slack, "memory": "≤{:.2f} of stock's MB" + beyond, "share": "≥{:.0%} of floor"}
    at_peak = {"ratio": row.get("at_peak")}
    return ", ".join(f"{sign.format(row['goal'][name])} {_reached(name not in row['missed'], at_peak.get(name))}"
                     for name, sign in signs.items() if name in row["goal"]) or "-"


def _reached(met, at_peak):
    """Say whether a goal was met; of a ratio that was not, also what it would be at the machine's peak."""
    return "met" if met else f"MISSED (at peak: {at_peak:.2f}×)" if at_peak else "MISSED"


def _floor(row):
    parts = [] if row["peak_share"] is None else [f"{row['peak_share']:.0%}"]
    return ", ".join(parts + ([f"{row['bytes_per_s'] / 1e9:.1f} GB/s"] if row["bytes_per_s"] else [])) or "-"


SHORT = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}
HEADINGS = ("what", "case", "type, mode", "ran", "ms", "stock", "ratio", "to reach", "error / stock's", "MB / stock's",
            "floor")


def curve_cells(curve: dict) -> tuple[str, ...]:
    """Format one model's comparison of training with stock and with fastlm layers."""
    return (curve["model"], f"{curve['stock_losses'][-1]:.4f}, {curve['fastlm_losses'][-1]:.4f}",
            f"{curve['difference']:.1e}",
            *_rates(curve, "tokens"), *_rates(curve, "generated"),
            ", ".join(f"{op}: {ran}" for op, ran in curve["ran"].items()))


def _rates(curve, what):
    stock, ours = (curve[f"{layers}_{what}_per_s"] for layers in ("stock", "fastlm"))
    return f"{stock:,.0f} → {ours:,.0f}", f"{ours / stock:.2f}×"


CURVE_HEADINGS = ("model", "last losses", "difference", "training tok/s", "ratio", "generation tok/s", "ratio", "ran")


def mean_cells(mean: dict) -> tuple[str, ...]:
    """Format the geometric mean of a group of rows."""
    reached = _reached(mean["found"] >= mean["wanted"], mean.get("at_peak"))
    return (mean["name"], str(mean["rows"]), f"{mean['least']:.2f}×", f"{mean['found']:.2f}×",
            f"≥{mean['wanted']:.2f}× {reached}")


MEAN_HEADINGS = ("group", "rows", "least ratio", "geometric mean", "to reach")
SUMMARY_HEADINGS = ("what", "type, mode", "rows", "least ratio", "geometric mean")


def tables(result: dict):
    """Return rich tables: the models' training runs, every row, and geometric means with what they are to reach."""
    from rich.table import Table

    found = []
    if result["curves"]:
        found.append(_table(Table(title="training with stock and with fastlm layers"), CURVE_HEADINGS,
                            map(curve_cells, result["curves"])))
    if result["rows"]:
        found.append(_table(Table(title="ops and modules"), HEADINGS, map(cells, result["rows"])))
    if result["means"]:
        found.append(_table(Table(title="geometric means"), MEAN_HEADINGS, map(mean_cells, result["means"])))
    return found


def _table(table, headings, rows):
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading not in ("what", "case", "ran"))
    for row in rows:
        style = ("bold red" if any("FAILS" in cell for cell in row) else
                 "yellow" if any("MISSED" in cell for cell in row) else "dim" if "stock" in row else "")
        table.add_row(*row, style=style)
    return table


def html(result: dict) -> str:
    """Return a page that needs nothing beside itself: tables, plots as inline SVG, reasons of what did not run."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(
        result=result, headings=HEADINGS, curve_headings=CURVE_HEADINGS, mean_headings=MEAN_HEADINGS, cells=cells,
        curve_cells=curve_cells, mean_cells=mean_cells, ratios=_ratio_plot(result), losses=_loss_plots(result))


def _ratio_plot(result):
    rows = [r for r in result["rows"] if r["ran"] != "stock"]
    if not rows:
        return ""
    figure, axes = _figure(10, 0.3 * len(rows) + 1)
    labels = [f"{r['name']} {r['case']} {r['mode']} {r['dtype']}" for r in rows]
    axes.barh(labels, [r["ratio"] for r in rows], color=["#2a7" if r["ratio"] >= 1 else "#c43" for r in rows])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("stock time / fastlm time")
    return _svg(figure)


def _loss_plots(result):
    plots = []
    for curve in result["curves"]:
        figure, axes = _figure(5, 3)
        axes.plot(curve["stock_losses"], color="black", linewidth=3, alpha=0.3, label="stock")
        axes.plot(curve["fastlm_losses"], color="#c43", linewidth=1, label="fastlm")
        axes.set(title=curve["model"], xlabel="step", ylabel="loss, nats per token")
        axes.legend()
        plots.append(_svg(figure))
    return plots


def _figure(width, height):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _svg(figure):
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().split("?>", 1)[1].split(">", 1)[1]  # without the XML and document-type headers


def markdown(result: dict) -> str:
    """Return the README's tables: models, means with a figure to reach, rows with one of their own, the rest by op."""
    ran = [r for r in result["rows"] if r["ran"] != "stock"]
    alone = [r for r in ran if _stands_alone(r)]
    rest = [r for r in ran if not _stands_alone(r) and not r["goal"].get("means")]
    lines = [f"{result['machine']['device']}, {result['machine']['threads']} threads, torch "
             f"{result['machine']['torch']}, {result['machine']['date'][:10]}:",
             *_markdown_table(CURVE_HEADINGS, map(curve_cells, result["curves"])),
             *_markdown_table(MEAN_HEADINGS, map(mean_cells, result["means"])),
             *_markdown_table(HEADINGS[:-1], (cells(row)[:-1] for row in alone)),
             *_markdown_table(SUMMARY_HEADINGS, _summary(rest))]
    names = sorted({r["name"] for r in result["rows"]} - {r["name"] for r in ran})
    if names:
        lines += ["", f"Stock PyTorch ran, nothing of ours being faster or measured here, for: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def _stands_alone(row):
    """Whether a row is to reach more than not to be slower."""
    goal = row["goal"]
    return not goal.get("means") and (goal.get("ratio", 0) > 1 or "memory" in goal or "share" in goal)


def _summary(rows):
    groups = {}
    for row in rows:
        groups.setdefault((row["name"], row["dtype"], row["mode"]), []).append(row["ratio"])
    return [(name, f"{SHORT.get(dtype, dtype)} {mode}", str(len(ratios)), f"{min(ratios):.2f}×",
             f"{statistics.geometric_mean(ratios):.2f}×") for (name, dtype, mode), ratios in groups.items()]


def _markdown_table(headings, rows):
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return ["", "| " + " | ".join(headings) + " |", "|" + "---|" * len(headings), *lines] if lines else []


def summary(results: list[dict]) -> str:
    """Return one table of one machine's results: for each layer, type and mode the geometric mean ratio of the rows in
    which ours ran, their least and their most, and a star where stock ran other rows.
    """
    groups = {}
    for row in (row for result in results for row in result["rows"]):
        column = f"{SHORT.get(row['dtype'], row['dtype'])} {row['mode']}"
        groups.setdefault(row["name"], {}).setdefault(column, []).append(row)
    columns = sorted({column for found in groups.values() for column in found}, key=_widest_type_first)
    lines = [(name, *(_summary_cell(found.get(column, [])) for column in columns)) for name, found in groups.items()]
    table = _markdown_table(("what", *columns), (line for line in lines if set(line[1:]) - {"stock", "-"}))
    names = ", ".join(line[0] for line in lines if not set(line[1:]) - {"stock", "-"})
    if names:
        table += ["", f"Stock PyTorch runs, nothing of ours being faster or measured there, for: {names}."]
    return "\n".join(table[1:]) + "\n"


def _widest_type_first(column):
    dtype, mode = column.split()
    return list(SHORT.values()).index(dtype), mode


def _summary_cell(rows):
    ratios = [row["ratio"] for row in rows if row["ran"] != "stock"]
    if not ratios:
        return "stock" if rows else "-"
    star = "" if len(ratios) == len(rows) else " \\*"
    spread = f" ({min(ratios):.2f}–{max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{statistics.geometric_mean(ratios):.2f}×{spread}{star}"


def update_readme(readme: str | Path, results: str | Path) -> None:
    """Fill the sections of a file from JSON in `results`: `<!-- results: FILE -->`, `<!-- summary: FILE … -->`."""
    readme = Path(readme)

    def fill(match):
        found = [json.loads((Path(results) / name).read_text()) for name in match["files"].split()]
        text = summary(found) if match["kind"] == "summary" else "".join(map(markdown, found))
        return match[1] + text + match[4]
    readme.write_text(MARKS.sub(fill, readme.read_text()))
