"""An ONNX detector computed by torch: many pictures at once, on any device that torch has.

Published detectors are exported for one picture: at their end they write the answers of all places below one another,
and so would mix up the pictures of a batch.  Here the graph is computed up to there, and each picture's answers are
taken apart.  onnxruntime needs a build for each kind of device, which torch brings.

Only what detectors of convolutions are made of is known here.  ``check`` compares the answers with onnxruntime's,
so that another graph, or an operation that means something else than is thought here, is never used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curation.libraries import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LAYOUT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity")  # they move values, and change none
AGREEMENT = 1e-3  # the largest difference between torch's float32 and onnxruntime's, of answers that are about one


class UnknownGraph(Exception):
    """The graph has something that is not known here."""


class TorchGraph:
    """pictures × channels × height × width → for each output, pictures × places × width."""

    def __init__(self, graph: Any, widths: Sequence[int]) -> None:
        """
        Args:
            graph: Of an ONNX file (``onnx.GraphProto``).
            widths: Of each output that is wanted, from the first on: how many numbers there are for a place.

        Raises:
            UnknownGraph: It holds an operation that is not known here.
        """
        import torch

        self._torch = torch
        self.device, self.dtype = "cpu", torch.float32
        constants = {tensor.name for tensor in graph.initializer}
        inputs = [value.name for value in graph.input if value.name not in constants]
        if len(inputs) != 1 or len(graph.output) < len(widths):
            raise UnknownGraph(f"{len(inputs)} inputs and {len(graph.output)} outputs")
        self._input = inputs[0]
        self._widths = tuple(widths)
        self._operations = _operations(torch)
        makers = {name: node for node in graph.node for name in node.output}
        ends = [_before_layout(output.name, makers) for output in graph.output[: len(widths)]]
        self._ends = [end for end, _ in ends]
        self._sigmoids = [count for _, count in ends]
        nodes = _needed(graph.node, self._ends, makers)
        if unknown := sorted({node.op_type for node in nodes} - self._operations.keys()):
            raise UnknownGraph(f"the operation {unknown[0]}")
        self._values = {tensor.name: self._constant(tensor) for tensor in graph.initializer}
        self._nodes = [(node, self._attributes(node)) for node in nodes]
        self._last = _last_uses(nodes, self._ends)

    def _constant(self, tensor: Any) -> Any:
        import onnx

        return self._torch.from_numpy(np.array(onnx.numpy_helper.to_array(tensor)))  # a copy: the file's is read-only

    def _attributes(self, node: Any) -> dict[str, Any]:
        import onnx

        found = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        for name, value in found.items():
            if isinstance(value, onnx.TensorProto):
                found[name] = self._constant(value)
        return found

    def move(self, device: str, dtype: Any) -> None:
        """To where and in what it is computed; at first that is the CPU and float32.

        Shapes stay on the CPU, where they are computed, and so do single numbers, which go with tensors on any device.
        """
        self.device, self.dtype = device, dtype
        for values in (self._values, *(attributes for _, attributes in self._nodes)):
            for name, value in values.items():
                if self._torch.is_tensor(value) and value.is_floating_point() and value.ndim:
                    values[name] = value.to(device, dtype)

    def __call__(self, pictures: Any) -> list[Any]:
        """Compute pictures that are on the device in the dtype.  Raises what torch raises, such as out of memory."""
        values = {**self._values, self._input: pictures}
        for number, (node, attributes) in enumerate(self._nodes):
            given = [values[name] if name else None for name in node.input]
            values[node.output[0]] = self._operations[node.op_type](attributes, *given)
            for name in self._last[number]:
                values.pop(name)  # so that a large batch needs no more memory than it must
        found = []
        for name, sigmoids, width in zip(self._ends, self._sigmoids, self._widths, strict=True):
            value = values[name]
            if value.ndim != 4 or value.shape[0] != len(pictures) or value.shape[1] % width:
                raise UnknownGraph(f"an output of the shape {tuple(value.shape)}")
            for _ in range(sigmoids):
                value = value.sigmoid()
            found.append(value.permute(0, 2, 3, 1).reshape(len(pictures), -1, width))
        return found

    def check(self, answers: Callable[[NDArray[np.float32]], Sequence[NDArray[Any]]], height: int, width: int) -> None:
        """Compare two pictures of noise with what onnxruntime makes of each.  Call it before ``move``.

        Args:
            answers: Of one picture, 1 × 3 × height × width: the outputs, as onnxruntime gives them.
            height: Of the pictures, in pixels.
            width: Of the pictures, in pixels.

        Raises:
            UnknownGraph: They differ by more than rounding.
        """
        noise = np.random.default_rng(0).uniform(-1, 1, (2, 3, height, width)).astype(np.float32)
        try:
            with self._torch.inference_mode():
                found = [part.numpy() for part in self(self._torch.from_numpy(noise))]
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UnknownGraph(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        for number in range(len(noise)):
            for mine, theirs in zip(found, answers(noise[number : number + 1]), strict=False):
                if theirs.size != mine[number].size:
                    raise UnknownGraph(f"{mine[number].size} numbers where onnxruntime gives {theirs.size}")
                apart = np.abs(mine[number].reshape(-1) - theirs.reshape(-1)).max(initial=0)
                if not apart <= AGREEMENT * max(1.0, float(np.abs(theirs).max(initial=0))):
                    raise UnknownGraph(f"answers that differ from onnxruntime's by {apart:.2g}")


def _before_layout(name: str, makers: Mapping[str, Any]) -> tuple[str, int]:
    """The value that is only moved, and passed through sigmoids, on its way to an output; and how many of these."""
    sigmoids = 0
    while (node := makers.get(name)) is not None and node.op_type in (*_LAYOUT, "Sigmoid"):
        sigmoids += node.op_type == "Sigmoid"
        name = node.input[0]
    return name, sigmoids


def _needed(nodes: Sequence[Any], ends: Sequence[str], makers: Mapping[str, Any]) -> list[Any]:
    """The nodes that the ends need, in the graph's order."""
    wanted, waiting = set(), list(ends)
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += [given for given in (makers[name].input if name in makers else ()) if given]
    return [node for node in nodes if any(name in wanted for name in node.output)]


def _last_uses(nodes: Sequence[Any], ends: Sequence[str]) -> list[list[str]]:
    """For each node, the values of other nodes that nobody needs after it."""
    made = {name for node in nodes for name in node.output} - {*ends}
    last = {name: number for number, node in enumerate(nodes) for name in node.input if name in made}
    return [[name for name, at in last.items() if at == number] for number in range(len(nodes))]


# ---- the operations: attributes and inputs → the first output


def _operations(torch: Any) -> dict[str, Callable[..., Any]]:
    """What each operation is in torch (onnx.ai/onnx/operators)."""
    return {**_of_numbers(torch), **_of_layers(torch.nn.functional), **_of_shapes(torch)}


def _of_numbers(torch: Any) -> dict[str, Callable[..., Any]]:
    def clip(a: Mapping[str, Any], x: Any, low: Any = None, high: Any = None) -> Any:
        return x.clamp(low if low is not None else a.get("min"), high if high is not None else a.get("max"))

    return {
        "Add": lambda _, x, y: x + y,
        "Cast": lambda a, x: x.to(_DTYPES[a["to"]](torch)),
        "Clip": clip,
        "Constant": lambda a: a["value"],
        "Div": lambda _, x, y: x / y if x.is_floating_point() else x // y,
        "Floor": lambda _, x: x.floor(),
        "Identity": lambda _, x: x,
        "Mul": lambda _, x, y: x * y,
        "PRelu": lambda _, x, slope: torch.where(x < 0, x * slope, x),
        "Relu": lambda _, x: x.relu(),
        "Sigmoid": lambda _, x: x.sigmoid(),
        "Sub": lambda _, x, y: x - y,
    }


def _of_layers(functional: Any) -> dict[str, Callable[..., Any]]:
    def pool(a: Mapping[str, Any], x: Any, kind: Callable[..., Any], **more: Any) -> Any:
        strides = a.get("strides", [1] * len(a["kernel_shape"]))
        return kind(x, a["kernel_shape"], strides, _pads(a), ceil_mode=bool(a.get("ceil_mode", 0)), **more)

    def average(a: Mapping[str, Any], x: Any) -> Any:
        return pool(a, x, functional.avg_pool2d, count_include_pad=bool(a.get("count_include_pad", 0)))

    def resize(a: Mapping[str, Any], x: Any, _roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
        if a.get("mode", b"nearest") != b"nearest":
            raise UnknownGraph(f"a resize by {a['mode']!r}")
        if sizes is not None and sizes.numel():
            return functional.interpolate(x, size=[int(n) for n in sizes[2:]], mode="nearest")
        return functional.interpolate(x, scale_factor=[float(n) for n in scales[2:]], mode="nearest")

    return {
        "AveragePool": average,
        "BatchNormalization": lambda a, x, scale, bias, mean, variance: functional.batch_norm(
            x, mean, variance, scale, bias, eps=a.get("epsilon", 1e-5)
        ),
        "Conv": lambda a, x, weight, bias=None: functional.conv2d(
            x, weight, bias, a.get("strides", 1), _pads(a), a.get("dilations", 1), a.get("group", 1)
        ),
        "InstanceNormalization": lambda a, x, scale, bias: functional.instance_norm(
            x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5)
        ),
        "LeakyRelu": lambda a, x: functional.leaky_relu(x, a.get("alpha", 0.01)),
        "MaxPool": lambda a, x: pool(a, x, functional.max_pool2d),
        "Resize": resize,
        "Upsample": lambda a, x, scales=None: resize(a, x, None, scales),
    }


def _of_shapes(torch: Any) -> dict[str, Callable[..., Any]]:
    def cut(_a: Mapping[str, Any], x: Any, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
        index = [slice(None)] * x.ndim
        chosen = range(len(starts)) if axes is None else map(int, axes)
        for number, axis in enumerate(chosen):
            step = 1 if steps is None else int(steps[number])
            index[axis] = slice(int(starts[number]), int(ends[number]), step)
        return x[tuple(index)]

    def moved(a: Mapping[str, Any], x: Any, axes: Any, step: Callable[[Any, int], Any]) -> Any:
        for axis in sorted(map(int, a["axes"] if axes is None else axes)):
            x = step(x, axis)
        return x

    return {
        "Concat": lambda a, *parts: torch.cat(parts, a["axis"]),
        "Flatten": lambda a, x: x.flatten(a.get("axis", 1)),
        "Gather": lambda a, x, index: torch.select(x, a.get("axis", 0), int(index)) if not index.ndim else x[index],
        "Reshape": lambda _, x, shape: x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)]),
        "Shape": lambda _, x: torch.tensor(x.shape),
        "Slice": cut,
        "Squeeze": lambda a, x, axes=None: moved(a, x, axes, lambda value, axis: value.squeeze(axis)),
        "Transpose": lambda a, x: x.permute(*a["perm"]),
        "Unsqueeze": lambda a, x, axes=None: moved(a, x, axes, lambda value, axis: value.unsqueeze(axis)),
    }


def _pads(a: Mapping[str, Any]) -> list[int]:
    """Rows and columns that are added on both sides."""
    if a.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise UnknownGraph(f"padding of the kind {a['auto_pad']!r}")
    top, left, bottom, right = a.get("pads", [0, 0, 0, 0])
    if (top, left) != (bottom, right):
        raise UnknownGraph("padding that differs from side to side")
    return [top, left]


# onnx.TensorProto's numbers of types → torch's
_DTYPES: dict[int, Callable[[Any], Any]] = {
    1: lambda torch: torch.float32,
    6: lambda torch: torch.int32,
    7: lambda torch: torch.int64,
}
