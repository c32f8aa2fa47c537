"""What the figures say, in sentences: the comparison ENGINE is about, and where low energy is not good translation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
SAME_BLEU = 0.05
"""BLEU differences up to this are called none."""
LOST_BLEU = 0.5
"""A fall of dev BLEU by more than this is worth a warning."""


def row_of(systems: Sequence[Row], system: str, iterations: int | None = None) -> Row | None:
    """The first row of that system and number of passes; a student's own length beam comes first."""
    for row in systems:
        if row["system"] == system and row["iterations"] == iterations:
            return row
    return None


def fewest_passes(systems: Sequence[Row]) -> int | None:
    """The smallest number of mask-predict passes measured for the ENGINE student."""
    return min((row["iterations"] for row in systems if row["system"] == "engine"), default=None)


def summary(results: dict[str, Any]) -> list[str]:
    """The headline: student against baseline with the fewest passes, then student against teacher."""
    systems, lines = results["systems"], []
    passes = fewest_passes(systems)
    cmlm, engine = row_of(systems, "cmlm", passes), row_of(systems, "engine", passes)
    if cmlm and engine:
        p_value = engine.get("p_value")
        sure = "" if p_value is None else f", p = {p_value:.3f}"
        lines.append(
            f"With {_passes(passes)}, ENGINE reaches {engine['bleu']:.2f} BLEU and the CMLM baseline "
            f"{cmlm['bleu']:.2f} ({engine['bleu'] - cmlm['bleu']:+.2f}{sure}). "
            f"Repeated tokens: CMLM {cmlm['repetition']:.2%}, ENGINE {engine['repetition']:.2%}. "
            f"Energy: CMLM {cmlm['energy']:.1f}, ENGINE {engine['energy']:.1f}, "
            f"references {results['references']['energy']:.1f} nats a sentence."
        )
        if "valid" in engine:
            lines.append(f"Valid translations: CMLM {cmlm['valid']:.1%}, ENGINE {engine['valid']:.1%}.")
    greedy, beam = row_of(systems, "teacher-greedy"), row_of(systems, "teacher-beam")
    if engine and greedy and beam:
        to_greedy, to_beam = (engine["sentences_per_second"] / row["sentences_per_second"] for row in (greedy, beam))
        lines.append(
            f"The teacher has {greedy['bleu']:.2f} BLEU greedily and {beam['bleu']:.2f} with beam {beam['beam']}. "
            f"In large batches ENGINE translates {to_greedy:.1f} times as many sentences a second as the greedy "
            f"teacher and {to_beam:.1f} times as many as the beam."
        )
    return lines


def warnings(results: dict[str, Any], engine_metrics: Sequence[dict[str, Any]]) -> list[str]:
    """Where energy and translation quality part: in ENGINE's training, between systems, below the references."""
    return [*_training_warnings(engine_metrics), *_system_warnings(results)]


def _training_warnings(metrics: Sequence[dict[str, Any]]) -> list[str]:
    scored = [
        line
        for line in metrics
        if line.get("kind") == "valid" and line.get("energy") is not None and line.get("bleu") is not None
    ]
    if len(scored) < 2:
        return []
    first, last = scored[0], scored[-1]
    best, lowest = max(scored, key=lambda line: line["bleu"]), min(scored, key=lambda line: line["energy"])
    if lowest["energy"] < first["energy"] and best["bleu"] <= first["bleu"] + SAME_BLEU:
        return [
            f"While ENGINE trained, dev energy fell from {first['energy']:.1f} to {lowest['energy']:.1f} nats a "
            f"sentence, but dev BLEU never rose above the {first['bleu']:.2f} of its first validation. The student "
            "found outputs that the teacher likes and the references do not; a better trained baseline, distilled "
            "data or a smaller learning rate usually mends this."
        ]
    if last["energy"] < best["energy"] and last["bleu"] < best["bleu"] - LOST_BLEU:
        return [
            f"Dev BLEU was highest ({best['bleu']:.2f}) at update {best['update']}. Afterwards energy kept falling, "
            f"from {best['energy']:.1f} to {last['energy']:.1f} nats, while BLEU fell to {last['bleu']:.2f}: lower "
            "energy was no longer better translation. Select on BLEU, or stop earlier."
        ]
    return []


def _system_warnings(results: dict[str, Any]) -> list[str]:
    lines, systems = [], results["systems"]
    passes = fewest_passes(systems)
    cmlm, engine = row_of(systems, "cmlm", passes), row_of(systems, "engine", passes)
    if cmlm and engine and engine["energy"] < cmlm["energy"] and engine["bleu"] <= cmlm["bleu"] + SAME_BLEU:
        lines.append(
            f"With {_passes(passes)}, ENGINE's outputs have less energy than the CMLM's ({engine['energy']:.1f} "
            f"against {cmlm['energy']:.1f} nats) but no higher BLEU ({engine['bleu']:.2f} against "
            f"{cmlm['bleu']:.2f}): here low energy is not good translation."
        )
    reference = results["references"]["energy"]
    # a teacher's own output is always likely, and where validity is known nothing has to be guessed from energy
    students = (row for row in systems if row["iterations"] is not None and "valid" not in row)
    below = list(dict.fromkeys(row["system"] for row in students if row["energy"] < reference))
    if below:
        lines.append(
            f"These have less energy than the references' {reference:.1f} nats a sentence: {', '.join(below)}. That "
            "makes them likelier under the teacher, not closer to what a person wrote; below that line BLEU and the "
            "outputs say more than the energy."
        )
    return lines


def _passes(count: int | None) -> str:
    return "one pass" if count == 1 else f"{count} passes"
