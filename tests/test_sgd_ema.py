"""ops.sgd_ema against torch's own SGD followed by the average, and against the recurrence in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.errors import UserError
from fastmoco.ops import dispatch
from fastmoco.ops.ema import ema_update_
from fastmoco.ops.sgd_ema import sgd_ema_update_

IMPLEMENTATIONS = [
    "reference",
    pytest.param(
        "native", marks=pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
    ),
]
# Empty, a scalar, one below and above a vector register, channels, and one tensor that several threads share.
SHAPES = [(0,), (), (15,), (17,), (127, 131), (6, 5, 3, 3), (257, 511)]
OPTIONS: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2, "ema": 0.9}


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


class Weights:
    """Parameters with their buffers, averages and shadows, and new random gradients for each step."""

    def __init__(self, dtype: torch.dtype, *, momentum: float = 0.9):
        self.generator = torch.Generator().manual_seed(3)
        self.dtype = dtype
        self.parameters = self.random()
        self.targets: list[Tensor | None] = [*self.random()]
        # Neither at an end nor for every parameter.
        self.targets[3] = None
        self.buffers = [torch.zeros_like(p) for p in self.parameters] if momentum else []
        self.shadows = [None if t is None else torch.full_like(t, math.nan, dtype=torch.bfloat16) for t in self.targets]

    def random(self) -> list[Tensor]:
        exact = [torch.randn(shape, generator=self.generator, dtype=torch.float64) for shape in SHAPES]
        return [channels_last(tensor.to(self.dtype)) for tensor in exact]

    def step(self, gradients: list[Tensor], **options: Any) -> None:
        sgd_ema_update_(self.parameters, gradients, self.buffers, self.targets, **OPTIONS | options)

    def state(self) -> list[Tensor]:
        tensors = [*self.parameters, *self.buffers, *self.targets]
        return [tensor.clone() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("torchs", [{"fused": True}, {"foreach": True}], ids=["fused", "foreach"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"momentum": 0.0}, {"weight_decay": 0.0}, {"momentum": 0.0, "weight_decay": 0.0, "ema": 0.3}],
    ids=str,
)
def test_it_is_torchs_sgd_and_then_the_average(
    implementation: str, dtype: torch.dtype, torchs: dict[str, bool], changes: dict[str, float]
) -> None:
    options = OPTIONS | changes
    ours, theirs = (Weights(dtype, momentum=options["momentum"]) for _ in range(2))
    hyper = {name: options[name] for name in ("lr", "momentum", "weight_decay")}
    optimizer = torch.optim.SGD([torch.nn.Parameter(p) for p in theirs.parameters], **hyper, **torchs)
    trained = optimizer.param_groups[0]["params"]
    for _ in range(4):
        gradients = ours.random()
        ours.step(gradients, **changes, shadows=ours.shadows, implementation=implementation)
        for p, gradient in zip(trained, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
        pairs = [(t, p) for t, p in zip(theirs.targets, trained, strict=True) if t is not None]
        ema_update_([t for t, _ in pairs], [p for _, p in pairs], options["ema"], implementation="reference")
    # Ten roundings a step, of numbers of the size of a few units.
    tolerance = {"rtol": 0, "atol": 4 * 10 * 8 * torch.finfo(dtype).eps}
    for i, p in enumerate(trained):
        torch.testing.assert_close(ours.parameters[i], p.detach(), **tolerance)
        if ours.buffers:
            torch.testing.assert_close(ours.buffers[i], optimizer.state[p]["momentum_buffer"], **tolerance)
        target, shadow = ours.targets[i], ours.shadows[i]
        if target is not None and shadow is not None:
            torch.testing.assert_close(target, theirs.targets[i], **tolerance)
            assert torch.equal(shadow, target.bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_where_found_inf_is_one_only_the_average_moves(implementation: str, momentum: float) -> None:
    weights = Weights(torch.float32, momentum=momentum)
    gradients = weights.random()
    weights.step(gradients, momentum=momentum, found_inf=torch.tensor(0.0), implementation=implementation)
    moved = weights.state()
    count = len(weights.parameters) + len(weights.buffers)
    broken = [gradient * math.nan for gradient in gradients]
    weights.step(
        broken, momentum=momentum, found_inf=torch.tensor(1.0), shadows=weights.shadows, implementation=implementation
    )
    assert all(torch.equal(a, b) for a, b in zip(weights.state()[:count], moved[:count], strict=True))
    pairs = [(p, t) for p, t in zip(weights.parameters, weights.targets, strict=True) if t is not None]
    expected = moved[count:]
    ema_update_(expected, [p for p, _ in pairs], 0.9, implementation=implementation)
    assert all(torch.equal(t, e) for (_, t), e in zip(pairs, expected, strict=True))
    shadows = [shadow for shadow in weights.shadows if shadow is not None]
    assert all(torch.equal(shadow, e.bfloat16()) for shadow, e in zip(shadows, expected, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_through_bfloat16_copies(implementation: str, dtype: torch.dtype) -> None:
    """A parameter with a copy has gradients in bfloat16; it moves as without, and the copy is its rounding."""
    weights, expected = Weights(dtype), Weights(dtype)
    copies = [None if i % 2 else torch.full_like(p, 7, dtype=torch.bfloat16) for i, p in enumerate(weights.parameters)]
    for found_inf in (0.0, 0.0, 1.0):
        gradients = [
            gradient if copy is None else gradient.bfloat16()
            for gradient, copy in zip(weights.random(), copies, strict=True)
        ]
        blocked = torch.tensor(found_inf)
        weights.step(gradients, copies=copies, found_inf=blocked, implementation=implementation)
        expected.step([g.to(dtype) for g in gradients], found_inf=blocked, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(weights.state(), expected.state(), strict=True))
    for copy, parameter in zip(copies, weights.parameters, strict=True):
        assert copy is None or torch.equal(copy, parameter.bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_found_inf_of_zero_changes_no_bit(implementation: str) -> None:
    a, b = Weights(torch.float32), Weights(torch.float32)
    for _ in range(2):
        gradients = a.random()
        a.step(gradients, implementation=implementation)
        b.step(gradients, found_inf=torch.tensor(0.0), implementation=implementation)
    assert all(torch.equal(x, y) for x, y in zip(a.state(), b.state(), strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("operand", ["parameters", "gradients", "buffers", "targets", "shadows"])
def test_operands_of_other_layouts_and_dtypes_give_the_same(implementation: str, operand: str) -> None:
    weights, expected = Weights(torch.float64), Weights(torch.float64)
    lists = {name: getattr(weights, name) for name in ("parameters", "buffers", "targets", "shadows")}
    lists["gradients"] = expected.random()
    gradients = [gradient.clone() for gradient in lists["gradients"]]
    lists[operand] = [None if t is None else (t.mT.contiguous().mT if t.ndim > 1 else t) for t in lists[operand]]
    if operand == "gradients":
        lists[operand][2] = gradients[2].float()
        gradients[2] = gradients[2].float().double()
    strides = [None if t is None else t.stride() for t in lists[operand]]
    sgd_ema_update_(**lists, **OPTIONS, implementation=implementation)
    expected.step(gradients, shadows=expected.shadows, implementation="reference")
    for name in ("parameters", "buffers", "targets", "shadows"):
        for got, want in zip(lists[name], getattr(expected, name), strict=True):
            if want is not None:
                torch.testing.assert_close(got, want, rtol=0, atol=1e-2 if name == "shadows" else 1e-14)
    assert [None if t is None else t.stride() for t in lists[operand]] == strides


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_result_does_not_depend_on_the_number_of_threads(implementation: str) -> None:
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            weights = Weights(torch.float32)
            weights.step(weights.random(), implementation=implementation)
            results.append(torch.cat([tensor.flatten() for tensor in weights.state()]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("whole", [True, False])
def test_it_is_an_operation_that_torch_library_accepts(implementation: str, whole: bool) -> None:
    def new(dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [torch.randn(3).to(dtype), torch.randn(2, 5).to(dtype)]

    buffers, averages, shadows, copies, followed, copied = [], [], [], [], [], []
    if whole:
        buffers, averages, shadows, copies = new(), new()[1:], new(torch.bfloat16)[1:], new(torch.bfloat16)[:1]
        followed, copied = [1], [0]
    found_inf = torch.zeros(()) if whole else None
    torch.library.opcheck(
        torch.ops.fastmoco.sgd_ema_update_.default,
        (
            new(), new(), buffers, averages, shadows, copies, followed, copied,
            0.1, 0.9 * whole, 0.1, 0.9, found_inf, implementation,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_compiles_without_a_graph_break(implementation: str) -> None:
    def step(parameters: list[Tensor], buffers: list[Tensor], target: Tensor, found_inf: Tensor) -> Tensor:
        gradients = [2 * p for p in parameters]
        options = OPTIONS | {"found_inf": found_inf, "implementation": implementation}
        sgd_ema_update_(parameters, gradients, buffers, [None, target], **options)
        return parameters[0] + 1

    results = []
    for run in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        parameters, buffers = [torch.ones(3), torch.ones(2, 5)], [torch.zeros(3), torch.zeros(2, 5)]
        target = torch.ones(2, 5)
        out = run(parameters, buffers, target, torch.zeros(()))
        results.append([out, *parameters, *buffers, target])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_graph_that_saved_a_parameter_notices(implementation: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    product = (p * p).sum()
    sgd_ema_update_([p], [torch.ones(3)], [torch.zeros(3)], [None], **OPTIONS, implementation=implementation)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


SHARED = tensor(4)
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "lr": ({"lr": -1.0}, "lr must be 0 or more"),
    "momentum": ({"momentum": math.inf}, "momentum must be 0 or more"),
    "weight decay": ({"weight_decay": math.nan}, "weight_decay must be 0 or more"),
    "ema": ({"ema": 1.1}, r"ema must lie in \[0, 1\]"),
    "gradients": ({"gradients": []}, "1 parameters but 0 gradients"),
    "gradient's shape": ({"gradients": [tensor(2, 2)]}, "parameter 0 and gradient 0 of 1: shapes differ"),
    "no buffers": ({"buffers": []}, "1 parameters but 0 buffers"),
    "buffer's dtype": ({"buffers": [tensor(4, dtype=torch.float64)]}, "parameter 0 and buffer 0: dtypes differ"),
    "targets": ({"targets": []}, "1 parameters but 0 targets"),
    "target's shape": ({"targets": [tensor(5)]}, "target 0 and followed parameter 0 of 1: shapes differ"),
    "target's dtype": ({"targets": [tensor(4).half()]}, "target 0 and followed parameter 0: dtypes differ"),
    "target trained": ({"targets": [tensor(4).requires_grad_()]}, "target 0 of 1 requires a gradient"),
    "shadow alone": ({"targets": [None], "shadows": [tensor(4).bfloat16()]}, "None where the target is"),
    "shadow missing": ({"shadows": [None]}, "a shadow for each target"),
    "shadow's dtype": ({"shadows": [tensor(4)]}, "shadow 0 of 1 must be bfloat16"),
    "copies": ({"copies": [None, None]}, "1 parameters but 2 copies"),
    "copy's dtype": ({"copies": [tensor(4)]}, "copy 0 of 1 must be bfloat16"),
    "copy's shape": ({"copies": [tensor(5).bfloat16()]}, "parameter 0 and copy 0 of 1: shapes differ"),
    "found_inf's dtype": ({"found_inf": torch.tensor(0)}, "found_inf must be a 0-d float32 tensor on cpu, not t"),
    "found_inf's shape": ({"found_inf": tensor(1)}, r"found_inf must be .* of shape \(1,\)"),
    "found_inf's device": ({"found_inf": torch.zeros((), device="meta")}, "found_inf must be .* on meta"),
    "shared": ({"parameters": [SHARED], "targets": [SHARED]}, "target 0 and parameter 0 share memory"),
    "gradient shared": ({"buffers": [SHARED], "gradients": [SHARED]}, "buffer 0 and gradient 0 share memory"),
    "expanded": ({"buffers": [tensor(1).expand(4)]}, "buffer 0 is expanded"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_refused_before_anything_is_written(case: str, implementation: str) -> None:
    changes, message = REFUSED[case]
    lists = {"parameters": [tensor(4)], "gradients": [torch.ones(4)], "buffers": [tensor(4)], "targets": [tensor(4)]}
    arguments = lists | OPTIONS | changes
    with pytest.raises(UserError, match=message):
        sgd_ema_update_(**arguments, implementation=implementation)
    assert not any(p.any() for p in arguments["parameters"])


def test_nothing_is_nothing_to_do() -> None:
    sgd_ema_update_([], [], [], [], **OPTIONS)


@pytest.mark.skipif(dispatch.native is None, reason=dispatch.NATIVE_MISSING or "built")
class TestBindings:
    """What the C++ module refuses by itself, whoever calls it."""

    def arguments(self, **changes: object) -> dict[str, object]:
        self.p, self.g, self.b, self.t = (torch.full((4,), float(i)) for i in range(4))
        names = {"parameters": self.p, "gradients": self.g, "buffers": self.b, "targets": self.t}
        lists = {name: [value.data_ptr()] for name, value in names.items()}
        lists |= {"shadows": [0], "copies": [0], "sizes": [4]}
        return lists | OPTIONS | {"found_inf": 0, "dtype": "float32"} | changes

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"sizes": []}, "parameters and sizes differ in length"),
            ({"targets": []}, "targets and sizes differ in length"),
            ({"copies": []}, "copies and sizes differ in length"),
            ({"copies": [2], "gradients": [3]}, "not aligned"),
            ({"gradients": [0]}, "null address"),
            ({"buffers": [3]}, "not aligned"),
            ({"found_inf": 1}, "not aligned"),
            ({"targets": [0], "shadows": [2]}, "a shadow without a target"),
            ({"ema": -0.1}, "ema must lie in"),
            ({"dtype": "float16"}, "dtype must be float32 or float64"),
            ({"threads": 0}, "threads"),
        ],
    )
    def test_refuses(self, changes: dict[str, object], message: str) -> None:
        assert dispatch.native is not None
        with pytest.raises(ValueError, match=message):
            dispatch.native.sgd_ema_update(**{"threads": 1, **self.arguments(**changes)})

    def test_on_a_gpu_that_is_not_there_it_says_so(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
        assert dispatch.native is not None
        built = dispatch.native.build_info()["cuda"]
        with pytest.raises(RuntimeError, match="CUDA: .*(driver|device)" if built else "built without CUDA"):
            dispatch.native.sgd_ema_update_cuda(**self.arguments(), device=0, stream=0)
        assert not self.p.any()
