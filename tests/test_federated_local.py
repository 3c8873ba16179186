"""Local steps of the federated baselines: proximal steps against closed forms, FedRAP against its formula by hand."""

from __future__ import annotations

import math

import pytest
import torch

from recbole_cl.federated.client import Examples
from recbole_cl.federated.local import (
    OwnWeights,
    copies,
    descend,
    descend_apart,
    flat,
    strength,
    together,
    unflat,
)
from recbole_cl.model.fedrap import Touched


def bowl(curve: torch.Tensor, centre: torch.Tensor) -> object:
    """F(w) = sum_i curve_i / 2 (w_i - centre_i)^2 of each client."""
    return lambda weights: (0.5 * curve * (weights["w"] - centre).square()).sum(1)


def test_proximal_objectives_have_their_closed_form() -> None:
    """Many steps end where ``(curve centre + mu anchor) / (curve + mu)`` says; one step is the formula's step."""
    torch.manual_seed(0)
    curve, centre = torch.rand(3, 4).double() + 0.5, torch.randn(3, 4).double()
    anchor = {"w": torch.randn(3, 4).double()}
    for pull in (0.0, 0.3, 4.0):
        end, first = descend(bowl(curve, centre), anchor, 4000, 0.05, anchor, pull)
        torch.testing.assert_close(end["w"], (curve * centre + pull * anchor["w"]) / (curve + pull))
        torch.testing.assert_close(first, (0.5 * curve * (anchor["w"] - centre) ** 2).sum(1))
        start = {"w": torch.randn(3, 4).double()}  # Ditto's own weights begin elsewhere than at the anchor
        one, _ = descend(bowl(curve, centre), start, 1, 0.05, anchor, pull)
        slope = curve * (start["w"] - centre) + pull * (start["w"] - anchor["w"])
        torch.testing.assert_close(one["w"], start["w"] - 0.05 * slope)


def test_fedrap_steps_by_hand() -> None:
    """C: gradient of F at C + D, plus 2 lambda (D - C) / n, plus mu sign(C) / n; D the same with the other sign."""
    torch.manual_seed(1)
    curve, centre = torch.rand(2, 3).double(), torch.randn(2, 3).double()
    common, own = {"w": torch.randn(2, 3).double()}, {"w": torch.randn(2, 3).double(), "a": torch.ones(2, 1).double()}
    apart, sparse, n = 0.7, 0.4, 3.0
    after, mine, first = descend_apart(bowl(curve, centre), common, own, 1, 0.1, apart, sparse, n)
    c, d = common["w"], own["w"]
    slope = curve * (c + d - centre)
    torch.testing.assert_close(after["w"], c - 0.1 * (slope + 2 * apart * (d - c) / n + sparse * c.sign() / n))
    torch.testing.assert_close(mine["w"], d - 0.1 * (slope - 2 * apart * (d - c) / n))
    torch.testing.assert_close(first, (0.5 * curve * (c + d - centre) ** 2).sum(1))
    assert torch.equal(mine["a"], own["a"]), "what no loss reads stays"
    assert torch.equal(together(common, own)["w"], c + d)


def test_both_readings_of_the_schedule() -> None:
    """The paper's grows with the rounds, the code's stays."""
    assert [strength(0.2, "constant", t) for t in (0, 50)] == [0.2, 0.2]
    assert [strength(0.2, "tanh", t) for t in (0, 5)] == pytest.approx([0.0, 0.2 * math.tanh(0.5)])


def test_weights_as_rows_and_back() -> None:
    """Clients' weights as rows keep names, shapes and order."""
    like = {"a": torch.randn(2, 3), "b": torch.randn(4)}
    rows = flat(copies(like, 3))
    assert rows.shape == (3, 10)
    for name, value in unflat(rows[1], like).items():
        assert torch.equal(value, like[name])


def test_what_clients_keep() -> None:
    """Users in any order, others have what everybody has; items that come give everybody's rows."""
    begin = {"table": torch.zeros(3, 2)}
    kept = OwnWeights(begin)
    kept.put(torch.tensor([8, 2]), {"table": torch.stack([torch.full((3, 2), 8.0), torch.full((3, 2), 2.0)])})
    kept.put(torch.tensor([2, 5]), {"table": torch.stack([torch.full((3, 2), 2.5), torch.full((3, 2), 5.0)])})
    now = {"table": torch.arange(10.0).view(5, 2)}
    kept.widen(now)
    found = kept.get(torch.tensor([5, 7, 2, 8]), now)["table"]
    assert found[:, 0, 0].tolist() == [5.0, 0.0, 2.5, 8.0] and torch.equal(found[1], now["table"])
    assert torch.equal(found[0, 3:], now["table"][3:]) and len(kept) == 3
    again = OwnWeights(begin)
    again.load_state_dict(kept.state_dict())
    assert torch.equal(again.get(torch.tensor([5, 7, 2, 8]), now)["table"], found)


def test_fedrap_trains_the_rows_that_it_touches() -> None:
    """The sparse form is the dense one: a loss over whole tables, with regularisers over touched rows, by autograd."""
    torch.manual_seed(2)
    targets = torch.tensor([[3, 0, 5], [3, 0, 0], [2, 7, 0]])
    negatives = torch.randint(1, 9, (3, 3, 2))
    examples = Examples(torch.tensor([0, 0, 1]), targets, targets, negatives, torch.zeros(2, 1))
    places = Touched(examples)
    dense = {name: torch.randn(9, 4) for name in ("common", "first")}
    rows = {name: dense[name][places.items] * places.real for name in dense}
    slope, offset = torch.randn(2, 4), torch.randn(2)
    own = {"rows": rows["first"], "a": slope, "b": offset}
    sizes = places.real.sum((1, 2)) * 4
    after, mine, first = descend_apart(places.losses(), {"rows": rows["common"]}, own, 1, 0.1, 0.3, 0.2, sizes)
    for client, lines in ((0, [0, 1]), (1, [2])):
        c, d = (dense[name].clone().requires_grad_(True) for name in ("common", "first"))
        a = slope[client].clone().requires_grad_(True)
        losses, touched = [], set()
        for line in lines:
            for place in range(3):
                if target := int(targets[line, place]):
                    others = negatives[line, place].tolist()
                    touched |= {target, *others}
                    scores = (c + d)[[target, *others]] @ a + offset[client]
                    losses.append(-scores[0].sigmoid().log() - (1 - scores[1:].sigmoid()).log().sum())
        at = sorted(touched)
        loss = torch.stack(losses).mean()
        torch.testing.assert_close(first[client], loss.detach())
        (loss - 0.3 * (c[at] - d[at]).square().mean() + 0.2 * c[at].abs().mean()).backward()
        assert places.items[client, : len(at)].tolist() == at
        torch.testing.assert_close(after["rows"][client, : len(at)], (dense["common"] - 0.1 * c.grad)[at])
        torch.testing.assert_close(mine["rows"][client, : len(at)], (dense["first"] - 0.1 * d.grad)[at])
        torch.testing.assert_close(mine["a"][client], slope[client] - 0.1 * a.grad)
        assert not c.grad[[i for i in range(9) if i not in touched]].any()
