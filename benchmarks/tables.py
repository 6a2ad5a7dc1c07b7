"""Tables of README and docs, made from benchmarks/results.

    python -m benchmarks.tables                  # rewrite them; a test checks that nothing would change
    python -m benchmarks.tables update_cuda      # print one

A page holds each table between `<!-- table: NAME -->` and `<!-- end -->`. NAME is that of a result, followed by a dot
and the name of the table if the benchmark has several.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import modelled
from benchmarks.record import RESULTS

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = dict[str, Any]
COMPARED = {  # what benchmarks.update compares flexpg with
    "baseline": "baseline",
    "baseline_unpadded": "baseline, no padding",
    "torchtune": "torchtune's GRPO",
    "prefix_grouper": "PrefixGrouper",
    "prefix_grouper_tuned": "PrefixGrouper, tuned",
}
PEERS = {  # what benchmarks.peers compares flexpg with
    "baseline": "baseline",
    "prefix_grouper": "PrefixGrouper",
    "prefix_grouper_tuned": "PrefixGrouper, tuned",
    "trl_tree": "TRL's prefix tree",
}
ESTIMATED = ("baseline", "flexpg")  # what the cost model knows


def load_result(name: str) -> Result:
    """Return the committed result that a table is made from."""
    return json.loads(result_path(name).read_text())


def result_path(name: str) -> Path:
    """Return the file of a table's result."""
    return RESULTS / f"{name.partition('.')[0]}.json"


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def spread(numbers: dict[str, float] | None, digits: int = 2) -> str:
    """Return a median with its quartiles; a dash if nothing was measured."""
    if numbers is None:
        return "-"
    low, middle, high = (f"{numbers[key]:,.{digits}f}" for key in ("low_quartile", "median", "high_quartile"))
    return f"**{middle}** ({low} to {high})"


def lengths(case: Result) -> str:
    """Return the tokens of prompt and completions, with model and checkpointing if they differ from the others."""
    lens = case["completions"]
    span = f"{lens[0]}" if len(set(lens)) == 1 else f"{min(lens)} to {max(lens)}"
    return f"{case['prompt']:,} + {len(lens)} x {span}{variant(case)}"


def variant(case: Result) -> str:
    """Return the model, if it is not the small one, and activation checkpointing."""
    model = "" if case["model"] == "small" else f", {case['model']}"
    return model + (", checkpointing" if case["checkpointing"] else "")


def headline() -> str:
    """Return the table of README, from several results."""
    names = ("conversations", "trl_update", "vision", "update", "sharing", "step")
    results = {name: load_result(f"{name}_cpu") for name in names}
    conversations, trl, vision, updates, demo, steps = results.values()
    (picture,) = vision["cases"]
    prompt = picture["image"] + picture["question"] + 2
    alone, together = (prompt * n + picture["completion"] * picture["group"] for n in (picture["group"], 1))
    tokens, timed = conversations["per_turn"]["one_tree"], conversations["update_per_turn"]
    torchtune = next(c for c in updates["cases"] if (c["prompt"], c["completions"]) == (2048, [128] * 8))
    rows = [
        [
            "Agent: recorded tau-bench conversations of one task, one rollout per turn (all "
            f"{conversations['conversations']} conversations: {tokens['token_ratio']:.1f}x fewer tokens)",
            "Qwen2, 2 layers, width 128",
            f"{timed['tokens'] / timed['packed_tokens']:.1f}x",
            f"{timed['speedup']:.1f}x",
        ],
        *(
            [
                f"TRL's GRPOTrainer: prompt of {case['prompt_tokens']:,} tokens, {completions}",
                "Qwen2, 6 layers, width 512",
                f"{case['token_ratio']:.1f}x",
                f"{case['speedup']:.1f}x",
            ]
            for case, completions in (
                (trl["even"], "8 completions of 128"),
                (trl["uneven"], "8 completions of 16 to 128"),
            )
        ),
        [
            f"TRL's GRPOTrainer: image of {picture['image']:,} tokens in the prompt, {picture['group']} completions of "
            f"{picture['completion']}",
            f"Qwen2.5-VL, {picture['layers']} layers, width {picture['width']}",
            f"{alone / together:.1f}x, images {picture['images'][0] / picture['images'][1]:.1f}x",
            f"{picture['speedup']['median']:.1f}x",
        ],
        [
            "torchtune: prompt of 2,048 tokens, 8 completions of 128",
            "Qwen2, 2 layers, width 512",
            f"{torchtune['tokens_baseline'] / torchtune['tokens_shared']:.1f}x",
            f"{torchtune['speedup_over']['baseline']['median']:.1f}x",
        ],
        [
            "`make demo`: 8 prompts of about 300 tokens, 16 completions of about 27",
            "Qwen2, 4 layers, width 128",
            f"{demo['token_ratio']:.1f}x",
            f"{demo['train_speedup']:.1f}x",
        ],
        *(
            [
                f"a whole step of the recipe, sampling included: {case['prompts']} prompts of about "
                f"{case['prompt_tokens']:,.0f} tokens, {case['group']} completions of up to {case['completion']}, "
                f"{case['minibatches']} optimizer step{'s' * (case['minibatches'] > 1)}",
                "Qwen2, 4 layers, width 128",
                f"{case['token_ratio']:.1f}x",
                f"{case['speedup']['median']:.1f}x",
            ]
            for case in steps["cases"]
        ),
    ]
    header = ["workload", "model", "fewer tokens encoded", "faster update or step"]
    return markdown(header, rows)


def bounds() -> str:
    """Return measured speed-ups of updates next to the cost model's bound, from several results."""
    updates, recurrent, images = (load_result(f"{name}_cpu") for name in ("update", "hybrid", "vision"))
    found = [
        (updates, f"torchtune's Qwen2, 2 layers, width 512: {lengths(case)}", case["bound"], gain)
        for case in updates["cases"]
        if (gain := gain_without_padding(case)) is not None
    ]
    found += [
        (
            recurrent,
            f"Qwen3.5, 4 layers, width 256: {case['prompt']:,} + {case['group']} x {case['completion']}",
            case["bound"],
            case["speedup_over"]["baseline"],
        )
        for case in recurrent["cases"]
    ]
    found += [
        (
            images,
            f"Qwen2.5-VL, {case['layers']} layers, width {case['width']}: image of {case['image']:,} + "
            f"{case['group']} x {case['completion']}",
            case["bound"],
            case["speedup"],
        )
        for case in images["cases"]
    ]
    rows = [
        [name, machine(result), f"{bound:.2f}", spread(gain), f"{gain['median'] / bound:.2f}"]
        for result, name, bound, gain in found
    ]
    return markdown(["update of one group", "machine", "bound", "measured", "measured / bound"], rows)


def machine(result: Result) -> str:
    """Return the machine of a result, and its threads."""
    name, _, threads = result["machine"].replace("(R)", "").rpartition(", ")
    return f"{name}, {threads}" if threads != "1 threads" else f"{name}, 1 thread"


def gain_without_padding(case: Result) -> dict[str, float] | None:
    """Return the speed-up over the baseline without padding, or None where it was not measured."""
    has_padding = len(set(case["completions"])) > 1
    return case["speedup_over"].get("baseline_unpadded" if has_padding else "baseline")


def bound_reached(case: Result) -> str:
    """Return the fraction of the cost model's ratio that is reached, over the baseline without padding."""
    gain = gain_without_padding(case)
    return "-" if gain is None else f"{gain['median'] / case['bound']:.2f}"


def update(result: Result) -> str:
    """Return flexpg's speed-up over each implementation, and the bound."""
    rows = []
    for case in result["cases"]:
        ours = case["update_ms"].get("flexpg")
        seconds = "-" if ours is None else f"{ours['median'] / 1e3:,.2f}"
        gains = [spread(case["speedup_over"].get(name)) for name in COMPARED]
        rows.append([lengths(case), seconds, f"{case['bound']:.2f}", bound_reached(case), *gains])
    return markdown(["tokens", "flexpg, s", "bound", "reached", *COMPARED.values()], rows)


def peers(result: Result) -> str:
    """Return flexpg's speed-up over implementations that share prefixes."""
    rows = []
    for case in result["cases"]:
        gains = [spread(case["speedup_over"].get(name)) for name in PEERS]
        rows.append([lengths(case), f"{case['update_ms']['flexpg']['median'] / 1e3:,.2f}", *gains])
    return markdown(["tokens", "flexpg, s", *PEERS.values()], rows)


def update_not_shared(result: Result) -> str:
    """Return the time of flexpg on sequences that share nothing, relative to the baseline."""
    even = [case for case in result["cases"] if len(set(case["completions"])) == 1 and case["unpadded_over_baseline"]]
    return markdown(
        ["tokens", "time, flexpg with nothing shared / baseline"],
        ([lengths(case), spread(case["unpadded_over_baseline"])] for case in even),
    )


def split_parts(result: Result) -> str:
    """Return the rates of the parts of split attention, and the gain of alternatives."""
    alternatives, rates = list(result["cases"][0]["gain"]), ["matmul", "prompt", "rectangle", "completions"]
    header = ["tokens; heads, head size", *(f"{name}, GFLOP/s" for name in rates)]
    header += [name.replace("_", " ") for name in alternatives]
    rows = [
        [f"{c['prompt']:,} + {c['group']} x {c['completion']}; {c['heads']}, {c['head_dim']}"]
        + [f"{c['gflop_s'][name]['median']:.0f}" for name in rates]
        + [spread(c["gain"][name]) for name in alternatives]
        for c in result["cases"]
    ]
    return markdown(header, rows)


def attention(result: Result) -> str:
    """Return every implementation's time per visible pair relative to flexpg's, with the backward if it has one."""
    rows = []
    for case in result["cases"]:
        tokens = f"{case['kind']}: {case['groups']} x ({case['prompt']:,} + {len(case['completions'])})"
        tokens += f" after {case['system']:,}" if case["system"] else ""
        shape = f"{case['heads']}/{case['kv_heads']}, {case['head_dim']}"
        for name, entry in case["implementations"].items():
            which = "both" if "both_ms" in entry else "forward"
            rate = f"{1e3 * entry[f'{which}_tflop_per_s']['median']:,.0f}"
            per_pair = spread(entry.get(f"{which}_times_per_pair"))
            rows.append([tokens, shape, name, which, f"{entry[f'{which}_ms']['median']:,.2f}", rate, per_pair])
    header = ["packed sequence", "heads, head size", "implementation", "pass", "ms", "GFLOP/s of visible pairs"]
    return markdown([*header, "time per pair / flexpg's"], rows)


def kernels(result: Result) -> str:
    """Return every trial's outcome."""
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
    header = ["packed sequence; heads, head size", "trial", "outcome", "forward / default", "backward / default"]
    return markdown(header, rows)


def mask(result: Result) -> str:
    """Return build times."""
    rows = []
    for case in result["cases"]:
        times = [spread(case["tree_ms"]), spread(case["flexpg_ms"])]
        times += [spread(case[f"{name}_ms"], 1) for name in ("eager", "compiled")]
        ratios = [case[f"{name}_over_flexpg"] for name in ("eager", "compiled")]
        rows.append(
            [f"{case['tokens']:,}", *times, *("-" if ratio is None else f"{ratio['median']:,.0f}x" for ratio in ratios)]
        )
    header = ["tokens", "tree, ms", "`block_mask`, ms", "`create_block_mask`, ms", "compiled, ms"]
    return markdown([*header, "eager / flexpg", "compiled / flexpg"], rows)


def shapes(result: Result) -> str:
    """Return compilations and stalls of each implementation."""
    (case,) = result["cases"]
    names = {"flexpg": "flexpg", "default": "`torch.compile(flex)`", "static": "the same, `dynamic=False`"}
    rows = []
    for name, entry in case["implementations"].items():
        counts = [entry[key] for key in ("layouts", "distinct_lengths", "compiles", "stalls")]
        error = "-" if entry["error"] is None else f"`{entry['error'].partition(':')[0]}`"
        rows.append([names[name], *counts, f"{entry['stalled_s']:.1f}", entry["eager_calls"], error])
    header = ["implementation", "layouts", "lengths", "compilations", "stalls", "stalled, s"]
    return markdown([*header, "calls in dense eager", "ended by"], rows)


def memory_peaks(result: Result) -> str:
    """Return measured peaks, and the estimate."""
    rows = []
    for case in result["cases"]:
        if case["group"] is None:
            continue
        peaks, estimate = case["peak_mib"], case["estimate_mib"]["flexpg"]
        measured = [f"{peaks[name]:,.0f}" if name in peaks else "-" for name in (*COMPARED, "flexpg")]
        ratio = f"{estimate / peaks['flexpg']:.2f}" if "flexpg" in peaks else "-"
        tokens = f"{case['prompt']:,} + {case['group']} x {case['completion']:,}{variant(case)}"
        rows.append([tokens, *measured, f"{estimate:,.0f}", ratio])
    return markdown(["tokens", *COMPARED.values(), "flexpg", "flexpg, estimated", "estimated / measured"], rows)


def memory_groups(result: Result) -> str:
    """Return the largest groups within a budget."""
    rows = []
    for case in result["cases"]:
        if case["budget_mib"] is not None:
            found = [case[key][name] for key in ("largest_group", "largest_group_by_estimate") for name in ESTIMATED]
            tokens = f"{case['prompt']:,} + G x {case['completion']:,}{variant(case)}"
            rows.append([tokens, f"{case['budget_mib']:,}", *found])
    header = ["tokens", "budget, MiB", "largest G, baseline", "flexpg", "estimated, baseline", "estimated, flexpg"]
    return markdown(header, rows)


def scaling_growth(result: Result) -> str:
    """Return the milliseconds of one more completion and of one more prompt token."""
    rows = []
    for case in result["cases"]:
        if case["kind"] not in ("completions", "prompt_tokens"):
            continue
        by_group = case["kind"] == "completions"
        first = (case["group"] if by_group else case["prompt"])[0]
        fixed = f"P = {case['prompt'][0]:,}" if by_group else f"G = {case['group'][0]}"
        for name, slope in case["slope_ms"].items():
            measured = f"{fixed}, R = {case['completion']}; {first:,} to {max(map(int, case['update_ms'][name])):,}"
            what = "completion" if by_group else "prompt token"
            rows.append([what, measured, name, spread(slope), case["slope_tokens"][name]])
    return markdown(["one more", "measured with", "implementation", "ms", "tokens that it adds"], rows)


def scaling_parallel(result: Result) -> str:
    """Return the times of one and two threads or ranks."""
    rows = []
    for case in result["cases"]:
        if case["kind"] in ("threads", "ranks"):
            times = case["update_ms"] if case["kind"] == "threads" else case["step_ms"]
            groups = f"{case['num_groups']} x " if case["num_groups"] else ""
            size = f"{case['completion']}" if case["even"] else f"up to {case['completion']}"
            tokens = f"{groups}({case['prompt'][0]:,} + {case['group'][0]} x {size})"
            two = times.get("2")
            rows.append([case["kind"], tokens, spread(times["1"], 0), spread(two, 0), spread(case["speedup"])])
    return markdown(["", "tokens", "one, ms", "two, ms", "one / two"], rows)


def context_parallel(result: Result) -> str:
    """Return time, memory and communication of one packed sequence by number of ranks."""
    rows = []
    for case in result["cases"]:
        for ranks, peak in case["peak_mib"].items():
            tokens = f"{case['prompt']:,} + {case['group']} x {case['completion']}"
            time, gain = case["update_ms"].get(ranks), case["speedup"].get(ranks)
            sizes = [f"{mib[ranks]:,.0f}" for mib in (case["limit_mib"], case["estimate_mib"], case["collective_mib"])]
            rows.append([tokens, ranks, spread(time, 0), spread(gain), f"{peak:,.0f}", *sizes])
    header = ["tokens", "ranks", "update, ms", "time of one rank / this", "peak per rank, MiB"]
    return markdown([*header, "limit", "estimated", "gathered and summed, MiB"], rows)


def sharing(result: Result) -> str:
    """Return the demo with and without sharing."""
    prompts_once = result["token_ratio"] / result["token_ratio_prompts_once"]
    seconds = {name: f"{result[f'train_s_{name}']:.2f}" for name in ("baseline", "shared")}
    rows = [
        ["tokens encoded, relative", f"{result['token_ratio']:.1f}", f"{prompts_once:.1f}", "1"],
        ["seconds of an update, median", seconds["baseline"], "", seconds["shared"]],
        ["largest relative difference of the loss", "", "", f"{result['largest_loss_difference']:.0e}"],
        ["relative difference of all parameters at the end", "", "", f"{result['parameter_difference']:.0e}"],
    ]
    return markdown(["", "baseline", "prompts encoded once", "shared"], rows)


SAMPLERS = {
    "flexpg": "`flexpg.sample`",
    "transformers": "`generate`",
    "transformers_once": "`generate`, prompts encoded once",
    "vllm": "vLLM",
}


def sampling(result: Result) -> str:
    """Return the tokens per second of all samplers that were measured, flexpg's speed-up, and the bytes of caches."""
    rows = []
    for case in result["cases"]:
        tokens = f"{case['prompts']} x ({case['prompt']:,} + {case['group']} x {case['completion']})"
        for name, rate in case["tokens_per_s"].items():
            stored, gain = case["cache_bytes"][name], spread(case["speedup_over"].get(name))
            mib = "-" if stored is None else f"{stored / 2**20:,.1f}"
            rows.append([tokens, SAMPLERS[name], spread(rate, 0), gain, mib])
    if all("vllm" not in case["tokens_per_s"] for case in result["cases"]):
        rows.append(["", SAMPLERS["vllm"], "not in this run", "-", "-"])
    return markdown(["tokens", "sampler", "tokens per second", "time / flexpg's", "cache, MiB"], rows)


def step(result: Result) -> str:
    """Return the stages of a step of the recipe with and without sharing."""
    rows = []
    for case in result["cases"]:
        tokens = f"{case['prompts']} x ({case['prompt_tokens']:,.0f} + {case['group']} x {case['completion']})"
        for name, stages in case["stage_s"].items():
            seconds = [f"{value:.2f}" for value in stages.values()]
            gain = spread(case["speedup"]) if name == "shared" else ""
            rows.append([tokens, case["minibatches"], name, *seconds, f"{case['step_s'][name]['median']:.2f}", gain])
    header = ["tokens", "optimizer steps", "", "sampling, s", "log-probabilities, s", "update, s", "whole step, s"]
    return markdown([*header, "speed-up of the step"], rows)


def async_steps(result: Result) -> str:
    """Return the stages of a step of the recipe that samples ahead, and of one that does not."""
    rows = []
    for case in result["cases"]:
        tokens = f"{case['prompts']} x ({case['prompt_tokens']:,.0f} + {case['group']} x {case['completion']})"
        for name, stages in case["stage_s"].items():
            seconds = [f"{stages[stage]:.2f}" for stage in ("sample_s", "logprobs_s", "train_s", "sync_s")]
            gain = [spread(case["speedup"]), f"{case['bound']:.2f}"] if name == "1" else ["", ""]
            rows.append([tokens, name, *seconds, spread(case["step_s"][name]), *gain])
    header = ["tokens", "`async_steps`", "waiting for samples, s", "log-probabilities, s", "update, s"]
    return markdown([*header, "new weights, s", "whole step, s", "speed-up", "bound"], rows)


def hybrid(result: Result) -> str:
    """Return the updates of a model with recurrent layers."""
    header = ["prompt", "completions", "seconds, baseline", "PrefixGrouper", "flexpg", "speed-up", "bound"]
    header += ["speed-up / bound", "largest difference of a log-probability", "of PrefixGrouper's"]
    rows = []
    for case in result["cases"]:
        seconds = [f"{entry['median'] / 1e3:.2f}" for entry in case["update_ms"].values()]
        row = [case["prompt"], f"{case['group']} of {case['completion']}", *seconds]
        speedup, bound = case["speedup_over"]["baseline"], case["bound"]
        differences = [f"{value:.0e}" for value in case["largest_difference"].values()]
        rows.append([*row, spread(speedup), f"{bound:.2f}", f"{speedup['median'] / bound:.2f}", *differences])
    return markdown(header, rows)


def vision(result: Result) -> str:
    """Return the updates of a model that takes images."""
    header = ["image tokens", "completions", "images encoded, TRL / flexpg", "vision encoder's share of TRL's FLOPs"]
    header += ["seconds, TRL", "seconds, flexpg", "speed-up", "bound", "difference of gradients"]
    rows = []
    for case in result["cases"]:
        row = [case["image"], f"{case['group']} of {case['completion']}", " / ".join(map(str, case["images"]))]
        row += [f"{case['vision_share']:.0%}", *(f"{entry['median'] / 1e3:.2f}" for entry in case["times_ms"].values())]
        rows.append([*row, spread(case["speedup"]), f"{case['bound']:.2f}", f"{case['gradient_difference']:.0e}"])
    return markdown(header, rows)


def registers(result: Result) -> str:
    """Return registers and spilled bytes of FlexAttention's kernels by compute capability."""
    found = {(kernel["variant"], kernel["capability"], kernel["direction"]): kernel for kernel in result["kernels"]}
    capabilities = list(dict.fromkeys(kernel["capability"] for kernel in result["kernels"]))
    header = ["kernels"]
    header += [f"{capability}, {direction}" for capability in capabilities for direction in ("forward", "backward")]
    rows = []
    for variant in dict.fromkeys(kernel["variant"] for kernel in result["kernels"]):
        kernels = [
            found[variant, capability, direction]
            for capability in capabilities
            for direction in ("forward", "backward")
        ]
        rows.append([variant, *(f"{kernel['registers']}, {kernel['spilled_bytes']:,}" for kernel in kernels)])
    return markdown(header, rows)


def trl_update(result: Result) -> str:
    """Return TRL's trainer and flexpg's."""
    rows = []
    for case in (result["even"], result["uneven"]):
        first, second, *_, last = case["completion_tokens"]
        even = f"{len(case['completion_tokens'])} of {last} tokens"
        ratios = [f"{case[key]:.1f}" for key in ("token_ratio", "pair_ratio")]
        seconds = [f"{case[f'update_s_{name}']:.2f}" for name in ("trl", "shared")]
        difference = f"{case['gradient_difference']:.0e}"
        completions = even if first == last else f"{first}, {second}, ... {last} tokens"
        rows.append([completions, *ratios, *seconds, f"**{case['speedup']:.1f}x**", difference])
    header = ["completions", "tokens, TRL / shared", "visible pairs, TRL / shared", "seconds, TRL", "seconds, shared"]
    return markdown([*header, "speed-up", "difference of gradients"], rows)


def paper_figure(result: Result) -> str:
    """Return published, counted and measured ratios."""
    keys = ("tokens", "published", "counted_4096", "counted_8192", "counted_16384", "measured_flops")
    rows = []
    for cell in result["cells"]:
        ratios = [f"{cell[key]:.2f}" for key in keys]
        rows.append([cell["group"], f"{cell['ratio']:g}", *ratios, f"**{cell['measured_seconds']:.2f}**"])
    header = ["G", "P/R", "tokens", "published, P = 4,096", "cost model, P = 4,096", "8,192", "16,384"]
    return markdown([*header, "FLOPs run, P = 512", "seconds, P = 512"], rows)


ROLLOUTS = {"whole": "one per conversation", "per_turn": "one per assistant turn"}
TREES = {"tree_per_task": "a tree per task", "one_tree": "one tree"}


def conversations_tokens(result: Result) -> str:
    """Return sequences and tokens of the baseline and of trees."""
    rows = []
    for name, title in ROLLOUTS.items():
        counts = [result[name]["sequences"], result[name]["tokens"], *(result[name][tree]["tokens"] for tree in TREES)]
        rows.append([title, *(f"{count:,}" for count in counts)])
    return markdown(["rollouts", "sequences", "tokens, baseline", *TREES.values()], rows)


def conversations_ratios(result: Result) -> str:
    """Return how many times fewer tokens and visible pairs trees have."""
    keys = {"tokens": "token_ratio", "visible pairs": "pair_ratio"}
    rows = [
        [title, *(f"{result[name][tree][key]:.2f}" for key in keys.values() for tree in TREES)]
        for name, title in ROLLOUTS.items()
    ]
    return markdown(["rollouts", *(f"{what}, {tree}" for what in keys for tree in TREES.values())], rows)


def conversations_updates(result: Result) -> str:
    """Return an update by the baseline and shared."""
    rows = []
    for name, title in ROLLOUTS.items():
        single, double = result[f"update_{name}"], result[f"update_{name}_float64"]
        sizes = [f"{single[key]:,}" for key in ("sequences", "tokens", "packed_tokens")]
        seconds = [f"{single[f'update_cpu_s_{name}']:.1f}" for name in ("baseline", "shared")]
        keys = ("logprob_difference", "gradient_difference")
        differences = [f"{case[key]:.0e}" for case in (single, double) for key in keys]
        rows.append([title, *sizes, *seconds, f"**{single['speedup']:.2f}x**", *differences])
    header = ["rollouts", "sequences", "tokens", "packed", "seconds, baseline", "shared", "speed-up"]
    header += ["log-probabilities, float32", "gradients", "log-probabilities, float64", "gradients"]
    return markdown(header, rows)


COMPUTED: dict[str, Callable[[], str]] = {
    "headline": headline,
    "bounds": bounds,
    "modelled_context_parallel": lambda: markdown(*modelled.context_parallel()),
    "modelled_savings": lambda: markdown(*modelled.savings()),
    "modelled_memory": lambda: markdown(*modelled.memory()),
}
TABLES: dict[str, Callable[[Result], str]] = {
    "context_parallel": context_parallel,
    "update": update,
    "peers": peers,
    "update.not_shared": update_not_shared,
    "attention": attention,
    "split_parts": split_parts,
    "kernels": kernels,
    "mask": mask,
    "shapes": shapes,
    "memory.peaks": memory_peaks,
    "memory.groups": memory_groups,
    "scaling.growth": scaling_growth,
    "scaling.parallel": scaling_parallel,
    "sharing": sharing,
    "sampling": sampling,
    "step": step,
    "async_steps": async_steps,
    "hybrid": hybrid,
    "vision": vision,
    "registers": registers,
    "trl_update": trl_update,
    "paper_figure": paper_figure,
    "conversations.tokens": conversations_tokens,
    "conversations.ratios": conversations_ratios,
    "conversations.updates": conversations_updates,
}


def table(name: str) -> str:
    """Return a table by name, such as "memory_cpu.peaks"; nothing if its result has not been recorded."""
    if name in COMPUTED:
        return COMPUTED[name]()
    if not result_path(name).exists():
        return ""
    made, result = TABLES[re.sub(r"_(cpu|cuda)\b", "", name)], load_result(name)
    return f"{made(result)}\n*{machine(result)}, torch {result['versions']['torch']}, commit {result['commit']}.*\n"


def rewritten(text: str) -> str:
    """Return a page with its tables made from the results."""
    return PLACE.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", text)


def main() -> None:
    """Rewrite all pages, or print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    args = parser.parse_args()
    for name in args.names:
        print(table(name))
    for path in () if args.names else PAGES:
        path.write_text(rewritten(path.read_text()))


if __name__ == "__main__":
    main()
