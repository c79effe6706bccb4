"""The pictures: returns of each environment and of all rows, each claim and all of them."""

import textwrap

import matplotlib

matplotlib.use("agg")

import numpy as np  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.ticker import EngFormatter  # noqa: E402
from runner import COLORS, HERE, interval  # noqa: E402

VERDICTS = dict(reached="tab:green", level="tab:orange", below="tab:red")


def steps_axis(axes):
    """Environment steps as 200k, few of them."""
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=4)


def band(axes, x, curves, color, label=None):
    """The mean of curves, (seeds, points), and its 95% interval."""
    low, high = np.array([interval(column) for column in curves.T]).T
    axes.plot(x, curves.mean(0), color=color, label=label)
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)


def environment(name, results, curves):
    """One panel a row: evaluations during training, the reference, its tolerance in grey.

    The dot is the evaluation that the verdict is of, where that is the one at the end.
    """
    columns = min(5, len(results))
    height = -(-len(results) // columns)
    size = (2.6 * columns + 0.6, 2.2 * height + 0.5)
    figure, grid = plt.subplots(height, columns, figsize=size, sharey=True, squeeze=False)
    for axes in grid.flat[len(results) :]:
        axes.set_visible(False)
    for result, axes in zip(results, grid.flat, strict=False):
        row = result["row"]
        x = np.arange(1, 21) * row["steps"] / 20
        band(axes, x, curves(row, result["lines"]), COLORS[row["script"]])
        axes.axhline(row["reference"], color="black", linestyle=":", linewidth=1)
        axes.axhspan(row["reference"] - row["tolerance"], row["reference"], color="0.85", zorder=0)
        if row["metric"] == "greedy":
            axes.plot(row["steps"], result["values"].mean(), "o", color=COLORS[row["script"]], ms=4)
        twice = sum(other["row"]["script"] == row["script"] for other in results) > 1
        steps = f", {EngFormatter(sep='')(row['steps'])} steps" if twice else ""
        axes.set_title(row["script"] + steps, fontsize=10)
        axes.set_xlim(0)
        steps_axis(axes)
    figure.supxlabel("environment steps", fontsize=10)
    figure.supylabel("return", fontsize=10)
    figure.suptitle(name, fontsize=11)
    figure.tight_layout()
    figure.savefig(HERE / f"plots/{name}.png", dpi=100)
    plt.close(figure)


def label(row):
    """ppo  Hopper-v5  1M"""
    return f"{row['script']}  {row['env']}  {EngFormatter(sep='')(row['steps'])}"


LEFT, RIGHT = -0.5, 1.6  # the axis of scores


def glance(results, score):
    """Every row as a score: 0 is random play, 1 the reference; interval, bar and the peer.

    An interval that goes beyond the axis ends in an arrow; without a dot, so does its mean.
    """
    results = sorted(results, key=lambda result: list(COLORS).index(result["row"]["script"]))
    half = (len(results) + 1) // 2
    scripts = [result["row"]["script"] for result in results]
    while half < len(results) and scripts[half] == scripts[half - 1]:
        half += 1  # a script's rows stay together
    parts = [part for part in (results[:half], results[half:]) if part]
    height = 0.21 * max(map(len, parts)) + 1.1
    figure, grid = plt.subplots(1, len(parts), figsize=(6 * len(parts), height), squeeze=False)
    for part, axes in zip(parts, grid.flat, strict=True):
        for y, result in enumerate(part):
            row, values = result["row"], result["values"]
            bar = score(row, row["reference"] - row["tolerance"])
            axes.plot([bar, bar], [y - 0.4, y + 0.4], color="black", linewidth=1.5)
            scores = score(row, values)
            mean, low, high = scores.mean(), *interval(scores)
            color = VERDICTS[result["verdict"]]
            axes.plot(np.clip([low, high], LEFT, RIGHT), [y, y], color=color, linewidth=2)
            for end, mark, beyond in (LEFT, "<", low < LEFT), (RIGHT, ">", high > RIGHT):
                if beyond:
                    axes.plot(end, y, mark, color=color, markersize=5)
            if LEFT <= mean <= RIGHT:
                axes.plot(mean, y, "o", color=color, markersize=5)
            if len(result["peer"]):
                theirs = np.clip(score(row, result["peer"]).mean(), LEFT, RIGHT)
                axes.plot(theirs, y, "D", color="none", markeredgecolor="0.3", markersize=5)
        axes.set_yticks(range(len(part)), [label(result["row"]) for result in part], fontsize=8)
        axes.set_ylim(len(part) - 0.5, -0.5)
        axes.set_xlim(LEFT - 0.05, RIGHT + 0.05)
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.set_xlabel("score: 0 random play, 1 the published reference", fontsize=9)
    marks = [
        plt.Line2D([], [], marker="o", color=color, linewidth=2, label=verdict)
        for verdict, color in VERDICTS.items()
    ]
    bar = dict(marker="|", color="black", linestyle="", markersize=9)
    marks += [plt.Line2D([], [], **bar, label="reference less tolerance")]
    beyond = dict(marker=">", color="0.3", linewidth=2)
    marks += [plt.Line2D([], [], **beyond, label="goes on beyond the axis")]
    if any(len(result["peer"]) for result in results):
        peer = dict(marker="D", color="none", markeredgecolor="0.3")
        marks += [plt.Line2D([], [], **peer, label="stable-baselines3")]
    figure.legend(handles=marks, loc="upper center", ncols=len(marks), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.35 / height))
    figure.savefig(HERE / "plots/overview.png", dpi=100)
    plt.close(figure)


def claim(name, values):
    """One panel a statistic and task: every seed, the mean over seeds, and its 95% interval."""
    columns = min(4, len(values))
    height = -(-len(values) // columns)
    size = (2.7 * columns + 0.2, 2.1 * height)
    figure, grid = plt.subplots(height, columns, figsize=size, squeeze=False)
    for axes in grid.flat[len(values) :]:
        axes.set_visible(False)
    for ((what, task), settings), axes in zip(values.items(), grid.flat, strict=False):
        for y, (setting, found) in enumerate(settings.items()):
            low, high = interval(found)
            axes.plot(found, np.full(len(found), y) + 0.18, ".", color="0.6", markersize=4)
            axes.plot([low, high], [y - 0.12, y - 0.12], color="tab:blue", linewidth=2)
            axes.plot(np.mean(found), y - 0.12, "o", color="tab:blue", markersize=4)
        axes.set_yticks(range(len(settings)), settings, fontsize=8)
        axes.set_ylim(len(settings) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.locator_params(axis="x", nbins=4)
        if axes.get_xlim()[1] >= 10_000:
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title(textwrap.fill(f"{what}, {task}", 34), fontsize=9)
    figure.tight_layout()
    (HERE / "plots/claims").mkdir(exist_ok=True)
    figure.savefig(HERE / f"plots/claims/{name}.png", dpi=80)
    plt.close(figure)


def claims(rows):
    """All claims at a glance: (claim, verdicts of its predictions), a panel a claim, in their order."""
    colors = {"holds": "tab:green", "open": "0.65", "fails": "tab:red", "not run": "white"}
    columns = 5
    height = len(rows) // columns + 1  # the last place is the legend's
    figure, grid = plt.subplots(height, columns, figsize=(13, 1.05 * height))
    for axes in grid.flat:
        axes.axis("off")
    for number, ((sentence, verdicts), axes) in enumerate(zip(rows, grid.flat, strict=False), 1):
        for x, verdict in enumerate(sorted(verdicts, key=list(colors).index)):
            square = dict(facecolor=colors[verdict], edgecolor="0.4", clip_on=False)
            axes.add_patch(plt.Rectangle((x / 12, 0), 1 / 15, 0.2, **square))
        text = textwrap.fill(f"{number}. {sentence}", 32)
        axes.text(0, 0.98, text, va="top", fontsize=9.5, linespacing=1.15)
    marks = [
        plt.Rectangle((0, 0), 1, 1, facecolor=color, edgecolor="0.4", label=name)
        for name, color in colors.items()
    ]
    grid.flat[-1].legend(handles=marks, title="predictions", loc="center", frameon=False, ncols=2)
    figure.subplots_adjust(left=0.01, right=0.99, top=1, bottom=0.02, wspace=0.06, hspace=0.2)
    figure.savefig(HERE / "plots/claims.png", dpi=80)
    plt.close(figure)
