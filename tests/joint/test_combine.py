"""Combiners against torchjd, and against what each method promises."""

import builtins
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchjd import aggregation

from holdfast.errors import RecipeError
from holdfast.joint import Surgery, WeightedSum
from holdfast.joint.combine import METHODS, combine

OF_TWO = ("upgrad", "dualproj", "pcgrad", "mgda", "pcd", "sum", "mean")
ORACLES = {
    "upgrad": aggregation.UPGrad,
    "dualproj": aggregation.DualProj,
    "pcgrad": aggregation.PCGrad,
    "pcd": aggregation.PCD,
    "mgda": aggregation.MGDA,
    "alignedmtl": aggregation.AlignedMTL,
    "cagrad": lambda: aggregation.CAGrad(c=0.5),
    "fairgrad": lambda: aggregation.FairGrad(alpha=1.0),
    "imtlg": aggregation.IMTLG,
    "sum": aggregation.Sum,
    "mean": aggregation.Mean,
}
# UPGrad and DualProj of torchjd add 1e-4 to the diagonal of the normalised Gram matrix.
LOOSE = {"upgrad": 1e-3, "dualproj": 1e-3, "cagrad": 1e-4, "fairgrad": 1e-4}


def conflicting(start=0):
    """The first random pair from a seed on that conflicts."""
    seed = start
    while (matrix := random_gradients(seed))[0] @ matrix[1] >= 0:
        seed += 1
    return matrix


def random_gradients(seed, rows=2, columns=7, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return matrix * torch.exp(spread * torch.randn(rows, 1, generator=generator).double())


gradients_of_two = st.builds(random_gradients, st.integers(0, 10**6), columns=st.integers(1, 6))


@pytest.mark.parametrize("rows", [2, 3])
@pytest.mark.parametrize("method", ORACLES)
def test_methods_are_those_of_torchjd(method, rows):
    if method == "pcgrad" and rows > 2:
        pytest.skip("torchjd draws the order at random")
    conflicts = 0
    for seed in range(12):
        matrix = random_gradients(seed, rows)
        conflicts += bool((matrix @ matrix.T < 0).any())
        found, expected = combine(matrix, method), ORACLES[method]()(matrix)
        scale = matrix.norm(dim=1).max()
        assert (found - expected).norm() <= LOOSE.get(method, 1e-7) * scale
    assert conflicts >= 3


def test_nash_bargaining_gives_every_objective_its_share():
    """α solves ``G α = 1 / α`` (Navon et al., claim 3.1), up to the solver's tolerance."""
    matrix = random_gradients(3, spread=0.2)
    found = combine(matrix, "nashmtl")
    alpha = torch.linalg.lstsq(matrix.T, found[:, None]).solution[:, 0]
    products = (matrix @ found) * alpha
    torch.testing.assert_close(products, products.mean().expand(2), rtol=1e-2, atol=0)


def test_a_solver_does_not_talk_to_the_terminal(recwarn):
    zero_among_others = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert combine(zero_among_others, "nashmtl").isfinite().all()
    assert not recwarn.list


@given(gradients=gradients_of_two)
def test_upgrad_of_two_is_half_of_pcgrad_and_never_conflicts(gradients):
    combined = combine(gradients, "upgrad")
    torch.testing.assert_close(combined, combine(gradients, "pcgrad") / 2)
    tolerance = 1e-9 * gradients.norm(dim=1).max() * gradients.norm(dim=1)
    for method in ("upgrad", "dualproj", "mgda"):
        assert (gradients @ combine(gradients, method) >= -tolerance).all()


@given(gradients=gradients_of_two, factor=st.floats(0.01, 100))
def test_upgrad_is_linear_under_scaling_of_one_gradient(gradients, factor):
    """What it gains for a longer gradient is proportional: the projections do not change."""
    one, many = (combine(gradients * torch.tensor([[c], [1.0]]), "upgrad") for c in (1.0, factor))
    zero = combine(gradients * torch.tensor([[1e-12], [1.0]]), "upgrad")
    torch.testing.assert_close(many - zero, factor * (one - zero), rtol=1e-6, atol=1e-8)


@given(gradients=gradients_of_two)
@settings(max_examples=15, deadline=None)
def test_dualproj_is_the_closest_point_to_the_mean_that_does_not_conflict(gradients):
    """Against the projection found by Dykstra's alternating projections on the half-spaces."""
    point = gradients.mean(0)
    residues = torch.zeros_like(gradients)
    for _ in range(3000):
        for i, row in enumerate(gradients):
            shifted = point + residues[i]
            point = shifted - min(float(row @ shifted), 0.0) / float(row @ row) * row
            residues[i] = shifted - point
    error = (combine(gradients, "dualproj") - point).norm()
    assert error <= 1e-3 * gradients.norm(dim=1).max()


@given(gradients=gradients_of_two, share=st.floats(0, 1))
def test_mgda_is_the_shortest_convex_combination(gradients, share):
    other = share * gradients[0] + (1 - share) * gradients[1]
    assert combine(gradients, "mgda").norm() <= other.norm() * (1 + 1e-9) + 1e-12


@given(seed=st.integers(0, 10**6), rows=st.integers(2, 4))
def test_pcd_serves_the_first_and_gives_the_others_their_part(seed, rows):
    gradients = random_gradients(seed, rows, columns=9)
    combined = combine(gradients, "pcd")
    norms = gradients.norm(dim=1)
    assert float(combined.norm()) == pytest.approx(float(norms[0]), rel=1e-6)
    progress = gradients[1:] @ combined / (norms[1:] * norms[0])
    assert (progress > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_gradient_and_opposite_gradients_give_finite_results(method):
    for matrix in ([[0.0, 0.0], [1.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]], [[1.0, 2.0], [-2.0, -4.0]]):
        if method in ("nashmtl", "fairgrad") and [0.0, 0.0] in matrix:
            continue  # Their shares divide by the norm of each gradient.
        assert combine(torch.tensor(matrix, dtype=torch.float64), method).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_all_vanish_give_none_and_a_single_one_is_itself(method, monkeypatch):
    assert not combine(torch.zeros(3, 4), method).any()
    monkeypatch.setitem(sys.modules, "torchjd", None)  # nor is it needed for them
    alone = torch.tensor([[1.0, -2.0]])
    assert torch.equal(combine(alone, method), alone[0])


@pytest.mark.parametrize("method", OF_TWO)
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_whose_square_vanishes_in_single_precision_does_no_harm(method, first):
    rows = [[-1e-24, 1e-24], [1.0, 0.0]] if first else [[1.0, 0.0], [-1e-24, 1e-24]]
    given_ = {name: [torch.tensor(row)] for name, row in zip("ab", rows, strict=True)}
    (found,) = Surgery(method)(given_, {"a": 1.0, "b": 1.0})
    assert found.isfinite().all() and found.norm() < 2.5


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_not_hidden_from_the_guard(method):
    assert not combine(torch.tensor([[1.0, math.nan], [1.0, 2.0]]), method).isfinite().all()


def test_names_of_methods_may_be_written_as_in_torchjd():
    matrix = random_gradients(0)
    assert torch.equal(combine(matrix, "UPGrad"), combine(matrix, "upgrad"))
    assert torch.equal(combine(matrix, "dual_proj"), combine(matrix, "dualproj"))


def split(row):
    """A flat gradient as tensors of several shapes, one of them absent."""
    return [row[:4].clone().view(2, 2), None, row[4:].clone()]


def flat(gradient):
    return torch.cat([part.reshape(-1) for part in gradient if part is not None])


@pytest.mark.parametrize("method", METHODS)
def test_surgery_on_tensor_lists_is_the_functional_form(method):
    matrix = random_gradients(5, spread=0.3)
    given_ = {"a": split(matrix[0]), "b": split(matrix[1])}
    found = Surgery(method)(given_, {"a": 1.0, "b": 1.0})
    assert found[1] is None
    torch.testing.assert_close(flat(found), combine(matrix, method))


def test_weights_and_scale_multiply_gradients_before_they_are_combined():
    matrix = conflicting()
    surgery = Surgery("upgrad", scale=3)
    given_ = {"a": split(matrix[0]), "b": split(matrix[1])}
    found = surgery(given_, {"a": 0.5, "b": 2.0})
    expected = combine(matrix * torch.tensor([[1.5], [2.0]]), "upgrad")
    torch.testing.assert_close(flat(found), expected)
    assert surgery.used["scale"] == 3.0


def test_match_makes_the_first_gradient_as_long_as_the_second():
    matrix = random_gradients(2)
    surgery = Surgery("sum", "match")
    found = flat(surgery({"a": split(matrix[0]), "b": split(matrix[1])}, {"a": 1.0, "b": 1.0}))
    expected = matrix[0] / matrix[0].norm() * matrix[1].norm() + matrix[1]
    torch.testing.assert_close(found, expected)
    assert surgery.used["scale"] == pytest.approx(float(matrix[1].norm() / matrix[0].norm()))


@pytest.mark.parametrize("zero", [0, 1])
def test_match_leaves_gradients_alone_where_one_is_zero(zero):
    matrix = random_gradients(2)
    matrix[zero] = 0.0
    surgery = Surgery("sum", "match")
    found = flat(surgery({"a": split(matrix[0]), "b": split(matrix[1])}, {"a": 1.0, "b": 1.0}))
    torch.testing.assert_close(found, matrix[1 - zero])
    assert surgery.used["scale"] == 1.0


def test_a_turn_with_one_objective_is_left_alone():
    surgery = Surgery("upgrad", scale=3)
    found = surgery({"a": [torch.ones(2), None]}, {"a": 0.5})
    assert found[0].tolist() == [0.5, 0.5] and found[1] is None and surgery.used == {}


def test_each_parameter_gets_the_gradients_of_those_objectives_that_have_one():
    gradients = {
        "a": [torch.ones(2), torch.ones(1), None, None],
        "b": [torch.ones(2), None, torch.ones(3), None],
    }
    found = WeightedSum()(gradients, {"a": 2.0, "b": 3.0})
    values = [None if part is None else part.tolist() for part in found]
    assert values == [[5.0, 5.0], [2.0], [3.0, 3.0, 3.0], None]


@pytest.mark.parametrize("method", METHODS)
def test_what_one_objective_alone_trains_is_no_part_of_surgery(method):
    """However long the gradient of a critic, the shared policy gets the same, and the critic its
    own gradient whole."""
    matrix = conflicting()
    for length in (1.0, 1e4):
        critic = torch.full((3,), length, dtype=matrix.dtype)
        given_ = {"a": [matrix[0].clone(), None], "b": [matrix[1].clone(), critic.clone()]}
        found = Surgery(method)(given_, {"a": 1.0, "b": 1.0})
        torch.testing.assert_close(found[0], combine(matrix, method))
        assert torch.equal(found[1], critic)


def test_networks_that_share_nothing_get_their_own_gradients():
    given_ = {"a": [torch.ones(2), None], "b": [None, torch.full((3,), 5.0)]}
    surgery = Surgery("upgrad", scale="match")
    found = surgery(given_, {"a": 2.0, "b": 1.0})
    assert [part.tolist() for part in found] == [[2.0, 2.0], [5.0, 5.0, 5.0]]
    assert surgery.used["scale"] == 1.0


def test_pcd_follows_running_averages_and_goes_on_where_it_stood():
    rows = [random_gradients(seed) for seed in range(8)]
    oracle = aggregation.PCD()
    expected = [oracle(row) for row in rows]

    def take(surgery, part):
        return [
            flat(surgery({"a": split(r[0]), "b": split(r[1])}, {"a": 1.0, "b": 1.0})) for r in part
        ]

    first = Surgery("pcd")
    found = take(first, rows[:5])
    second = Surgery("pcd")
    second.load_state_dict(first.state_dict())
    found += take(second, rows[5:])
    torch.testing.assert_close(found, expected)
    assert all(map(torch.equal, take(first, rows[5:]), found[5:]))


def test_pcd_gives_priority_to_the_objective_that_is_named():
    matrix = conflicting()
    given_ = {"a": split(matrix[0]), "b": split(matrix[1])}
    found = flat(Surgery("pcd", priority="b")(given_, {"a": 1.0, "b": 1.0}))
    torch.testing.assert_close(found, combine(matrix.flip(0), "pcd"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Surgery("upgrade"), "method is 'upgrade'"),
        (lambda: Surgery(scale=0.0), "scale is 0.0"),
        (lambda: Surgery(scale=math.inf), "scale is inf"),
        (lambda: Surgery(scale="norm"), "scale is 'norm'"),
        (lambda: Surgery("upgrad", priority="a"), "only method pcd"),
        (lambda: combine(torch.ones(3), "sum"), r"shape \(3,\)"),
        (lambda: combine(torch.ones(0, 3), "sum"), "shape"),
        (lambda: combine(torch.ones(2, 3), "none"), "method is 'none'"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_absent_torchjd_is_named_with_the_extra_that_brings_it(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("torchjd"):
            raise ImportError("No module named 'torchjd'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(RecipeError, match=r"upgrad.*pip install holdfast\[surgery\]"):
        combine(torch.eye(3), "upgrad")
    combine(torch.eye(3)[:2], "upgrad")
    monkeypatch.setattr("holdfast.joint.combine.methods.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"cagrad.*pip install holdfast\[surgery\]"):
        Surgery("cagrad")
