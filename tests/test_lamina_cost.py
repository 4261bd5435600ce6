"""The cost model: the paper's published inputs and results, closed forms, and what it refuses."""

import dataclasses
import itertools
import json

import pytest

from attnlab import lamina
from attnlab.lamina import CostModel, Efficiency, Hardware, HomogeneousCost, ModelShape, load_hardware, load_model
from attnlab.lamina.cost import Load
from attnlab.lamina.hardware import hardware_names
from attnlab.lamina.traffic import traffic_names

EQUAL_COST = {"LLaMA-33B": (1, 2), "LLaMA-65B": (2, 4), "LLaMA3-70B": (2, 4)}
IDEAL = Efficiency(1.0, 1.0, 1.0)


def paper(model: str, **options) -> CostModel:
    return CostModel("H100", "H20", model, dop=EQUAL_COST[model], **options)


def test_prices_of_table_5():
    assert paper("LLaMA-33B").price == pytest.approx(20.32)
    assert paper("LLaMA3-70B").price == pytest.approx(40.64)
    for model, devices, price in (("LLaMA-33B", 2, 22.12), ("LLaMA-65B", 4, 44.24), ("LLaMA3-70B", 4, 44.24)):
        rival = paper(model).counterpart()
        assert (rival.devices, rival.hardware.name) == (devices, "H100")
        assert rival.price == pytest.approx(price)


def test_hardware_of_table_1():
    figures = {"H100": (989e12, 80e9, 3.35e12), "H20": (148e12, 96e9, 4e12), "TPU v6e": (918e12, 32e9, 1.64e12)}
    for name, wanted in figures.items():
        found = load_hardware(name)
        assert (found.flops, found.memory, found.bandwidth) == wanted
    assert {"H200", "L20", "A100"} < set(hardware_names())
    assert all(load_hardware(name).source for name in hardware_names())


def test_bytes_sent_and_kept_per_token():
    for name, layers, width, group in (
        ("LLaMA-33B", 60, 6656, 1),
        ("LLaMA-65B", 80, 8192, 1),
        ("LLaMA3-70B", 80, 8192, 8),
    ):
        shape = load_model(name)
        assert (shape.layers, shape.width, shape.group) == (layers, width, group)
        assert shape.sent_bytes == (2 + 2 / group) * 2 * width * layers
        assert shape.kv_bytes == 2 * 2 * width * layers / group
    # Section 2.2.2: an H100's whole memory holds about 30 requests of 8192 tokens of LLaMA3-70B.
    assert round(80e9 / (load_model("LLaMA3-70B").kv_bytes * 8192)) == 30


def test_arithmetic_intensity():
    many, one = load_model("LLaMA3-70B"), load_model("LLaMA-65B")
    assert (many.attention_intensity(), one.attention_intensity()) == (8, 1)
    flop, read = 4 * many.width * many.layers, many.kv_bytes
    assert many.attention_intensity() == flop / read
    n, d = many.parameters, many.hidden
    assert many.model_intensity(64) == pytest.approx(2 * n * 64 / (2 * (n + 2 * 64 * d)))
    rising = [many.model_intensity(batch) for batch in (1, 10, 100, 1000)]
    assert rising == sorted(rising) and rising[2] > 90 * rising[0]


def test_mfu_stays_below_a_fifth_while_bandwidth_bound():
    """Section 2.2.1: an H100 uses less than 20 % of its arithmetic on batches under 100 or so."""
    cost, shape = HomogeneousCost("H100", "LLaMA3-70B", devices=2, efficiency=IDEAL), load_model("LLaMA3-70B")
    used = [2 * shape.parameters * batch / (cost.mtime(batch) * 2 * 989e12) for batch in (29, 58, 300)]
    assert used[0] == pytest.approx(used[1] / 2, rel=0.01)
    assert used[1] < 0.2 and used[2] > 0.9


def test_required_bandwidth_is_the_formula():
    cost = paper("LLaMA3-70B", alpha=0.2, mtime=lambda batch: 0.03 + 1e-5 * batch, atime=lambda tokens: 2e-8 * tokens)
    wanted = (2 + 2 / 8) * 2 * 8192 * 64 * 80 / (0.2 * (0.03 + 64e-5 + 2e-8 * 64 * 5000))
    assert cost.required_bandwidth(64, 5000) == pytest.approx(wanted)
    doubled = paper("LLaMA3-70B", alpha=0.4, mtime=cost.mtime, atime=cost.atime)
    assert doubled.required_bandwidth(64, 5000) == pytest.approx(wanted / 2)


def test_required_bandwidth_stays_under_30_gb_per_second():
    """Figure 4: at most 30 GB/s to a batch of 300, LLaMA3-70B.

    The paper's text gives no context lengths for that figure; its other ones take 4096 and 8192 tokens. At both of them
    this holds with its two H100s (as many as hold the weights) against one H20's attention, whatever fits that one's
    memory. Against four H20s attention is four times as fast and both lengths need more: 4096 tokens 70 GB/s, over the
    links of two H100s 35 each, 8192 tokens 23 each.
    """
    cost = CostModel("H100", "H20", "LLaMA3-70B", dop=(2, 1))
    for length in (4096, 8192):
        needed = [cost.required_bandwidth(batch, length) for batch in range(1, 301)]
        assert max(needed) < 30e9
        assert all(more >= less * (1 - 1e-9) for less, more in itertools.pairwise(needed))
    assert cost.required_bandwidth(300, 2048) > 30e9
    four = paper("LLaMA3-70B")
    assert 30e9 < four.required_bandwidth(300, 4096) / 2 < 40e9
    assert max(four.required_bandwidth(batch, 8192) / 2 for batch in range(1, 301)) < 30e9


def test_overlap_gains_more_without_groups():
    """Section 6.4, 4096 tokens: up to 13.2 % for LLaMA-65B (G = 1) and 3.5 % for LLaMA3-70B (G = 8).

    Nothing here is fitted to them: the published peaks lie within half and twice the model's.
    """
    gains = {}
    for model in ("LLaMA-65B", "LLaMA3-70B"):
        cost = paper(model, batches=1)
        gains[model] = max(cost.overlap_gain(batch, 4096) for batch in range(1, cost.batch_limit(4096) + 1))
    for model, published in (("LLaMA-65B", 0.132), ("LLaMA3-70B", 0.035)):
        assert published / 2 < gains[model] < 2 * published
    assert gains["LLaMA-65B"] > 3 * gains["LLaMA3-70B"]


def test_overlap_gain_falls_with_the_group():
    shapes = [ModelShape("g", 80, 8192, 64, 64 // group, 128, weights=130e9) for group in (1, 2, 4, 8, 16, 64)]
    gains = [CostModel("H100", "H20", shape, dop=(2, 4), batches=1).overlap_gain(32, 4096) for shape in shapes]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0


def test_overlap_is_what_a_step_loses():
    on, off = paper("LLaMA-65B", batches=1), paper("LLaMA-65B", batches=1, overlap=False)
    saved = 1 - on.iteration_time(20, 4096) / off.iteration_time(20, 4096)
    assert saved == pytest.approx(on.overlap_gain(20, 4096)) == pytest.approx(off.overlap_gain(20, 4096))


@pytest.mark.parametrize("attention", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("network", [1e-6, 1e-3, 1.0])
def test_overlap_against_a_schedule(attention, network):
    """Four operations on three resources, each as soon as it can be, and one after another."""
    cost = CostModel("H100", "H20", "LLaMA-65B", dop=(2, 4), batches=1)
    model, share = 0.02, cost.model.kv_projection_share
    q, kv = network / 4, network / 2
    q_there = q
    kv_there = max(q, model * share) + kv
    together = max(q_there + attention, kv_there)
    apart = model * share + q + kv + attention
    assert cost._hidden(model, attention, network) == pytest.approx(apart - together, abs=1e-15)
    assert cost._hidden(model, attention, network) >= 0


def test_roofline_of_the_model_and_of_attention():
    cost = HomogeneousCost("H100", "LLaMA3-70B", devices=4, efficiency=Efficiency(0.5, 0.8, 0.9))
    reduced = 2 * 80 * (2 * 3 / 4) * 2 * 8192 / (450e9 * 0.9)
    assert cost.mtime(1) == pytest.approx((137.5e9 + 4 * 8192) / (4 * 3.35e12 * 0.8) + reduced)
    assert cost.mtime(2000) == pytest.approx(137.5e9 * 2000 / (4 * 989e12 * 0.5) + 2000 * reduced)
    assert cost.atime(1e6) == pytest.approx(1e6 * 2 * 2 * 1024 * 80 / (4 * 3.35e12 * 0.8))
    # Few operations a second and many query heads a key: attention too can be short of arithmetic.
    slow = dataclasses.replace(load_hardware("H100"), flops=1e12)
    cost = HomogeneousCost(slow, "LLaMA3-70B", devices=4, efficiency=IDEAL)
    assert cost.atime(1e6) == pytest.approx(1e6 * 4 * 8192 * 80 / 4e12)


def test_one_batch_is_model_network_and_attention_in_turn():
    cost = paper("LLaMA3-70B", batches=1, overlap=False, efficiency=IDEAL)
    sent = 10 * cost.model.sent_bytes / (2 * 50e9)
    assert cost.iteration_time(10, 4096) == pytest.approx(cost.mtime(10) + cost.atime(40960) + sent + 80 * 33e-6)
    assert cost.link == 100e9


@pytest.mark.parametrize("n", [2, 3, 4])
def test_rotation_wastes_nothing_where_attention_takes_its_share(n):
    """Section 4.3: with `t_attention = t_model / (n - 1)` and no network every device works all the time."""
    fast = dataclasses.replace(load_hardware("H100"), network=1e30)
    far = dataclasses.replace(load_hardware("H20"), network=1e30)
    options = dict(batches=n, round_trip=0.0, overlap=False, mtime=lambda batch: 0.03)
    cost = CostModel(fast, far, "LLaMA3-70B", dop=(2 * (n - 1), 4), atime=lambda tokens: 0.03 / (n - 1), **options)
    assert cost.balance(4096) == pytest.approx(1)
    time = cost.iteration_time(8 * n, 4096)
    assert time == pytest.approx(n * 0.03 / (n - 1))
    busy_model, busy_attention = n * 0.03 / (n - 1) / time, n * 0.03 / (n - 1) / time
    assert busy_model == busy_attention == pytest.approx(1)
    slower = CostModel(fast, far, "LLaMA3-70B", dop=(2 * (n - 1), 4), atime=lambda tokens: 0.03, **options)
    assert slower.balance(4096) == pytest.approx(n - 1)
    assert slower.iteration_time(8 * n, 4096) == pytest.approx(max(0.06, n * 0.03))


def test_a_round_lasts_as_long_as_its_slowest_resource():
    cost = paper("LLaMA3-70B", efficiency=IDEAL)
    loads = [Load(40, 40 * 4096), Load(30, 30 * 9000)]
    steps = [cost.parts(load) for load in loads]
    floors = [sum(step.model for step in steps), sum(step.attention for step in steps)]
    assert cost.round_time(loads) == max(*floors, *(step.chain for step in steps))
    assert cost.round_time([Load(0, 0), loads[0]]) == max(steps[0].chain, steps[0].model, steps[0].attention)
    assert cost.round_time([Load(0, 0), Load(0, 0)]) == 0
    # A network a thousand times slower is what a round waits for: both batches' bytes pass the same ends.
    slow = dataclasses.replace(load_hardware("H100"), network=50e6)
    cost = CostModel(slow, "H20", "LLaMA3-70B", dop=(2, 4), efficiency=IDEAL)
    assert cost.round_time(loads) == pytest.approx(70 * cost.model.sent_bytes / (2 * 50e6))
    far = dataclasses.replace(load_hardware("H20"), network=50e6)
    cost = CostModel("H100", far, "LLaMA3-70B", dop=(2, 4), efficiency=IDEAL)
    assert cost.round_time(loads) == pytest.approx(70 * cost.model.sent_bytes / (4 * 50e6))


def test_iteration_spreads_a_batch_evenly():
    cost = paper("LLaMA3-70B")
    assert cost.iteration_time(7, 100) == cost.round_time([Load(4, 400), Load(3, 300)])
    assert cost.iteration_time(1, 100) == cost.round_time([Load(1, 100)])


def test_batch_limits_are_what_fits_in_memory():
    cost = paper("LLaMA3-70B", reserve=0.1)
    assert cost.batch_limit(8192) == int(0.9 * 4 * 96e9 / 327680 // 8192)
    rival = cost.counterpart()
    assert rival.batch_limit(8192) == int((0.9 * 4 * 80e9 - 137.5e9) / 327680 // 8192)
    # Figure 11's text: the batch reaches 800 at DOP (2, 4), on the shortest trace.
    assert 800 <= cost.batch_limit(lamina.load_traffic("Azure-Conv")) < 880


def test_throughput_and_batch_at_equal_cost():
    """Figure 10: +16.1 to +90.1 % tokens per second and 2.39 times the batch, measured against vLLM.

    The model alone gives 2.28 times the batch, and a higher throughput in every case but one: LLaMA3-70B on the
    shortest contexts, whose two H100s run out of arithmetic first. vLLM's own overheads are no part of the model.
    """
    gains, ratios = {}, []
    for (model, _), trace in itertools.product(EQUAL_COST.items(), traffic_names()):
        cost, traffic = paper(model), lamina.load_traffic(trace)
        rival = cost.counterpart()
        ratios.append(cost.batch_limit(traffic) / rival.batch_limit(traffic))
        gains[model, trace] = cost.tokens_per_second(traffic) / rival.tokens_per_second(traffic) - 1
    assert 2.2 < sum(ratios) / len(ratios) < 2.4
    bound = gains.pop(("LLaMA3-70B", "Azure-Conv"))
    assert -0.1 < bound < 0
    assert 0.1 < min(gains.values()) <= max(gains.values()) < 0.901
    assert paper("LLaMA3-70B").balance(lamina.load_traffic("Azure-Conv")) < 0.5


def test_tokens_per_dollar():
    cost = paper("LLaMA-33B")
    assert cost.tokens_per_second(4096, 6) == 6 / cost.iteration_time(6, 4096)
    assert cost.tokens_per_dollar(4096, 6) == pytest.approx(cost.tokens_per_second(4096, 6) * 3600 / 20.32)
    assert cost.tokens_per_second(4096) == cost.tokens_per_second(4096, cost.batch_limit(4096))


def test_best_is_the_best_of_all_it_may_choose():
    cost, traffic = paper("LLaMA3-70B"), lamina.load_traffic("Kimi-TA")
    options = dict(budget=50.0, pairs=[("H100", "H20"), ("TPU v6e", "H20")], batches=(1, 2, 3), devices=8)
    found = cost.best(traffic, **options)
    values = []
    for (a, b), n, i, j in itertools.product(options["pairs"], (1, 2, 3), range(1, 9), range(1, 9)):
        try:
            made = CostModel(a, b, "LLaMA3-70B", dop=(i, j), batches=n)
        except ValueError:
            continue
        if made.price <= 50 and made.batch_limit(traffic) >= n:
            values.append(made.tokens_per_dollar(traffic))
    assert found.tokens_per_dollar(traffic) == max(values) and found.price <= 50 and len(values) > 20
    quick = cost.best(traffic, budget=50.0, token_time=0.045)
    assert quick.iteration_time(quick.batch_limit(traffic), traffic) <= 0.045
    assert cost.best(traffic).price <= cost.price + 1e-9
    fastest = cost.best(traffic, budget=60.0, by="tokens_per_second")
    assert fastest.tokens_per_second(traffic) >= cost.best(traffic, budget=60.0).tokens_per_second(traffic)
    assert cost.with_options(reserve=0.05).best(traffic, budget=50.0).reserve == 0.05


def test_measured_times_are_interpolated():
    table = lamina.TimeTable([(10, 0.01), (20, 0.03), (40, 0.05)])
    wanted = {1: 0.01, 10: 0.01, 15: 0.02, 20: 0.03, 30: 0.04, 40: 0.05, 60: 0.07}
    assert {amount: pytest.approx(seconds) for amount, seconds in wanted.items()} == {a: table(a) for a in wanted}
    cost = paper("LLaMA3-70B", mtime=table.points, atime=[(0, 1e-3), (1e6, 2e-3)])
    assert (cost.mtime(15), cost.atime(5e5)) == (pytest.approx(0.02), pytest.approx(1.5e-3))


def test_attention_from_a_benchmarks_record(tmp_path):
    shape = load_model("LLaMA3-70B")
    row = {"kind": "split_decode", "contender": "attnlab triton", "unit": "ms"}
    rows = [row | {"length": 8192, "p50": 0.2}, row | {"length": 1024, "p50": 0.1}, {"kind": "forward"}]
    rows.append(row | {"length": 1024, "p50": 9.0, "contender": "sdpa"})
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"rows": rows, "kv_bytes": 4096}))
    table = lamina.attention_from_benchmarks(path, shape, contender="attnlab triton", devices=4)
    assert table(1024) == pytest.approx(1e-4 * 327680 / 4096 / 4)
    assert table((1024 + 8192) / 2) == pytest.approx(1.5e-4 * 327680 / 4096 / 4)
    with pytest.raises(ValueError, match=r"two or more lengths of split_decode by 'faiss', got 0"):
        lamina.attention_from_benchmarks(path, shape, contender="faiss")
    path.write_text(json.dumps({"rows": [row | {"length": 8}], "kv_bytes": 4096}))
    with pytest.raises(ValueError, match="row's p50 must be a finite number over 0, got None"):
        lamina.attention_from_benchmarks(path, shape, contender="attnlab triton")
    path.write_text("[]")
    with pytest.raises(ValueError, match="must be a benchmark's record with rows"):
        lamina.attention_from_benchmarks(path, shape, contender="attnlab triton")


@pytest.mark.parametrize(
    "kind, options",
    [
        ("Llama", {}), ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
        ("Mistral", {"tie_word_embeddings": True}), ("Qwen2", {}), ("Qwen3", {"head_dim": 48}),
        ("Qwen3", {"attention_bias": True}), ("SmolLM3", {"attention_bias": True, "mlp_bias": True, "pad_token_id": 0}),
    ],
)  # fmt: skip
def test_weights_are_counted_from_a_configuration(kind, options):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=97, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{kind}Config")(**sizes, num_key_value_heads=2, **options)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    shape = ModelShape.from_transformers(config, name="tiny", element_bytes=4)
    assert shape.weights == sum(p.numel() for p in model.parameters()) * 4
    kv = sum(p.numel() for n, p in model.named_parameters() if n.endswith(("k_proj.weight", "v_proj.weight")))
    assert shape.kv_projection_share == pytest.approx(kv / shape.parameters)
    assert (shape.group, shape.width) == (2, 4 * options.get("head_dim", shape.head_dim))


def test_users_bring_their_own_hardware(tmp_path):
    file = tmp_path / "mine.toml"
    entry = "flops = 1e15\nmemory = 192e9\nbandwidth = 8e12\ninterconnect = 9e11\nnetwork = 1e11\nprice = 5\n"
    file.write_text(f"[Mine]\n{entry}")
    mine = load_hardware("mine", file)
    assert mine == Hardware("Mine", 1e15, 192e9, 8e12, 9e11, 1e11, 5)
    assert CostModel(mine, mine, "LLaMA-65B").price == 10
    with pytest.raises(ValueError, match=r"unknown name 'H100'; known: Mine"):
        load_hardware("H100", file)
    file.write_text("[Mine]\nflops = 1")
    with pytest.raises(ValueError, match=r"\[Mine\] lacks: memory, bandwidth, interconnect, network"):
        load_hardware("Mine", file)
    file.write_text(f"[Mine]\n{entry}watts = 3\n")
    with pytest.raises(ValueError, match=r"\[Mine\] has unknown fields: watts; known: flops"):
        load_hardware("Mine", file)
    file.write_text("Mine = 3\n")
    with pytest.raises(ValueError, match=r"\[Mine\] must be a table, got int"):
        load_hardware("Mine", file)
    with pytest.raises(ValueError, match=r"cannot read .*none\.toml"):
        load_hardware("Mine", tmp_path / "none.toml")


def test_figure(tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("cost.png", "cost.svg"):
        paper("LLaMA3-70B").plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10000


def made(**options) -> CostModel:
    return CostModel("H100", "H20", "LLaMA3-70B", **{"dop": (2, 4)} | options)


@pytest.mark.parametrize(
    "make, complaint",
    [
        (lambda: CostModel("H10", "H20", "LLaMA3-70B"), r"load_hardware: unknown name 'H10'; did you mean H100 or"),
        (lambda: CostModel("H100", "H20", "Llama3 7B"), "unknown name 'Llama3 7B'; did you mean LLaMA3-70B"),
        (lambda: CostModel("zzz", "H20", "LLaMA3-70B"), "unknown name 'zzz'; known: H100, H20"),
        (lambda: CostModel(3, "H20", "LLaMA3-70B"), "hardware must be a name or a Hardware, got int"),
        (lambda: CostModel("H100", "H20", None), "model must be a name or a ModelShape, got NoneType"),
        (lambda: made(dop=(1, 2)), "weights, 137.5 GB, do not fit one replica's 1x H100, 72"),
        (lambda: made(dop=(4, 2), batches=4), r"dop\[0\] must be a multiple of .* 3 replicas, got 4"),
        (lambda: made(dop=3), "dop must be two positive ints"),
        (lambda: made(dop=(2, 0)), r"dop\[1\] must be a positive int, got 0"),
        (lambda: made(batches=0), "batches must be a positive int, got 0"),
        (lambda: made(alpha=0), "alpha must be a finite number over 0, got 0"),
        (lambda: made(reserve=1.0), "reserve must be below 1, got 1.0"),
        (lambda: made(reserve=-0.1), r"must be a finite number in \[0, 1\], got -0.1"),
        (lambda: made(round_trip=float("nan")), "must be a finite number 0 or more, got nan"),
        (lambda: made(overlap=1), "overlap must be"),
        (lambda: made(efficiency=Efficiency(flops=1.2)), r"efficiency.flops must be .* in \(0, 1\]"),
        (lambda: made(mtime=3), "mtime must be points .* or a function"),
        (lambda: lamina.TimeTable([(1, 2)]), "points must be two or more"),
        (lambda: lamina.TimeTable([(1, 2), (1, 3)]), "amounts rising"),
        (lambda: lamina.TimeTable([(1, 2), (2, 1)]), "seconds not falling"),
        (lambda: lamina.TimeTable([(1, 2), 3]), "points must be pairs"),
        (lambda: made().tokens_per_second(4096, 258), "batch must be at most batch_limit 257, got 258"),
        (lambda: made().tokens_per_second(1e9), "no request of 1e[+]09 tokens fits into"),
        (lambda: made().iteration_time(0, 10), "batch must be a positive int, got 0"),
        (lambda: made().required_bandwidth(1, -1), "length must be a finite number 0 or more, got -1"),
        (lambda: CostModel("H100", "L20", "LLaMA-33B").price, "the price of L20 is not known"),
        (lambda: made().counterpart("A100"), "A100 has no price to compare by, got None"),
        (lambda: HomogeneousCost("H100", "LLaMA-65B"), "do not fit one replica's 1x H100"),
        (lambda: made().best(4096, budget=5), r"within \$5.00 an hour; .*over the budget"),
        (lambda: made().best(4096, by="luck"), "by must be tokens_per_dollar or .*, got 'luck'"),
        (lambda: made().best(4096, batches=[0]), "batches must be a positive int, got 0"),
        (lambda: made(mtime=lambda b: 1.0).best(4096), "mtime were measured for this"),
        (lambda: Hardware("x", 1, 1, 0, 1, 1), "Hardware x: bandwidth must be a finite number over 0, got 0"),
        (lambda: Hardware("x", 1, 1, 1, 1, 1, price=-1), "Hardware x: price must be a finite number 0 or more, got -1"),
        (lambda: ModelShape("x", 1, 8, 3, 2, 8, 1), "heads must be a multiple of kv_heads=2, got 3"),
        (lambda: ModelShape.from_transformers(3), "config must be a transformers configuration, got int"),
        (lambda: load_hardware(3), "name must be a string, got int"),
        (lambda: load_model("LLaMA3-70B").model_intensity(0), "batch must be a finite number over 0"),
        (lambda: lamina.nothing, "has no attribute 'nothing'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(make, complaint):
    with pytest.raises((ValueError, TypeError, AttributeError), match=complaint):
        make()


def test_every_public_name_is_there():
    for name in lamina.__all__:
        assert getattr(lamina, name).__name__ == name
