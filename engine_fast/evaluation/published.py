"""The paper's figures, as data: Tu, Pang, Wiseman, Gimpel, "ENGINE: Energy-Based Inference Networks for
Non-Autoregressive Machine Translation", ACL 2020, arXiv 2005.00850.
"""

from __future__ import annotations

from typing import Any

SOURCE = "Tu, Pang, Wiseman, Gimpel: ENGINE, ACL 2020 (arXiv 2005.00850)"

AS_PUBLISHED = "energy as published, its unit is not stated"
"""Of Tables 2 and 5. The released code validates in bits a sentence; ours is in nats."""

OPERATORS = ("SX", "STL", "SG", "ST", "GX")
"""Order of Table 2's rows (O1) and columns (O2)."""

TABLE2: dict[str, dict[str, Any]] = {
    "lstm": {
        "what": "Table 2 (a): seq2seq energy, BiLSTM inference network; dev set of IWSLT14 DE-EN, oracle lengths",
        "energy": {
            "SX": (55, 256, 56, 55, 55),
            "STL": (97, 164, 94, 95, 190),
            "SG": (82, 206, 81, 82, 83),
            "ST": (81, 170, 81, 80, 83),
            "GX": (53, 201, 56, 54, 55),
        },
        "bleu": {
            "SX": (20.2, 0, 19.6, 20.1, 19.6),
            "STL": (14.8, 8.2, 13.7, 14.6, 0),
            "SG": (15.2, 0, 14.7, 15.0, 13.5),
            "ST": (14.7, 0, 14.4, 14.3, 13.7),
            "GX": (19.8, 0, 18.3, 19.6, 19.4),
        },
    },
    "transformer": {
        "what": "Table 2 (b): transformer energy, CMLM inference network; dev set of IWSLT14 DE-EN, oracle lengths",
        "energy": {
            "SX": (80, 133, 81, 80, 81),
            "STL": (186, 133, 95, 97, 180),
            "SG": (98, 133, 95, 97, 97),
            "ST": (98, 133, 95, 97, 97),
            "GX": (81, 133, 81, 81, 81),
        },
        "bleu": {
            "SX": (31.7, 27.8, 31.5, 31.7, 31.6),
            "STL": (25.3, 27.8, 20.0, 30.1, 26.0),
            "SG": (30.1, 27.8, 30.1, 30.0, 29.8),
            "ST": (30.2, 27.8, 30.0, 30.1, 30.0),
            "GX": (31.5, 27.8, 31.2, 31.5, 31.4),
        },
    },
}
"""O1 -> figures in the order of O2: energy of the discrete output, and its BLEU."""

TABLE3: dict[str, dict[str, dict[int, float]]] = {
    "IWSLT14 DE-EN": {"CMLM": {1: 28.11, 10: 33.39}, "ENGINE": {1: 31.99, 10: 33.17}},
    "WMT16 RO-EN": {"CMLM": {1: 28.20, 10: 33.31}, "ENGINE": {1: 33.16, 10: 34.04}},
}
"""Test BLEU by number of refinement iterations."""

TABLE4: dict[str, tuple[tuple[str, float], ...]] = {
    "IWSLT14 DE-EN": (
        ("teacher, greedy", 33.00),
        ("teacher, beam", 34.11),
        ("CMLM, 1 iteration", 28.25),
        ("CMLM, 10 iterations", 33.39),
        ("ENGINE, 1 iteration", 31.99),
        ("ENGINE, 10 iterations", 33.17),
        ("FlowSeq", 27.55),
    ),
    "WMT16 RO-EN": (
        ("teacher, greedy", 33.33),
        ("teacher, beam", 34.07),
        ("CMLM, 1 iteration", 28.20),
        ("CMLM, 10 iterations", 33.31),
        ("ENGINE, 1 iteration", 33.16),
        ("ENGINE, 10 iterations", 34.04),
        ("iterative refinement", 25.73),
        ("fertility", 29.06),
        ("CTC", 24.71),
        ("FlowSeq", 30.44),
        ("bag-of-ngrams", 29.29),
        ("AXE", 31.54),
        ("Imputer", 31.7),
    ),
}
"""Test BLEU; the systems after ENGINE are others', at one pass, as the paper quotes them."""
ONE_DECIMAL = frozenset({"Imputer"})
"""Systems of Table 4 whose figure is published with one decimal, not two."""

TABLE5: dict[str, dict[str, tuple[float, float]]] = {
    "IWSLT14 DE-EN": {"references": (153.54, 8.28), "distilled": (112.36, 14.58), "engine": (51.98, 19.55)},
    "WMT16 RO-EN": {"references": (175.94, 9.47), "distilled": (205.71, 5.76), "engine": (64.03, 21.69)},
}
"""BiLSTM inference network, oracle lengths: test energy and BLEU."""

TABLE6 = "Table 6 shows outputs side by side: the one-pass CMLM repeats tokens, ENGINE repeats far fewer."
