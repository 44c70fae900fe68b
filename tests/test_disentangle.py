"""Proves each measure of disentangle.py on cases that a pencil gives: streams that are separate are
found separate, entangled ones entangled.

    python -m pytest tests/test_disentangle.py
"""
import numpy as np
import pytest

import disentangle


def test_cka_by_pencil():
    """x and z are at right angles and equally long, so that x + z shares half with x."""
    x, z = np.array([[1.0], [-1], [1], [-1]]), np.array([[1.0], [1], [-1], [-1]])
    assert disentangle.cka(x, 3 - 2 * x) == pytest.approx(1)
    assert disentangle.cka(x, z) == 0 and disentangle.cka(x, x + z) == pytest.approx(0.5)
    both, turn = np.hstack([x, z]), np.array([[0.6, 0.8], [-0.8, 0.6]])
    assert disentangle.cka(both, both @ turn) == pytest.approx(1)


# of (place, pathology): with these four films each mixed finding occurs
FINDINGS = np.array([(0, 0), (1, 1), (1, 0), (0, 1)])


def films_with(findings):
    """truth [N,2,2] and embeddings of pathologies and anatomies [N,2,2]: is it present in the film?
    and for pathologies their own number, for anatomies the pathology of the film."""
    truth = np.zeros((len(findings), 2, 2), int)
    truth[np.arange(len(findings)), findings[:, 0], findings[:, 1]] = 1
    number, kind = np.tile([0, 1], (len(findings), 1)), findings[:, [1, 1]]
    return truth, {"pathology_queried": np.stack([truth.any(1), number], axis=2),
                   "anatomy_queried": np.stack([truth.any(2), kind], axis=2)}


def separated(pathology, anatomy):  # one says what, the other says where
    return anatomy[:, :, None, 0] * pathology[:, None, :, 0]


def entangled(pathology, anatomy):  # the anatomy embeddings say it all
    return anatomy[:, :, None, 0] * (anatomy[:, :, None, 1] == pathology[:, None, :, 1])


def test_the_swap_test_by_pencil():
    truth, stages = films_with(FINDINGS)
    s = disentangle.swap_shares(separated, stages, truth, 0)
    assert s["both of A"] == {"A,A": 1, "A,B": 0, "B,A": 0, "B,B": 0, "n": 4}
    assert s["A and B"] == {"A,A": 0, "A,B": 1, "B,A": 0, "B,B": 0, "n": 4}
    s = disentangle.swap_shares(entangled, stages, truth, 0)
    assert s["both of A"]["A,A"] == 1 and s["A and B"]["B,B"] == 1


def test_the_swap_test_takes_films_of_one_finding_whose_mixture_occurs():
    truth = films_with(FINDINGS)[0]
    films, kinds, places = disentangle.swap_pairs(truth, 0)
    assert sorted(films.tolist()) == [[0, 1], [1, 0], [2, 3], [3, 2]]
    assert (kinds == FINDINGS[films, 1]).all() and (places == FINDINGS[films, 0]).all()
    assert len(disentangle.swap_pairs(truth[:3], 0)[0]) == 0  # pathology 1 at place 0 never occurs
    truth[3, 1, 1] = 1                                    # it occurs, in a film with two findings
    assert sorted(disentangle.swap_pairs(truth, 0)[0].tolist()) == [[0, 1], [1, 0]]


def test_moved_by_pencil():
    """Films at 0 and 2, so root mean square distance sqrt(2)."""
    step = 2 ** 0.5 * np.array([[0, 0], [0, 1], [0, 2]])
    s = disentangle.moved(np.concatenate([step, step + [2, 0]]))
    assert s == pytest.approx({"what": 1, "where": 2, "what / where": 0.5})
    still = disentangle.moved(step[[0, 1, 0, 2, 1, 2]])  # the place moves nothing
    assert still["where"] == 0 and still["what"] > 0 and still["what / where"] is None


def test_probes_find_what_a_stream_holds():
    """One stream holds the pathology and the other the place, as nothing in training makes them."""
    rng, patients = np.random.default_rng(0), np.arange(200)
    what, where = rng.integers(2, size=(2, 200, 1))
    for stream, own, other in ((what, what, where), (where, where, what)):
        x = np.hstack([stream, rng.random((200, 2))])                           # [N,3]
        assert disentangle.probe(x, own, patients) > 0.99
        assert disentangle.probe(x, other, patients) < 0.65
    assert disentangle.probe(x, what, patients // 100) is None  # too few patients


def test_counterfactual_films_differ_in_one_thing(monkeypatch):
    """A film's seed stays; first its pathology, then its place changes."""
    drawn = []
    monkeypatch.setattr(disentangle, "draw_film", lambda seed, findings, size: (
        drawn.append((seed, *findings[0])) or np.zeros((size, size)),))
    assert disentangle.counterfactual_films(2, count=20).shape == (60, 2, 2)
    for film, what, where in zip(drawn[::3], drawn[1::3], drawn[2::3]):
        assert film[::2] == what[::2] and film[1] != what[1]
        assert film[:2] == where[:2] and film[2] != where[2]
