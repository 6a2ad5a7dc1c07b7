"""The tables and the picture of README and docs, made from benchmarks/results.

    python -m benchmarks.tables             # writes them anew; a test holds that nothing would change

A page says where a table goes: what stands between `<!-- table: NAME -->` and `<!-- end -->` is written by
`TABLES[NAME]` from the results of that name, up to a dot. Where a benchmark has not been run, the page says that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PICTURE = ROOT / "docs" / "update.png"
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = dict[str, Any]
ESTIMATED = ("unshared", "flexpg")  # the ways that the cost model knows
PEERS = {  # ways of benchmarks.update, as tables and picture call them
    "unshared": "unshared",
    "packed": "unshared, no padding",
    "torchtune": "torchtune's GRPO",
    "prefix_grouper": "PrefixGrouper",
    "prefix_grouper_tuned": "PrefixGrouper, tuned",
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers come as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(numbers: dict[str, float] | None, digits: int = 2) -> str:
    """A median and its quartiles; a dash where nothing was measured."""
    if numbers is None:
        return "-"
    low, middle, high = (f"{numbers[key]:,.{digits}f}" for key in ("low_quartile", "median", "high_quartile"))
    return f"**{middle}** ({low} to {high})"


def lengths(case: Result) -> str:
    """Prompt and completions in tokens, and what else tells a case from the others."""
    own = case["completions"]
    span = f"{own[0]}" if len(set(own)) == 1 else f"{min(own)} to {max(own)}"
    return f"{case['prompt']:,} + {len(own)} x {span}{variant(case)}"


def variant(case: Result) -> str:
    """The model, where there are several, and activation checkpointing."""
    model = "" if case["model"] == "small" else f", {case['model']}"
    return model + (", checkpointing" if case["checkpointing"] else "")


def of_the_bound(case: Result) -> str:
    """What is reached of the cost model's ratio, over the unshared update without padding."""
    has_pads = len(set(case["completions"])) > 1
    gain = case["speedup_over"].get("packed" if has_pads else "unshared")
    return "-" if gain is None else f"{gain['median'] / case['bound']:.2f}"


def update(result: Result) -> str:
    """What flexpg gains over each way, and the bound."""
    rows = []
    for case in result["cases"]:
        ours = case["update_ms"].get("flexpg")
        seconds = "-" if ours is None else f"{ours['median'] / 1e3:,.2f}"
        gains = [spread(case["speedup_over"].get(way)) for way in PEERS]
        rows.append([lengths(case), seconds, f"{case['bound']:.2f}", of_the_bound(case), *gains])
    return markdown(["tokens", "flexpg, s", "bound", "of it", *PEERS.values()], rows)


def update_short(result: Result) -> str:
    """The medians alone."""
    ways = [way for way in PEERS if way not in ("packed", "prefix_grouper_tuned")]
    rows = [
        [
            lengths(case),
            *(f"{gain['median']:.1f} x" if (gain := case["speedup_over"].get(way)) else "-" for way in ways),
        ]
        for case in result["cases"]
    ]
    return markdown(["tokens", *(f"faster than {PEERS[way]}" for way in ways)], rows)


def nothing_shared(result: Result) -> str:
    """flexpg on sequences of which none is shared, over the unshared update: 1 is as long."""
    even = [case for case in result["cases"] if len(set(case["completions"])) == 1 and case["packed_over_unshared"]]
    return markdown(
        ["tokens", "time, flexpg without sharing / unshared"],
        ([lengths(case), spread(case["packed_over_unshared"])] for case in even),
    )


def pieces(result: Result) -> str:
    """Rates of what split attention does, and what the others would gain."""
    tried = list(result["cases"][0]["gain"])
    rates = ["matmul", "prompt", "rectangle", "completions"]
    header = [
        "tokens; heads, their size",
        *(f"{name}, GFLOP/s" for name in rates),
        *(t.replace("_", " ") for t in tried),
    ]
    rows = [
        [f"{c['prompt']:,} + {c['group']} x {c['completion']}; {c['heads']}, {c['head_dim']}"]
        + [f"{c['gflop_s'][name]['median']:.0f}" for name in rates]
        + [spread(c["gain"][name]) for name in tried]
        for c in result["cases"]
    ]
    return markdown(header, rows)


def attention(result: Result) -> str:
    """Every way's time per visible pair, over flexpg's; forward and backward, where it has one."""
    rows = []
    for case in result["cases"]:
        tokens = f"{case['kind']}: {case['groups']} x ({case['prompt']:,} + {len(case['completions'])})"
        tokens += f" behind {case['system']:,}" if case["system"] else ""
        shape = f"{case['heads']}/{case['kv_heads']}, {case['head_dim']}"
        for name, way in case["ways"].items():
            which = "both" if "both_ms" in way else "forward"
            rate = f"{1e3 * way[f'{which}_tflop_per_s']['median']:,.0f}"
            per_pair = spread(way.get(f"{which}_times_per_pair"))
            rows.append([tokens, shape, name, which, f"{way[f'{which}_ms']['median']:,.2f}", rate, per_pair])
    header = ["row", "heads, their size", "way", "pass", "ms", "GFLOP/s on visible pairs", "time per pair / flexpg's"]
    return markdown(header, rows)


def mask(result: Result) -> str:
    """Build times."""
    rows = [
        [f"{case['tokens']:,}", spread(case["tree_ms"]), spread(case["flexpg_ms"])]
        + [spread(case["eager_ms"], 1), spread(case["compiled_ms"], 1)]
        + [
            "-" if case[key] is None else f"{case[key]['median']:,.0f} x"
            for key in ("eager_over_flexpg", "compiled_over_flexpg")
        ]
        for case in result["cases"]
    ]
    header = [
        "tokens",
        "tree, ms",
        "`block_mask`, ms",
        "`create_block_mask`, ms",
        "compiled, ms",
        "eager / ours",
        "compiled / ours",
    ]
    return markdown(header, rows)


def shapes(result: Result) -> str:
    """Compilations and stalls of each way."""
    (case,) = result["cases"]
    named = {"flexpg": "flexpg", "default": "`torch.compile(flex)`", "static": "the same, `dynamic=False`"}
    rows = [
        [
            named[name],
            way["layouts"],
            way["distinct_lengths"],
            way["compiles"],
            way["stalls"],
            f"{way['stalled_s']:.1f}",
            way["eager_calls"],
            "-" if way["error"] is None else f"`{way['error'].split(':')[0]}`",
        ]
        for name, way in case["ways"].items()
    ]
    return markdown(
        ["way", "layouts", "lengths", "compiled", "stalls", "stalled, s", "calls in dense eager", "ended by"], rows
    )


def memory_peaks(result: Result) -> str:
    """Measured peaks, and the estimate."""
    rows = []
    for case in result["cases"]:
        if case["group"] is None:
            continue
        peaks, estimate = case["peak_mib"], case["estimate_mib"]["flexpg"]
        measured = [f"{peaks[way]:,.0f}" if way in peaks else "-" for way in (*PEERS, "flexpg")]
        share = f"{estimate / peaks['flexpg']:.2f}" if "flexpg" in peaks else "-"
        tokens = f"{case['prompt']:,} + {case['group']} x {case['completion']:,}{variant(case)}"
        rows.append([tokens, *measured, f"{estimate:,.0f}", share])
    return markdown(["tokens", *PEERS.values(), "flexpg", "flexpg, estimated", "estimate / measured"], rows)


def memory_groups(result: Result) -> str:
    """The largest group under a budget."""
    rows = []
    for case in result["cases"]:
        if case["budget_mib"] is not None:
            found = [case[key][way] for key in ("largest_group", "largest_group_by_estimate") for way in ESTIMATED]
            tokens = f"{case['prompt']:,} + G x {case['completion']:,}{variant(case)}"
            rows.append([tokens, f"{case['budget_mib']:,}", *found])
    return markdown(["tokens", "budget, MiB", "largest G, unshared", "flexpg", "estimated, unshared", "flexpg"], rows)


def scaling_growth(result: Result) -> str:
    """Milliseconds of one more completion, and of one more token of the prompt."""
    rows = []
    for case in result["cases"]:
        if case["kind"] not in ("completions", "prompt_tokens"):
            continue
        grows = case["group"] if case["kind"] == "completions" else case["prompt"]
        what = "completion" if case["kind"] == "completions" else "prompt token"
        at = f"P = {case['prompt'][0]:,}" if case["kind"] == "completions" else f"G = {case['group'][0]}"
        for way, slope in case["slope_ms"].items():
            rows.append(
                [
                    what,
                    f"{at}, R = {case['completion']}; {grows[0]:,} to {max(map(int, case['update_ms'][way])):,}",
                    way,
                    spread(slope),
                    case["slope_tokens"][way],
                ]
            )
    return markdown(["one more", "measured at", "way", "ms", "tokens that it adds"], rows)


def scaling_parallel(result: Result) -> str:
    """One and two threads, or processes."""
    rows = []
    for case in result["cases"]:
        if case["kind"] in ("threads", "ranks"):
            times = case["update_ms"] if case["kind"] == "threads" else case["step_ms"]
            groups = f"{case['num_groups']} x " if case["num_groups"] else ""
            size = f"{case['completion']}" if case["even"] else f"up to {case['completion']}"
            rows.append(
                [case["kind"], f"{groups}({case['prompt'][0]:,} + {case['group'][0]} x {size})"]
                + [spread(times[count], 0) for count in ("1", "2")]
                + [spread(case["speedup"])]
            )
    return markdown(["", "tokens", "one, ms", "two, ms", "one / two"], rows)


def kernels(result: Result) -> str:
    """Every trial's outcome."""
    rows = [
        [
            f"{case['kind']}, {case['heads']}/{case['kv_heads']}, {case['head_dim']}",
            name,
            trial.get("outcome", "-"),
            spread(trial.get("forward_times_per_pair")),
            spread(trial.get("backward_times_per_pair")),
        ]
        for case in result["cases"]
        for name, trial in case["trials"].items()
    ]
    return markdown(["row; heads, their size", "trial", "outcome", "forward / default", "backward / default"], rows)


def sharing(result: Result) -> str:
    """The demo with and without sharing."""
    return markdown(
        ["", "every prompt once per completion", "shared"],
        [
            ["tokens encoded per step", f"{result['token_ratio']:.1f} x", "1"],
            ["seconds of training per step, median"]
            + [f"{result[f'train_s_{way}']:.2f}" for way in ("unshared", "shared")],
            [
                "largest difference of the loss over the steps, relative to it or to 0.01 where it is smaller",
                "",
                f"{result['largest_loss_difference']:.0e}",
            ],
            ["relative difference of all parameters after them", "", f"{result['parameter_difference']:.0e}"],
        ],
    )


def trl_update(result: Result) -> str:
    """TRL's trainer and ours."""
    rows = []
    for case in (result["even"], result["uneven"]):
        first, second, *_, last = case["completion_tokens"]
        of = (
            f"{len(case['completion_tokens'])} of {last} tokens"
            if first == last
            else f"{first}, {second}, ... {last} tokens"
        )
        rows.append(
            [
                of,
                f"{case['token_ratio']:.1f}",
                f"{case['attention_pair_ratio']:.1f}",
                f"{case['update_s_trl']:.2f}",
                f"{case['update_s_shared']:.2f}",
                f"**{case['speedup']:.1f} x**",
            ]
        )
    header = ["completions", "tokens, TRL / shared", "attention pairs, TRL / shared"]
    return markdown([*header, "seconds, TRL", "seconds, shared", "faster"], rows)


def paper_figure(result: Result) -> str:
    """Published, counted, measured."""
    keys = ("tokens", "published", "counted_4096", "counted_8192", "counted_16384", "measured_flops")
    rows = [
        [
            cell["group"],
            f"{cell['ratio']:g}",
            *(f"{cell[key]:.2f}" for key in keys),
            f"**{cell['measured_seconds']:.2f}**",
        ]
        for cell in result["cells"]
    ]
    header = ["G", "P/R", "tokens", "published, P = 4,096", "cost model, P = 4,096", "8,192", "16,384"]
    return markdown([*header, "FLOPs run, P = 512", "seconds, P = 512"], rows)


CONVERSATIONS = {"whole": "one per conversation", "per_turn": "one per assistant turn"}


def conversations_tokens(result: Result) -> str:
    """Sequences and tokens, before and after."""
    rows = []
    for name, title in CONVERSATIONS.items():
        case = result[name]
        counts = (case["sequences"], case["tokens"], case["tree_per_task"]["tokens"], case["one_tree"]["tokens"])
        rows.append([title, *(f"{count:,}" for count in counts)])
    return markdown(["rollouts", "sequences", "tokens, each on its own", "a tree per task", "one tree"], rows)


def conversations_ratios(result: Result) -> str:
    """Times fewer."""
    trees = {"a tree per task": "tree_per_task", "one tree": "one_tree"}
    ratios = {"tokens": "token_ratio", "attention pairs": "attention_pair_ratio"}
    columns = [(what, key, tree) for what, key in ratios.items() for tree in trees]
    rows = [
        [title, *(f"{result[name][trees[tree]][key]:.2f}" for _, key, tree in columns)]
        for name, title in CONVERSATIONS.items()
    ]
    return markdown(["rollouts", *(f"{what}, {tree}" for what, _, tree in columns)], rows)


def conversations_updates(result: Result) -> str:
    """An update shared and unshared."""
    rows = []
    for name, title in CONVERSATIONS.items():
        single, double = result[f"update_{name}"], result[f"update_{name}_float64"]
        sizes = [f"{single[key]:,}" for key in ("sequences", "tokens", "packed_tokens")]
        seconds = [f"{single[f'update_cpu_s_{way}']:.1f}" for way in ("unshared", "shared")]
        keys = ("logprob_difference", "gradient_difference")
        apart = [f"{case[key]:.0e}" for case in (single, double) for key in keys]
        rows.append([title, *sizes, *seconds, f"**{single['speedup']:.2f} x**", *apart])
    header = ["rollouts", "sequences", "tokens", "packed", "seconds, unshared", "shared", "faster"]
    header += ["log-probabilities, float32", "gradients", "log-probabilities, float64", "gradients"]
    return markdown(header, rows)


BOTH: dict[str, Callable[[Result], str]] = {
    "update": update,
    "update.nothing_shared": nothing_shared,
    "attention": attention,
    "mask": mask,
    "shapes": shapes,
    "memory.peaks": memory_peaks,
    "memory.groups": memory_groups,
    "scaling.growth": scaling_growth,
    "scaling.parallel": scaling_parallel,
}
TABLES: dict[str, Callable[[Result], str]] = {
    "sharing_cpu": sharing,
    "trl_update_cpu": trl_update,
    "paper_figure_cpu": paper_figure,
    "conversations_cpu.tokens": conversations_tokens,
    "conversations_cpu.ratios": conversations_ratios,
    "conversations_cpu.updates": conversations_updates,
    "update_cpu.short": update_short,
    "pieces_cpu": pieces,
    "kernels_cuda": kernels,
    **{
        f"{benchmark}_{device}{dot}{part}": make
        for name, make in BOTH.items()
        for benchmark, dot, part in [name.partition(".")]
        for device in ("cpu", "cuda")
    },
}


def result_of(name: str) -> Result | None:
    """The committed numbers that a table shows, None where there are none yet."""
    path = RESULTS / f"{name.partition('.')[0]}.json"
    return json.loads(path.read_text()) if path.exists() else None


def page(text: str) -> str:
    """The same page with its tables made anew."""

    def place(found: re.Match[str]) -> str:
        result = result_of(found[2])
        if result is None:
            return f"{found[1]}*Not measured yet.*\n{found[3]}"
        return f"{found[1]}{TABLES[found[2]](result)}{found[3]}"

    return PLACE.sub(place, text)


def draw(result: Result) -> None:
    """How many times as fast flexpg's update is: a panel per case, a bar per way, whiskers at the quartiles."""
    import matplotlib.pyplot as plt

    cases = sorted(result["cases"], key=lambda case: len(set(case["completions"])) > 1)
    figure, axes = plt.subplots(2, len(cases) // 2, figsize=(13, 6.4), layout="constrained", sharey=True)
    for axis, case in zip(axes.flat, cases, strict=True):
        for n, way in enumerate(PEERS):
            if (gain := case["speedup_over"].get(way)) is None:
                continue
            whiskers = [[gain["median"] - gain["low_quartile"]], [gain["high_quartile"] - gain["median"]]]
            axis.barh(n, gain["median"], xerr=whiskers, color=f"C{n}")
            axis.text(gain["high_quartile"], n, f"  {gain['median']:.1f} x", va="center", fontsize=8)
        axis.axvline(case["bound"], color="black", linestyle=":", linewidth=1)
        axis.axvline(1, color="gray", linewidth=0.8)
        axis.set_title(lengths(case), fontsize=10)
        axis.set_yticks(range(len(PEERS)), [f"than {name}" for name in PEERS.values()])
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "flexpg's update is so many times as fast (dotted: the cost model's bound, over unshared without padding)"
    )
    figure.savefig(PICTURE, dpi=110, metadata={"Description": digest(result)})


def digest(result: Result) -> str:
    """Of the results that a picture was drawn from; it is written into it."""
    return hashlib.sha256(json.dumps(result).encode()).hexdigest()


def main() -> None:
    """Writes pages and picture."""
    for path in PAGES:
        path.write_text(page(path.read_text()))
    if (result := result_of("update_cpu")) is not None:
        draw(result)


if __name__ == "__main__":
    main()
