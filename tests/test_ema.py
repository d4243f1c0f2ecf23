"""ops.ema against the recurrence written in float64, and what it refuses."""

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.ema import ema_update_

IMPLEMENTATIONS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
    ),
]
# Empty, a scalar, primes, one below and above a vector register, and one tensor that several threads share.
SHAPES = [(0,), (), (1,), (15,), (17,), (3, 5, 7), (127, 131), (64, 3, 7, 7), (257, 511)]
MOMENTA = [0.0, 0.3, 0.5, 0.9, 0.999, 1.0]


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def exact(targets: list[Tensor], sources: list[Tensor], momentum: float) -> list[Tensor]:
    return [
        momentum * target.double() + (1 - momentum) * source.double()
        for target, source in zip(targets, sources, strict=True)
    ]


def assert_rounded(
    actual: list[Tensor], expected: list[Tensor], targets: list[Tensor], sources: list[Tensor]
) -> None:
    """Within four roundings of the exact result, measured at the larger of the two numbers averaged.

    Four operations round once each (the difference, the weight, the product, the sum).
    """
    for got, want, target, source in zip(actual, expected, targets, sources, strict=True):
        unit = torch.finfo(got.dtype).eps / 2
        scale = torch.maximum(target.double().abs(), source.double().abs()) * 2
        assert ((got.double() - want).abs() <= 4 * unit * scale).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_element_is_within_rounding(implementation: str, momentum: float, dtype: torch.dtype) -> None:
    before, sources = tensors(dtype, 0), tensors(dtype, 1)
    targets = [target.clone() for target in before]
    kept = [source.clone() for source in sources]
    ema_update_(targets, sources, momentum, implementation=implementation)
    assert_rounded(targets, exact(before, sources, momentum), before, sources)
    assert all(torch.equal(source, copy) for source, copy in zip(sources, kept, strict=True))
    if momentum == 1.0:
        assert all(torch.equal(target, old) for target, old in zip(targets, before, strict=True))
    if momentum == 0.0:
        assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_thousand_steps_follow_the_recurrence(implementation: str) -> None:
    target, source = torch.zeros(1009), torch.ones(1009)
    for _ in range(1000):
        ema_update_([target], [source], 0.999, implementation=implementation)
    # 1 - m^n for a constant source; a thousand roundings of half a unit in the last place at most.
    torch.testing.assert_close(target, torch.full((1009,), 1 - 0.999**1000), rtol=0, atol=1000 * 2**-24)


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def with_gaps(tensor: Tensor) -> Tensor:
    wide = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("source_layout", [Tensor.contiguous, channels_last, transposed, with_gaps])
@pytest.mark.parametrize("target_layout", [Tensor.contiguous, channels_last, transposed, with_gaps])
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 4, 1, 1), (1, 1, 5, 5), (3, 1, 2, 4)])
def test_any_layout_on_either_side(
    implementation: str,
    target_layout: Callable[[Tensor], Tensor],
    source_layout: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
) -> None:
    before, source = torch.randn(shape), torch.randn(shape)
    target = target_layout(before.clone())
    strides = target.stride()
    ema_update_([target], [source_layout(source)], 0.9, implementation=implementation)
    assert target.stride() == strides
    assert_rounded([target], exact([before], [source], 0.9), [before], [source])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_elements_between_those_of_a_strided_target_stay(implementation: str) -> None:
    memory = torch.arange(20.0)
    ema_update_([memory[::2]], [torch.zeros(10)], 0.5, implementation=implementation)
    assert torch.equal(memory[1::2], torch.arange(1.0, 20.0, 2))
    assert torch.equal(memory[::2], torch.arange(0.0, 20.0, 2) / 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dtypes_mix_in_one_list_and_sources_are_converted(implementation: str) -> None:
    dtypes = [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
    ]
    before = [torch.randn(37).to(dtype) for dtype, _ in dtypes]
    sources = [torch.randn(37).to(dtype) for _, dtype in dtypes]
    targets = [target.clone() for target in before]
    ema_update_(targets, sources, 0.75, implementation=implementation)
    assert [target.dtype for target in targets] == [dtype for dtype, _ in dtypes]
    assert_rounded(targets, exact(before, sources, 0.75), before, sources)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_result_does_not_depend_on_the_number_of_threads(implementation: str) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            targets = tensors(torch.float32, 0)
            ema_update_(targets, tensors(torch.float32, 1), 0.99, implementation=implementation)
            results.append(torch.cat([target.flatten() for target in targets]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_and_infinity_do_not_turn_finite(implementation: str) -> None:
    target = torch.tensor([math.nan, 1.0, math.inf, 1.0, -math.inf])
    source = torch.tensor([1.0, math.nan, 1.0, math.inf, 1.0])
    ema_update_([target], [source], 0.9, implementation=implementation)
    assert not target.isfinite().any()
    assert target[:2].isnan().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_graph_that_saved_the_target_notices(implementation: str) -> None:
    target, x = torch.ones(3), torch.ones(3, requires_grad=True)
    product = (target * x).sum()
    ema_update_([target], [torch.zeros(3)], 0.5, implementation=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sources_may_require_gradients_and_be_tied(implementation: str) -> None:
    source = torch.nn.Parameter(torch.full((5,), 2.0))
    targets = [torch.zeros(5), torch.ones(5)]
    ema_update_(targets, [source, source], 0.5, implementation=implementation)
    assert targets[0].tolist() == [1.0] * 5 and targets[1].tolist() == [1.5] * 5
    assert targets[0].grad_fn is None and source.grad is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_empty_list_is_nothing_to_do(implementation: str) -> None:
    ema_update_([], [], 0.9, implementation=implementation)


a, b, memory = torch.zeros(4), torch.zeros(4), torch.zeros(10)
half = torch.zeros(4, dtype=torch.bfloat16)
whole = torch.zeros(4, dtype=torch.int64)
trained = torch.zeros(4, requires_grad=True)
REFUSED = {
    "momentum above 1": ([a], [b], 1.001, "momentum must lie in"),
    "momentum below 0": ([a], [b], -0.1, "momentum must lie in"),
    "momentum NaN": ([a], [b], math.nan, "momentum must lie in"),
    "lengths": ([a], [b, b], 0.9, "1 targets but 2 sources"),
    "shapes of equal size": ([a.view(2, 2)], [b.view(4, 1)], 0.9, r"shapes differ, \(2, 2\) and \(4, 1\)"),
    "the second pair": ([a, memory], [b, b], 0.9, "target 1 and source 1 of 2: shapes differ"),
    "integers": ([whole], [b], 0.9, "floating-point"),
    "devices": ([a], [torch.zeros(4, device="meta")], 0.9, "must be on cpu, not cpu and meta"),
    "gradient": ([trained], [b], 0.9, "requires a gradient"),
    "target is source": ([a], [a], 0.9, "target 0 and source 0 share memory"),
    "target twice": ([a, a], [b, b], 0.9, "target 1 and target 0 share memory"),
    "targets overlap by one": ([memory[:5], memory[4:8]], [torch.zeros(5), b], 0.9, "share memory"),
    "source reaches into target": ([memory[3:7]], [memory[6:]], 0.9, "target 0 and source 0 share memory"),
    "target within a source": ([memory[2:4], a], [b[:2], memory[1:5]], 0.9, "target 0 and source 1"),
    "shadow is target": ([half], [b.bfloat16()], 0.9, "shadow 0 and target 0 share memory", [half]),
    "shadows": ([a, memory], [b, memory.clone()], 0.9, "2 targets but 1 shadows", [half]),
    "shadow's shape": ([memory], [memory.clone()], 0.9, "target 0 and shadow 0 of 1: shapes differ", [half]),
    "shadow's dtype": ([a], [b], 0.9, "shadow 0 of 1 must be bfloat16, not torch.float16", [half.half()]),
    "expanded": ([torch.zeros(1).expand(4)], [b], 0.9, "expanded"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_anything_is_written(case: str, implementation: str) -> None:
    targets, sources, momentum, message, *shadows = REFUSED[case]
    with pytest.raises(UserError, match=message):
        ema_update_(targets, sources, momentum, shadows=shadows[0] if shadows else None, implementation=implementation)
    assert all(target.count_nonzero() == 0 for target in targets)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.3, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [Tensor.contiguous, Tensor.t])
def test_shadows_are_the_rounded_targets(
    implementation: str, momentum: float, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    targets, sources = tensors(dtype, 0), tensors(dtype, 1)
    before = [target.clone() for target in targets]
    shadows = [torch.full(target.shape, math.nan, dtype=torch.bfloat16) for target in targets]
    # Another order in memory than the target's.
    shadows[6] = layout(torch.full((131, 127) if layout is Tensor.t else (127, 131), math.nan, dtype=torch.bfloat16))
    ema_update_(targets, sources, momentum, shadows=shadows, implementation=implementation)
    assert_rounded(targets, exact(before, sources, momentum), before, sources)
    assert all(torch.equal(shadow, target.bfloat16()) for target, shadow in zip(targets, shadows, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_shadows_round_ties_to_even_and_keep_what_is_not_finite(implementation: str) -> None:
    unit = 2.0**-7
    source = [1 + unit / 2, 1 + 1.5 * unit, 1 + 2.5 * unit, -1 - unit / 2, 3.4e38, -3.4e38, 1e-45, 0.0]
    expected = [1, 1 + 2 * unit, 1 + 2 * unit, -1, math.inf, -math.inf, 0, 0]
    target, shadow = torch.zeros(9), torch.zeros(9, dtype=torch.bfloat16)
    ema_update_([target], [torch.tensor([*source, math.nan])], 0.0, shadows=[shadow], implementation=implementation)
    assert shadow[:8].tolist() == expected and shadow[8].isnan()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_an_operation_that_torch_library_accepts(implementation: str) -> None:
    for shadows in ([], [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.bfloat16)]):
        sources = [torch.randn(3), torch.nn.Parameter(torch.randn(2, 5))]
        with torch.no_grad():
            torch.library.opcheck(
                torch.ops.fastmoco.ema_update_.default,
                ([torch.randn(3), torch.randn(2, 5)], sources, shadows, 0.9, implementation),
            )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_compiles_without_a_graph_break(implementation: str) -> None:
    def step(targets: list[Tensor], sources: list[Tensor], shadows: list[Tensor]) -> Tensor:
        ema_update_(targets, [2 * source for source in sources], 0.9, shadows=shadows, implementation=implementation)
        return targets[0] + 1

    sources = [torch.randn(7), torch.randn(3, 2)]
    eager, compiled = ([torch.ones(7), torch.ones(3, 2)] for _ in range(2))
    shadows, compiled_shadows = ([torch.zeros_like(t, dtype=torch.bfloat16) for t in eager] for _ in range(2))
    expected = step(eager, sources, shadows)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(compiled, sources, compiled_shadows)
    for a, b in zip([expected, *eager, *shadows], [got, *compiled, *compiled_shadows], strict=True):
        assert torch.equal(a, b)


def test_adjacent_tensors_of_one_memory_are_accepted() -> None:
    memory = torch.zeros(12)
    ema_update_([memory[:3], memory[8:]], [torch.ones(3), torch.ones(4)], 0.5)
    ema_update_([memory[3:5]], [memory[:2]], 0.0)
    assert memory.tolist() == [0.5] * 5 + [0] * 3 + [0.5] * 4


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
class TestBindings:
    """What the C++ module refuses by itself, whoever calls it."""

    def call(self, **changes: object) -> None:
        x, y = torch.zeros(4), torch.ones(4)
        arguments = {"targets": [x.data_ptr()], "sources": [y.data_ptr()], "shadows": [], "sizes": [4]}
        options = {"momentum": 0.5, "dtype": "float32", "threads": 1}
        assert dispatch.native is not None
        dispatch.native.ema_update(**(arguments | options | changes))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sizes": [4, 4]}, "differ in length"),
            ({"targets": []}, "differ in length"),
            ({"shadows": [2, 4]}, "shadows and sizes differ in length"),
            ({"sources": [0]}, "null address"),
            ({"targets": [3]}, "not aligned"),
            ({"momentum": 1.5}, "momentum"),
            ({"momentum": math.nan}, "momentum"),
            ({"dtype": "bfloat16"}, "dtype must be float32 or float64, not bfloat16"),
            ({"threads": 0}, "threads"),
        ],
    )
    def test_refuses(self, changes: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            self.call(**changes)

    def test_on_a_gpu_that_is_not_there_it_says_so(self) -> None:
        """Whether built with CUDA or without; the static CUDA runtime must not need a driver to load."""
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        x = torch.zeros(4)
        assert dispatch.native is not None
        built = dispatch.native.build_info()["cuda"]
        with pytest.raises(RuntimeError, match="CUDA: .*(driver|device)" if built else "built without CUDA"):
            dispatch.native.ema_update_cuda(
                [x.data_ptr()], [x.data_ptr()], [], [4], momentum=0.5, dtype="float32", device=0, stream=0
            )

    def test_negative_size_is_refused(self) -> None:
        with pytest.raises(TypeError):
            self.call(sizes=[-1])


class TestDispatch:
    def test_unknown_implementation_names_the_ones_there_are(self) -> None:
        with pytest.raises(UserError, match=r'implementation="cuda".*no such implementation.*reference'):
            ema_update_([torch.zeros(3)], [torch.ones(3)], 0.9, implementation="cuda")

    def test_implementation_for_another_device_says_which(self) -> None:
        meta = torch.zeros(3, device="meta")
        with pytest.raises(UserError, match=r'implementation="native" cannot be used here'):
            dispatch.pick("ema", meta, "native")

    def test_the_first_that_can_run_is_the_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "_registry", {})
        dispatch.register("sum", "reference", lambda: "reference")
        dispatch.register("sum", "native", lambda: "native", device_types=("cpu",))
        dispatch.register("sum", "triton", lambda: "triton", device_types=("cuda",), missing="absent")
        assert dispatch.pick("sum", torch.zeros(1))() == "native"
        assert dispatch.pick("sum", torch.zeros(1), "reference")() == "reference"
        assert dispatch.pick("sum", torch.zeros(1, device="meta"))() == "reference"
        with pytest.raises(UserError, match=r"absent\. On cpu tensors choose one of native, reference"):
            dispatch.pick("sum", torch.zeros(1), "triton")
        cpu, cuda = dispatch.table(["cpu", "cuda"])
        assert (cpu.operation, cpu.device_type, cpu.chosen) == ("sum", "cpu", "native")
        assert cuda.chosen == "reference" and set(cuda.refusals) == {"triton", "native"}

    def test_one_that_is_preferred_comes_first_where_it_can_run(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dispatch, "_registry", {})
        for name in dispatch.PREFERENCE:
            types = ("cpu",) if name == "native" else None
            dispatch.register("sum", name, lambda name=name: name, device_types=types, preferred=name == "native")
        assert dispatch.pick("sum", torch.zeros(1))() == "native"
        assert dispatch.pick("sum", torch.zeros(1, device="meta"))() == "triton"

    @pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
    @pytest.mark.parametrize("operation", ["ema", "sgd_ema"])
    def test_on_a_gpu_the_averages_are_native_where_that_is_built(self, operation: str) -> None:
        importlib.import_module(f"fastmoco.ops.{operation}")
        assert dispatch.native is not None
        (choice,) = (c for c in dispatch.table(["cuda"]) if c.operation == operation)
        built = bool(dispatch.native.build_info()["cuda"])
        assert (choice.chosen == "native") == built
