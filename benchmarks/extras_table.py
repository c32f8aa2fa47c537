"""bench_extras' table in markdown, and what it says in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TITLES = {
    "cmlm": "CMLM, where ENGINE starts",
    "left_to_right": "teacher, left to right, greedy",
    "right_to_left": "teacher, right to left, greedy",
    "plain": "ENGINE",
    "ensemble": "+ right-to-left teacher",
    "o1_temperature": "+ O1 temperature 1 to 0.1",
    "predicted_lengths": "+ predicted lengths",
    "repetition": "+ repetition term",
    "plain_other_seed": "ENGINE, another seed",
}
_COLUMNS = (
    "system", "BLEU", "+-", "p", "reranked", "oracle", "energy", "reranked", "R2L energy", "repeated", "reranked",
    "gap", "own gap", "dev BLEU",
)  # fmt: skip
_SIGNIFICANT = 0.05


def markdown(results: Mapping[str, Any]) -> str:
    """The whole file."""
    lines = [
        f"# Beyond the paper: {results['corpus']}, {results['split']} set",
        "",
        f"One pass, {results['length_beam']} length candidates chosen by the student, or (reranked) by the energy of "
        f"the left-to-right teacher; oracle: the reference's length. {results['updates']} updates of each ENGINE, that "
        "of lowest dev energy kept. One seed: a difference from ENGINE that another seed makes too means nothing. +-: "
        "half of the 95% bootstrap interval; p: paired bootstrap against ENGINE, over sentences, not seeds. Energies: "
        "nats a sentence, left-to-right teacher but for R2L. gap: discrete minus relaxed energy with the reference's "
        "lengths, O1's temperature 1; own gap: at that of the kept update.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "|---" + "|---:" * (len(_COLUMNS) - 1) + "|",
    ]
    for name, each in {**results["before"], **results["variants"]}.items():
        lines.append("| " + " | ".join([_title(name, results), *_cells(each)]) + " |")
    lines += ["", *(f"- {sentence}" for sentence in _sentences(results)), "", f"BLEU: {results['signature']}", ""]
    return "\n".join(lines)


def _title(name: str, results: Mapping[str, Any]) -> str:
    return TITLES.get(name) or " ".join(TITLES[each] for each in results["combined"])


def _cells(each: Mapping[str, Any]) -> list[str]:
    own = each.get("own") or each["greedy"]
    rerank, oracle = each.get("rerank", {}), each.get("oracle", {})
    return [
        _form(own["bleu"], ".2f"), _form(own.get("bleu_interval"), ".2f"), _form(own.get("p_value"), ".3f"),
        _form(rerank.get("bleu"), ".2f"), _form(oracle.get("bleu"), ".2f"),
        _form(own["energy"], ".2f"), _form(rerank.get("energy"), ".2f"), _form(own["energy_right_to_left"], ".2f"),
        _form(own["repetition"], ".2%"), _form(rerank.get("repetition"), ".2%"),
        _form(each.get("gap"), ".2f"), _form(each.get("own_gap"), ".2f"),
        _form(each.get("dev", {}).get("bleu"), ".2f"),
    ]  # fmt: skip


def _form(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _sentences(results: Mapping[str, Any]) -> list[str]:
    """What each extra changed, with its p value; nothing is called a gain that chance could have made."""
    variants = results["variants"]
    plain = variants["plain"]
    better = [TITLES[name].removeprefix("+ ") for name in results["helped_on_dev"]]
    found = [f"Higher dev BLEU than ENGINE ({plain['dev']['bleu']:.2f}, one length): {', '.join(better) or 'none'}."]
    if results["combined"] != results["helped_on_dev"]:
        found.append("What was combined was named by hand (--together), not chosen by the dev set: take it as a hint.")
    for name, each in variants.items():
        if name == "plain":
            continue
        own, p = each["own"], each["own"]["p_value"]
        verdict = "not significant" if p >= _SIGNIFICANT else "significant"
        found.append(
            f"{_title(name, results).removeprefix('+ ')}: {own['bleu'] - plain['own']['bleu']:+.2f} BLEU "
            f"(p = {p:.3f}, {verdict}), {each['rerank']['bleu'] - plain['rerank']['bleu']:+.2f} reranked; energy "
            f"{own['energy'] - plain['own']['energy']:+.2f} nats; repeated {own['repetition']:.2%} against "
            f"{plain['own']['repetition']:.2%}; own gap {each['own_gap']:.2f} against {plain['own_gap']:.2f}."
        )
    gains = [each["rerank"]["bleu"] - each["own"]["bleu"] for each in variants.values()]
    drops = [each["rerank"]["energy"] - each["own"]["energy"] for each in variants.values()]
    found.append(
        f"Teacher reranking of length candidates: {min(gains):+.2f} to {max(gains):+.2f} BLEU and {min(drops):+.2f} to "
        f"{max(drops):+.2f} nats against each system's own choice."
    )
    return found
