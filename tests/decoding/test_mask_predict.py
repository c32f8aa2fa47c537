from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from engine_fast.data.symbols import BOS, EOS, MASK, PAD
from engine_fast.decoding import mask_predict, mask_predict_candidates, mask_predict_n_best
from engine_fast.decoding.mask_predict import lengths_around, predict_lengths
from engine_fast.energies import discrete_energy
from engine_fast.errors import ConfigError
from engine_fast.models import CMLM, Transformer
from tests.decoding.tiny import make_student, pad


def reference(
    model: CMLM, source_S: list[int], length: int, iterations: int, force_end: bool
) -> tuple[list[int], float]:
    """One sentence, one length, slot by slot: the definition, with the whole vocabulary product every time."""
    source = torch.tensor([source_S])
    memory, _ = model.encode(source)
    n = length - 1 if force_end else length
    tokens = [MASK] * length  # the first pass reads what ENGINE's training reads
    values = [0.0] * n
    masked = list(range(n))
    for t in range(iterations):
        if t:
            count = max(1, n * (iterations - t) // iterations)
            masked = sorted(range(n), key=lambda i: values[i])[:count]
            for i in masked:
                tokens[i] = MASK
        log_probs = model.project(model.decode(memory, torch.tensor([tokens])))[0].log_softmax(-1)
        for i in masked:
            allowed = log_probs[i].clone()
            if force_end:
                allowed[[BOS, PAD, MASK, EOS]] = float("-inf")
            values[i], tokens[i] = allowed.max().item(), int(allowed.argmax())
        if force_end:
            tokens[-1] = EOS
    return tokens, sum(values)


@pytest.mark.parametrize("force_end", [True, False])
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("seed", [0, 1])
def test_candidates_are_those_of_the_definition(seed: int, iterations: int, force_end: bool, sources: Tensor) -> None:
    model = make_student(seed=seed)
    lengths = torch.tensor([[5, 2, 9], [2, 3, 4], [7, 3, 6], [24, 8, 10]])
    found = mask_predict_candidates(model, sources, iterations=iterations, lengths_BK=lengths, force_end=force_end)
    for b in range(4):
        source = [i for i in sources[b].tolist() if i != PAD]
        for k in range(3):
            length = int(lengths[b, k])
            tokens, total = reference(model, source, length, iterations, force_end)
            assert found.tokens[b, k].tolist() == tokens + [PAD] * (24 - length)
            assert found.log_probabilities[b, k].item() == pytest.approx(total, abs=1e-9)
            average = total / (length - 1 if force_end else length)
            assert found.averages[b, k].item() == pytest.approx(average, abs=1e-9)


def test_the_winner_has_the_highest_average_log_probability(student: CMLM, sources: Tensor) -> None:
    _, logits = student.encode(sources)
    lengths = predict_lengths(logits, 4)
    found = mask_predict_candidates(student, sources, iterations=2, lengths_BK=lengths)
    best = found.averages.argmax(1)
    assert best.any(), "one sentence at least should prefer another length than the most probable"
    for b, h in enumerate(mask_predict(student, sources, iterations=2, length_beam=4)):
        k = int(best[b])
        assert h.tokens == found.tokens[b, k, : lengths[b, k]].tolist()
        assert h.score == pytest.approx(found.averages[b, k].item())
        assert h.log_probability == pytest.approx(found.log_probabilities[b, k].item())
    for hypotheses in mask_predict_n_best(student, sources, iterations=2, length_beam=4):
        assert len(hypotheses) == 4
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


@pytest.mark.parametrize("seed", range(6))
def test_end_is_forced_and_specials_are_not_emitted(seed: int, sources: Tensor) -> None:
    for h in mask_predict(make_student(seed=seed), sources, iterations=2, length_beam=3):
        assert h.tokens[-1] == EOS
        assert not {BOS, PAD, EOS, MASK} & set(h.tokens[:-1])
        assert len(h.tokens) >= 2


def test_a_sentence_does_not_depend_on_its_batch(student: CMLM) -> None:
    rows = [[5, 6, 7, 8, EOS], [9, EOS], [11, 5, 10, EOS], [7, 7, 9, 10, 6, 5, EOS]]
    together = mask_predict(student, pad(rows), iterations=4, length_beam=3)
    alone = [mask_predict(student, torch.tensor([row]), iterations=4, length_beam=3)[0] for row in rows]
    assert [h.tokens for h in together] == [h.tokens for h in alone]


def test_predicted_lengths_leave_room_for_a_word_and_are_distinct() -> None:
    logits = torch.tensor([[9.0, 8, 1, 3, 3, 2], [float("-inf"), 9, 1, 2, 3, 4]])
    assert predict_lengths(logits, 3).tolist() == [[3, 4, 5], [5, 4, 3]]
    assert predict_lengths(logits, 99).shape == (2, 4)


def test_lengths_around_known_ones() -> None:
    lengths = torch.tensor([6, 1, 24])
    assert lengths_around(lengths, 1, 24).tolist() == [[6], [2], [24]]
    assert lengths_around(lengths, 3, 24).tolist() == [[5, 6, 7], [2, 2, 2], [23, 24, 24]]
    assert lengths_around(lengths, 4, 24).tolist() == [[5, 6, 7, 8], [2, 2, 2, 3], [23, 24, 24, 24]]


def test_oracle_lengths_are_kept(student: CMLM, sources: Tensor) -> None:
    lengths = torch.tensor([3, 7, 24, 2])
    assert [len(h.tokens) for h in mask_predict(student, sources, lengths=lengths)] == lengths.tolist()


def test_rescoring_chooses_by_energy_over_length(student: CMLM, sources: Tensor) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def rescore(source_BS: Tensor, target_NT: Tensor) -> Tensor:
        asked.append((source_BS, target_NT))
        return (target_NT == 7).sum(1) * 10.0 + (target_NT != PAD).sum(1).float()

    plain = mask_predict_n_best(student, sources, length_beam=4)
    chosen = mask_predict_n_best(student, sources, length_beam=4, rescore=rescore)
    assert torch.equal(asked[0][0], sources)
    assert len(asked[0][1]) == 16
    for before, after in zip(plain, chosen, strict=True):
        assert {tuple(h.tokens) for h in before} == {tuple(h.tokens) for h in after}
        scores = [-(10.0 * h.tokens.count(7) + len(h.tokens)) / len(h.tokens) for h in after]
        assert [h.score for h in after] == pytest.approx(scores)
        assert scores == sorted(scores, reverse=True)
    total = mask_predict(student, sources, length_beam=4, rescore=rescore, length_penalty=0)
    assert [h.score for h in total] == [-(10.0 * h.tokens.count(7) + len(h.tokens)) for h in total]


def test_only_masked_slots_meet_the_vocabulary(student: CMLM, sources: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    project = student.project_through
    monkeypatch.setattr(student, "project_through", lambda h, through: rows.append(len(h)) or project(h, through))
    lengths = torch.tensor([[5], [3], [11], [9]])
    mask_predict_candidates(student, sources, iterations=4, lengths_BK=lengths)
    n = [4, 2, 10, 8]
    first, *rest = rows
    assert first == sum(n)
    for t, found in enumerate(rest, 1):  # without the sentences that have nothing new to read
        masked = [max(1, m * (4 - t) // 4) for m in n]
        assert masked[2] <= found <= sum(masked)


def test_candidates_are_those_of_separate_runs(student: CMLM, sources: Tensor) -> None:
    lengths = torch.tensor([[5, 2, 9], [2, 3, 4], [7, 3, 6], [24, 8, 10]])
    together = mask_predict_candidates(student, sources, iterations=3, lengths_BK=lengths)
    for k in range(3):
        alone = mask_predict_candidates(student, sources, iterations=3, lengths_BK=lengths[:, k : k + 1])
        width = alone.tokens.shape[2]
        assert torch.equal(together.tokens[:, k, :width], alone.tokens[:, 0])
        torch.testing.assert_close(together.log_probabilities[:, k], alone.log_probabilities[:, 0], rtol=0, atol=1e-9)


def test_a_source_is_encoded_and_projected_once(student: CMLM, sources: Tensor) -> None:
    """Whatever the candidates and passes: the decoder's keys and values cost B * S rows a layer."""
    rows: dict[str, list[int]] = {"encoder": [], "keys": []}
    student.encoder.register_forward_hook(lambda *call: rows["encoder"].append(len(call[1][0])))
    for layer in student.decoder.layers:
        layer.cross_attention.kv_proj.register_forward_hook(
            lambda _, given, __: rows["keys"].append(given[0].shape[:2].numel())
        )
    for iterations in (1, 4):
        mask_predict(student, sources, iterations=iterations, length_beam=3)
        assert rows == {"encoder": [4], "keys": [sources.numel()] * 2}
        for seen in rows.values():
            seen.clear()


def test_a_sentence_that_reads_nothing_new_is_not_computed_again(student: CMLM) -> None:
    """Of one word, the only slot is masked in every pass: the first two passes say all (the end differs). Another goes
    on; both are what they are alone."""
    rows: list[int] = []
    student.decoder.register_forward_hook(lambda _, given, __: rows.append(len(given[1])))
    sources, lengths = pad([[9, EOS], [7, 7, 9, 10, 6, 5, EOS]]), torch.tensor([[2, 2], [9, 8]])
    found = mask_predict_candidates(student, sources, iterations=4, lengths_BK=lengths)
    assert rows == [4, 4, 2, 2]
    rows.clear()
    alone = mask_predict_candidates(student, sources[:1, :2], iterations=10, lengths_BK=lengths[:1])
    assert rows == [2, 2]
    assert found.tokens[0, :, :2].tolist() == alone.tokens[0].tolist()
    torch.testing.assert_close(found.log_probabilities[0], alone.log_probabilities[0])


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_reranking_is_one_pass_of_the_teacher(
    student: CMLM, teacher: Transformer, sources: Tensor, length_penalty: float
) -> None:
    """Noisy parallel decoding: every candidate's energy as if it stood alone, with each source encoded once."""
    encoded: list[int] = []
    teacher.encoder.register_forward_hook(lambda _, given, __: encoded.append(len(given[0])))
    ranked = mask_predict_n_best(
        student, sources, length_beam=3, rescore=partial(discrete_energy, teacher), length_penalty=length_penalty
    )
    assert encoded == [4]
    assert {tuple(h.tokens) for h in ranked[3]} == {
        tuple(h.tokens) for h in mask_predict_n_best(student, sources, length_beam=3)[3]
    }
    for source, hypotheses in zip(sources, ranked, strict=True):
        alone = source[source != PAD][None]
        for h in hypotheses:
            energy = discrete_energy(teacher, alone, torch.tensor([h.tokens])).item()
            assert h.score == pytest.approx(-energy / len(h.tokens) ** length_penalty, abs=1e-9)
        assert [h.score for h in hypotheses] == sorted((h.score for h in hypotheses), reverse=True)


def test_nonsense_settings_are_named(student: CMLM, sources: Tensor) -> None:
    with pytest.raises(ConfigError, match="iterations = 0"):
        mask_predict(student, sources, iterations=0)
    with pytest.raises(ConfigError, match="length_beam = 0"):
        mask_predict(student, sources, length_beam=0)


def test_no_sentences(student: CMLM) -> None:
    assert mask_predict(student, torch.zeros(0, 0, dtype=torch.long)) == []


@pytest.mark.parametrize("iterations", [1, 4])
def test_an_observer_sees_every_pass_and_changes_nothing(student: CMLM, sources: Tensor, iterations: int) -> None:
    lengths = torch.tensor([[5, 9], [2, 3], [7, 6], [8, 10]])
    passes: list[tuple[int, Tensor, Tensor, Tensor]] = []
    found = mask_predict_candidates(
        student,
        sources,
        iterations=iterations,
        lengths_BK=lengths,
        observe=lambda number, *tensors: passes.append((number, *(tensor.clone() for tensor in tensors))),
    )
    unseen = mask_predict_candidates(student, sources, iterations=iterations, lengths_BK=lengths)
    assert torch.equal(found.tokens, unseen.tokens)
    assert [number for number, *_ in passes] == list(range(iterations))
    assert torch.equal(passes[-1][1].view_as(found.tokens), found.tokens)
    assert torch.equal(passes[-1][2].sum(1).view_as(found.log_probabilities), found.log_probabilities)
    assert torch.equal(passes[0][3].sum(1), lengths.flatten() - 1)  # every slot but the end symbol's
    for (_, before, old, _), (_, after, new, masked) in pairwise(passes):
        assert (masked.sum(1) >= 1).all()
        assert torch.equal(before[~masked], after[~masked])
        assert torch.equal(old[~masked], new[~masked])
