"""The op in torch: every accepted dtype and stride, survives every compiler mode, never raises; past torch's dispatcher
and through it."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

import moe_native
import moe_trace
from moe_native import ops

EXPERTS, K = 60, 4
dispatched = torch.ops.moe_native.record._op


@pytest.fixture(autouse=True, params=["direct", "dispatched"])
def way(request, monkeypatch):
    """How calls from Python go."""
    if request.param == "dispatched":
        monkeypatch.setattr(ops.op, "_op", dispatched)
    return request.param


@pytest.fixture
def recorder(tmp_path):
    with moe_native.Recorder(
        tmp_path / "trace", fields=("ids", "weights", "logits", "hidden"), ring_bytes=8 << 20
    ) as r:
        yield r


def routed(rows, seed=0, experts=EXPERTS, k=K):
    logits = torch.randn(rows, experts, generator=torch.Generator().manual_seed(seed))
    weights, ids = torch.topk(logits.softmax(-1), k)
    return ids, weights, logits


def record_one(recorder, binding, *tensors):
    with recorder.step(rows=len(tensors[0])):
        recorder.record(binding, *tensors)
    recorder.close()
    return moe_trace.open(recorder.path).layer(0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint16, torch.uint32])
@pytest.mark.parametrize("experts", [60, 512])
def test_id_dtypes(recorder, dtype, experts):
    ids, weights, _ = routed(33, experts=experts)
    binding = recorder.bind(0, experts=experts, top_k=K)
    layer = record_one(recorder, binding, ids.to(dtype), weights)
    assert layer.ids.dtype == (np.uint8 if experts <= 255 else np.uint16)
    assert np.array_equal(layer.ids, ids.numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_value_dtypes(recorder, dtype):
    ids, weights, logits = routed(33)
    weights, logits, hidden = weights.to(dtype), logits.to(dtype), torch.randn(33, 16).to(dtype)
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    layer = record_one(recorder, binding, ids, weights, logits, hidden)
    # Weights are stored as float16, rounded as torch rounds; logits and hidden states keep every bit.
    assert np.array_equal(layer.weights.astype(np.float32), weights.to(torch.float16).float().numpy())
    assert np.array_equal(layer.logits.astype(np.float32), logits.float().numpy())
    assert np.array_equal(layer.hidden.astype(np.float32), hidden.float().numpy())


def strided(tensor):
    """The same values, each dimension with gaps, rows and columns swapped in memory."""
    wide = torch.zeros(2 * tensor.shape[1], 3 * tensor.shape[0], dtype=tensor.dtype)
    view = wide[::2, ::3].T
    view.copy_(tensor)
    return view


def test_any_strides(recorder):
    ids, weights, logits = routed(21)
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    layer = record_one(recorder, binding, strided(ids), strided(weights), strided(logits), strided(logits))
    assert np.array_equal(layer.ids, ids.numpy())
    assert np.array_equal(layer.weights, weights.half().numpy())
    assert np.array_equal(layer.logits, logits.numpy())
    assert np.array_equal(layer.hidden, logits.numpy())


def test_zero_rows(recorder):
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    with recorder.step(rows=0):
        recorder.record(binding, *routed(0))
    assert recorder.counters()["lost"] == {}


def test_ids_out_of_range_are_marked_and_counted(recorder):
    ids, weights, _ = routed(8)
    ids[2, 1] = -1
    ids[5, 0] = EXPERTS
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    layer = record_one(recorder, binding, ids, weights)
    assert layer.ids[2, 1] == layer.ids[5, 0] == 255
    assert layer.counts().sum() == 8 * K - 2
    assert recorder.counters()["invalid_ids"] == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda i, w, x: (i.float(), w, x),
        lambda i, w, x: (i, w.double(), x),
        lambda i, w, x: (i, w[:, :2], x),
        lambda i, w, x: (i, w[:3], x),
        lambda i, w, x: (i[0], w[0], x),
        lambda i, w, x: (i, w, x[:2]),
        lambda i, w, x: (i, w, x.long()),
    ],
)
def test_unusable_tensors_are_a_counted_loss_and_one_line(recorder, caplog, spoil):
    bad = recorder.bind(0, experts=EXPERTS, top_k=K)
    good = recorder.bind(1, experts=EXPERTS, top_k=K)
    ids, weights, logits = routed(8)
    with caplog.at_level(logging.WARNING, "moe_native"):
        for _ in range(3):
            with recorder.step(rows=8):
                recorder.record(bad, *spoil(ids, weights, logits))
                recorder.record(good, ids, weights, logits)
        recorder.close()
    assert recorder.counters()["lost"] == {"bad_input": {"steps": 0, "layers": 3, "rows": 24}}
    assert sum("layer 0 is not recorded" in record.message for record in caplog.records) == 1
    trace = moe_trace.open(recorder.path)
    assert np.array_equal(trace.layer(1).ids, np.tile(ids.numpy(), (3, 1)))
    assert not trace.complete


def test_a_profiler_sees_which_way_a_call_goes(recorder, way):
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        record_one(recorder, binding, *routed(3))
    names = {event.name for event in profile.events()}
    assert ("moe_native::record" in names) == (way == "dispatched")


def test_what_is_no_plain_tensor_of_the_cpu_goes_through_the_dispatcher(recorder, tmp_path):
    class Marked(torch.Tensor):
        pass

    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    ids, weights, logits = routed(6)
    grown = (weights.clone().requires_grad_() * 1, logits.clone().requires_grad_())
    with torch.no_grad():
        layer = record_one(recorder, binding, ids, *grown)
    assert np.array_equal(layer.logits, logits.numpy())
    with moe_native.Recorder(tmp_path / "other", fields=("ids", "weights", "logits")) as other:
        binding = other.bind(0, experts=EXPERTS, top_k=K)
        with other.step(rows=24):
            negative = other.bind(1, experts=EXPERTS, top_k=K)
            ops.op(ops.state, ids.as_subclass(Marked), weights, logits, None, binding)
            ops.op(ops.state, ids, weights, logits.as_subclass(Marked), None, binding)
            ops.op(ops.state, ids, weights, router_logits=logits, hidden=None, binding=binding)
            ops.op(ops.state, ids, weights, logits, None, binding)
            lazy = torch.complex(weights, -weights).conj().imag  # negated when it is read
            assert lazy.is_neg()
            for _ in range(4):
                ops.op(ops.state, ids, lazy, logits, None, negative)
            meta = (tensor.to("meta") for tensor in (ids, weights, logits))
            ops.op(ops.state, *meta, None, binding)
    trace = moe_trace.open(other.path)
    assert np.array_equal(trace.layer(0).ids, np.tile(ids.numpy(), (4, 1)))
    assert np.array_equal(trace.layer(1).weights, np.tile(weights.half().numpy(), (4, 1)))
    for wrong in ((ops.state, ids), (ops.state, ids, weights, None, None, "0"), (ops.state, 1, weights, None, None, 0)):
        with pytest.raises((TypeError, RuntimeError)):
            ops.op(*wrong)


@pytest.mark.parametrize("rows", [256, 257, 5000])
def test_a_long_copy_lets_other_threads_run_and_is_the_same(recorder, rows):
    ids, weights, logits = routed(rows)
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    layer = record_one(recorder, binding, ids, weights, logits)
    assert np.array_equal(layer.ids, ids.numpy())
    assert np.array_equal(layer.logits, logits.numpy())


def test_an_unknown_binding_is_nothing():
    for binding in (-1, 1 << 40, 16383):
        ops.record(*routed(3)[:2], None, None, binding)


def test_schema():
    schema = str(torch.ops.moe_native.record.default._schema)
    assert schema == (
        "moe_native::record(Tensor(a!) state, Tensor topk_ids, Tensor topk_weights, "
        "Tensor? router_logits, Tensor? hidden, int binding) -> ()"
    )


def test_opcheck(recorder):
    binding = recorder.bind(0, experts=EXPERTS, top_k=K)
    ids, weights, logits = routed(4)
    torch.library.opcheck(torch.ops.moe_native.record.default, (ops.state, ids, weights, logits, None, binding))


class Router(torch.nn.Module):
    """Two routers and an expert that mixes their weights: enough for a compiler to try something."""

    def __init__(self, bindings):
        super().__init__()
        self.gates = torch.nn.ModuleList(torch.nn.Linear(16, EXPERTS, bias=False) for _ in bindings)
        self.bindings = bindings

    def forward(self, x):
        for gate, binding in zip(self.gates, self.bindings, strict=True):
            logits = gate(x)
            weights, ids = torch.topk(logits.softmax(-1), K)
            torch.ops.moe_native.record(ops.state, ids, weights, logits, None, binding)
            x = x + weights.sum(-1, keepdim=True) * x
        return x


@pytest.mark.parametrize("fresh_cache", [True, False], ids=["first", "from the cache"])
@pytest.mark.parametrize("cpp_wrapper", [False, True], ids=["python wrapper", "C++ wrapper"])
def test_compiled_graphs_record_every_call(recorder, fresh_cache, cpp_wrapper):
    """fullgraph, recompiles for new shapes, and the FX cache: the rows recorded are exactly those of the calls."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Router([recorder.bind(layer, experts=EXPERTS, top_k=K) for layer in range(2)])
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    sizes = [5, 5, 9, 5, 1, 9]
    inputs = [torch.randn(n, 16) for n in sizes]
    config = torch._inductor.config
    with config.patch(cpp_wrapper=cpp_wrapper, fx_graph_cache=True, force_disable_caches=fresh_cache), torch.no_grad():
        for x in inputs:
            with recorder.step(rows=len(x)):
                compiled(x)
    recorder.close()
    trace = moe_trace.open(recorder.path)
    assert recorder.counters()["records"] == 2 * len(sizes)
    assert trace.rows == sum(sizes)
    for layer in range(2):
        one = trace.layer(layer)
        assert np.array_equal(np.sort(np.argsort(-one.logits, axis=1)[:, :K]), np.sort(one.ids))
