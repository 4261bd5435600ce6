"""The sweep over RetroInfer's budget: its points against the method's own attention, the bound, and what is drawn."""

import pytest
import torch

from attnlab.evals import wave_bound, wave_data
from attnlab.evals.methods import parse
from attnlab.evals.tasks.attention_metrics import Item, budget, measured
from attnlab.evals.wave_bound import Point

TOKENS, QUERIES = 320, 2


@pytest.fixture(scope="module")
def data():
    rows = [wave_data.planted(TOKENS, QUERIES, seed) for seed in (0, 1)]
    return [Item(row.q[None], row.k[None], row.v[None], 0.125) for row in rows]


def test_points_are_the_methods(data):
    [point] = wave_bound.sweep(data, (0.1,))
    for name, option in {"none": "estimation=0", "ratio": "estimation=0.232", "all": "estimation=1"}.items():
        [method] = parse(f"wave:retrieval=0.1+tokens_per_cluster=16+update_every=1024+{option}")
        found = [method.attend(item.q, item.k, item.v, item.scale) for item in data]
        scores = [measured(item, x) for item, x in zip(data, found, strict=True)]
        assert point.error[name] == pytest.approx(sum(s["output_error"] for s in scores) / 2, rel=1e-5)
        assert point.unread == pytest.approx(1 - sum(s["mass"] for s in scores) / 2, abs=1e-9)
        assert point.read == pytest.approx(sum(budget(i, x.read) for i, x in zip(data, found, strict=True)) / 2)


def test_the_bound_holds_and_closes(data):
    points = wave_bound.sweep(data, (0.0, 0.1, 0.4, 1.0))
    assert [p.read for p in points] == sorted(p.read for p in points)
    for point in points:
        assert point.held == 1 and point.lower <= point.unread + 1e-6 and point.unread <= point.upper + 1e-6
    assert points[0].unread > points[1].unread > points[2].unread > 0 < points[2].lower
    assert points[0].upper - points[0].lower > 0.05
    last = points[-1]
    assert (last.read, last.lower, last.upper) == (1, 0, 0) and abs(last.unread) < 1e-9
    assert max(last.error.values()) < 1e-5 < points[2].error["none"]


def test_a_bound_that_fails_is_seen(data, monkeypatch):
    honest = wave_bound.wave_attention

    def proud(*args, **options):
        out, bound, read = honest(*args, **options)
        return out, bound._replace(upper=bound.lower), read

    monkeypatch.setattr(wave_bound, "wave_attention", proud)
    assert wave_bound.sweep(data[:1], (0.1,))[0].held < 0.5


def test_an_adaptive_budget_keeps_its_promise(data):
    flat = [Item(item.q, item.k, item.v, 0.003) for item in data]
    loose, tight = wave_bound.adaptive(flat, (0.5, 0.05))
    for point, error in ((loose, 0.5), (tight, 0.05)):
        assert point.unread <= point.upper <= error and point.held == 1
    assert loose.read < 0.7 < tight.read < 1


def test_items_are_those_of_a_run(monkeypatch):
    class Bare:
        model = torch.nn.Linear(1, 1)

    Bare.model.device, Bare.model.dtype = torch.device("cpu"), torch.float32
    made = wave_bound.items(Bare, "attn_planted", 64, 2)
    again = wave_bound.items(Bare, "attn_planted", 64, 2)
    assert len(made) == 2 and torch.equal(made[1].k, again[1].k) and not torch.equal(made[0].k, made[1].k)


def test_tables_and_figures():
    points = [
        Point(0.1, {"none": 0.5, "ratio": 0.25, "all": 0.2}, 0.4, 0.3, 0.6, 1.0),
        Point(0.2, {"none": 0.25, "ratio": 0.125, "all": 0.1}, 0.2, 0.1, 0.3, 0.99),
    ]
    assert wave_bound._mean(points) == Point(
        pytest.approx(0.15), {"none": 0.375, "ratio": 0.1875, "all": pytest.approx(0.15)},
        pytest.approx(0.3), 0.2, pytest.approx(0.45), 0.995,
    )  # fmt: skip
    lines = wave_bound.table(points, "retrieval", (0.01, 0.02)).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["0.01", "10.0%", "50.0%", "25.0%", "20.0%", "40.0%", "30.0% to 60.0%", "100%"]
    errors = wave_bound.error_figure({"a": points, "b": points})
    assert [len(axes.lines) for axes in errors.axes] == [3, 3]
    assert [list(line.get_ydata()) for line in errors.axes[0].lines] == [[50, 25], [25, 12.5], [20, 10]]
    bound = wave_bound.bound_figure({"a": points})
    assert list(bound.axes[0].lines[0].get_xdata()) == [10, 20] and len(bound.axes[0].collections) == 1
