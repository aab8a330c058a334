"""What came out of training.py: ratios, goals, tables and pictures."""

import statistics
from pathlib import Path

from training_rows import GOALS, MOST_COST, MOST_MEMORY, MOST_SECONDS, ROWS, SEEDS, SETTINGS, SMALLEST_SHARE

# --- against the goals --------------------------------------------------------------------------------------


def limit_of(limits: list[dict], precision: str) -> float | None:  # FLOP/s; None: not measured
    "The best rate of a matrix product of this precision."
    return max(
        (rate for row in limits if row["precision"] == precision for rate in row["rates"]), default=None
    )


def _share(rate: float, limit: float | None) -> float | None:
    "Of the limit; None: not measured."
    if not limit:
        return None
    return rate / limit


def compared(part: dict) -> list[dict]:  # one row for each trainer that was measured
    "What the table shows."
    rates = {
        name: row["samples"] / statistics.median(row["seconds"])
        for name, row in part["rows"].items()
        if "seconds" in row
    }
    out = []
    for name, rate in rates.items():
        row, flops = part["rows"][name], part["rows"][name]["flops"]
        limit = limit_of(part["limits"], row["precision"])
        out.append(
            {
                "name": name,
                "rate": rate,
                "ratios": {
                    peer: rate / rates[peer] for peer in ROWS if "peer" in ROWS[peer] and peer in rates
                },
                "flops": flops,
                "flop_rate": rate * flops,
                "share": _share(rate * flops, limit),
                "busy": row["busy"],
                "peak": row["peak"],
                "precision": row["precision"],
            }
        )
    return out


def verdict(reached: bool) -> str:
    "Of equal width, for the left of a table."
    return {True: "met   ", False: "missed"}[bool(reached)]


def judged(rows: list[dict]) -> list[str]:
    "Each goal in words."
    by_name, lines = {row["name"]: row for row in rows}, []
    for name, goals in GOALS.items():
        if name not in by_name:
            continue
        row = by_name[name]
        for peer, least in goals.items():
            if peer is None:
                reached = row["rate"]
                text = f"{least:,.0f} steps/s, is {reached:,.0f}"
            elif peer in row["ratios"]:
                reached = row["ratios"][peer]
                text = f"{least:g} times {peer}, is {reached:,.1f}"
            else:
                continue
            lines.append(f"{verdict(reached >= least)} {name}: {text}")
        if row["share"] is not None and None not in goals:
            met = verdict(row["share"] >= SMALLEST_SHARE)
            lines.append(f"{met} {name}: {SMALLEST_SHARE:.0%} of the limit, is {row['share']:.0%}")
    return lines


def costs(
    rows: list[dict],
) -> list[dict]:  # with `cost`, seconds per transition, and `relative`, to the least of the rows before
    "What a transition costs, row by row."
    out, least = [], float("inf")
    for row in rows:
        cost = statistics.median(row["seconds"]) / row["samples"]
        relative = cost / least or 1.0  # the first has nothing before it
        out.append(row | {"cost": cost, "relative": relative})
        least = min(least, cost)
    return out


# --- what came out ------------------------------------------------------------------------------------------


def flop_text(rate: float) -> str:
    if rate >= 1e13:
        return f"{rate / 1e12:,.1f} TFLOP/s"
    return f"{rate / 1e9:,.0f} GFLOP/s"


def print_limits(limits: dict):
    "How fast the machine multiplies."
    print(
        f"{'matrix products, GFLOP/s':28}"
        + "".join(f"{'×'.join(map(str, shape)):>18}" for shape in limits["shapes"])
        + f"{'error':>10}  is"
    )
    for row in limits["rows"]:
        print(
            f"{row['path']:28}"
            + "".join(f"{rate / 1e9:>18,.0f}" for rate in row["rates"])
            + f"{row['error']:>10.1e}  {row['precision']}"
        )
    print(flush=True)


def print_training(part: dict):
    "The table, and the goals."
    rows, peers = compared(part), [name for name, row in ROWS.items() if "peer" in row]
    print(
        f"\n{'':40}{'steps/s':>12}"
        + "".join(f"{'× ' + name:>{len(name) + 4}}" for name in peers)
        + f"{'MFLOP/step':>12}{'rate':>16}{'of limit':>14}{'busy':>6}{'peak':>9}"
    )
    for row in rows:
        texts = {name: f"{ratio:.1f}" for name, ratio in row["ratios"].items()}
        ratios = "".join(texts.get(name, "").rjust(len(name) + 4) for name in peers)
        share = ""
        if row["share"]:
            share = f"{row['share']:.0%} {row['precision']}"
        print(
            f"{row['name']:40}{row['rate']:>12,.0f}{ratios}{row['flops'] / 1e6:>12.1f}"
            f"{flop_text(row['flop_rate']):>16}{share:>14}"
            f"{row['busy']:>6.0%}{row['peak'] / 1e9:>6.1f} GB"
        )
    for name, row in part["rows"].items():
        if "left_out" in row:
            print(f"{name:40} left out: {row['left_out']}")
    if part["settings"] == SETTINGS:
        for line in judged(rows):
            print(line)


def print_memory(part: dict):
    for name, row in part["rows"].items():
        if "above" not in row:
            continue
        print(
            f"{verdict(row['above'] <= MOST_MEMORY)} {name}: {row['above'] / 1e6:.0f} MB "
            f"above model and table ({row['before'] / 1e6:.0f} MB) in an update of {row['samples']:,} steps "
            f"with {row['inputs']:,} inputs, at most {MOST_MEMORY / 1e6:.0f}"
        )


def print_scaling(part: dict):
    for axis, rows in part["tables"].items():
        rows = costs(rows)
        print(f"\n{axis:>28}{'µs a transition':>18}{'relative':>10}{'MFLOP/step':>12}")
        for row in rows:
            print(
                f"{row['label']!s:>28}{1e6 * row['cost']:>18.2f}{row['relative']:>10.2f}"
                f"{row['flops'] / 1e6:>12.1f}"
            )
        if axis in MOST_COST and rows:
            worst = max(row["relative"] for row in rows)
            print(
                f"{verdict(worst <= MOST_COST[axis])} {axis}: at most {MOST_COST[axis]:g} "
                f"times the least cost of the rows before, is {worst:.2f}"
            )


def print_seeds(part: dict):
    "Eight beside one."
    seeds = next((row["seeds"] for row in part["rows"]), SEEDS)
    print(
        f"\n{'hidden layers':>20}{'':>9}{'one seed':>11}{seeds:>4} at once{'times':>8}{'steps/s of all':>16}"
    )
    for row in part["rows"]:
        alone, together = (statistics.median(row[name]) for name in ("alone", "together"))
        print(
            f"{row['label']:>20}{row['precision']:>9}{alone:>9.3f} s{together:>10.3f} "
            f"s{together / alone:>8.2f}{row['seeds'] * row['samples'] / together:>16,.0f}  "
            f"{verdict(together <= MOST_SECONDS * alone).strip()}: at most {MOST_SECONDS:g}"
        )


def _figure(width: float, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_training(part: dict, path: Path):
    "Steps per second as bars."
    rows = compared(part)[::-1]
    figure = _figure(10, 0.42 * len(rows) + 1.4)
    axes = figure.subplots()
    first = next(iter(ROWS))
    colours = {True: "tab:blue", False: "tab:orange"}  # ours, and the peers'
    bars = axes.barh(
        [row["name"] for row in rows],
        [row["rate"] for row in rows],
        color=[colours[row["name"].startswith("ours")] for row in rows],
    )

    def text(row: dict) -> str:
        said = f"{row['rate']:,.0f}"
        if first in row["ratios"] and row["name"] != first:
            said += f", {row['ratios'][first]:.1f} × {first}"
        if row["share"]:
            said += f", {row['share']:.0%} of the {row['precision']} limit"
        return said

    axes.bar_label(bars, [text(row) for row in rows], padding=3, fontsize=8)
    axes.set_xlim(0, 1.95 * max(row["rate"] for row in rows))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g} k")
    axes.set_xlabel("environment steps a second, rollout and update")
    s = part["settings"]
    axes.set_title(
        f"{s['n_envs']:,} × {s['n_steps']} steps, minibatch {s['minibatch_size']:,}, {s['n_epochs']} "
        f"epochs, {s['hidden_dims']}, windows of {s['window']} bars\n{part['machine']}, {part['date']}",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def label_text(label: int | str) -> str:
    if isinstance(label, str):
        return label
    return f"{label:,}"


def draw_scaling(part: dict, path: Path):
    "What a transition costs, a panel for each thing that grows."
    figure = _figure(15, 3.6)
    for axes, (axis, rows) in zip(figure.subplots(1, len(part["tables"])), part["tables"].items()):
        rows = costs(rows)
        axes.plot(
            [label_text(row["label"]) for row in rows],
            [1e6 * row["cost"] for row in rows],
            marker="o",
        )
        axes.set_title(axis, fontsize=10)
        axes.set_ylim(0, 1.1e6 * max(row["cost"] for row in rows))
        axes.tick_params(axis="x", labelsize=8, rotation=20)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("µs a transition")
    s = part["settings"]
    figure.suptitle(
        f"{part['row']}, {s['n_envs'] * s['n_steps']:,} samples, minibatch {s['minibatch_size']:,}, "
        f"{s['n_epochs']} epochs; {part['machine']}, {part['date']}",
        fontsize=9,
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
